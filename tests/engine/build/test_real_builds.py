"""TensorRT for RTX for real: every graph of the demo bundle, ahead of time, without a GPU and without torch or onnx.

One run of the command builds all of them; the tests look at what it left. Numbers need a GPU and are not checked here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.build import library
from pixano_edge.engine.build.builder import check_problems, run_child
from pixano_edge.engine.build.cache import EngineCache
from pixano_edge.engine.build.engines import build_engines, inspect_engine, job_for
from pixano_edge.engine.build.key import Box, EngineKey
from pixano_edge.engine.build.locate import find_engine
from pixano_edge.engine.build.plan import Options, Target, choose
from pixano_edge.engine.build.report import UNKNOWN
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import BuildError, CancelledError, DeviceError
from pixano_edge.engine.runtime.base import DeviceInfo
from pixano_edge.engine.runtime.engine_file import read_engine

pytestmark = pytest.mark.skipif(
    "tensorrt_rtx" not in library.installed(), reason="pip install 'pixano-edge[tensorrt-rtx]'"
)

BLOCKED = ("torch", "torchvision", "transformers", "optimum", "onnx", "onnxscript", "onnxslim", "onnxruntime")
BLOCKER = """
import os, sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by the test", name=name)
        return None

sys.meta_path.insert(0, Blocked())
with open({log!r}, "a") as log:
    log.write(f"{{os.getpid()}}\\n")
"""


@dataclass(frozen=True)
class Run:
    """What the command left.

    Attributes:
        answer: Its JSON.
        processes: Number of Python processes that ran with the imports blocked.
        cache: Where the engines are.
    """

    answer: dict[str, Any]
    processes: int
    cache: EngineCache


@pytest.fixture(scope="module")
def built(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``pixano-edge build sam2-demo --target sm_86,sm_89 --report --bundle-engines --output <copy> --json``."""
    folder = tmp_path_factory.mktemp("build")
    log = folder / "processes"
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(BLOCKER.format(names=set(BLOCKED), log=str(log)))
    options = ["--target", "sm_86,sm_89", "--report", "--bundle-engines", "--output", str(folder / "copy"), "--json"]
    result = subprocess.run(
        [sys.executable, "-c", "from pixano_edge.engine.cli.build import app; app()", str(demo_bundle), *options],
        env={**os.environ, "PYTHONPATH": str(folder / "site"), "PIXANO_EDGE_HOME": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return Run(json.loads(result.stdout), len(set(log.read_text().split())), EngineCache(folder / "engines"))


def test_every_graph_builds_for_two_compute_capabilities(built: Run, demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    expected = {(c.graph, c.variant) for c in choose(bundle)}
    assert {(e["graph"], e["variant"]) for e in built.answer["engines"]} == expected
    assert {graph for graph, _ in expected} == set(bundle.specs)
    assert built.answer["flavour"] == "tensorrt_rtx"
    assert built.answer["compute_capabilities"] == ["8.6", "8.9"]
    for engine in built.answer["engines"]:
        assert engine["engine_bytes"] > 100_000
        assert engine["peak_memory_bytes"] > 100 << 20
        header, data = read_engine(Path(engine["path"]))
        data.release()
        key = EngineKey.from_dict(header.key)
        assert key.to_dict() == engine["key"]
        assert key.graph_sha256 in {entry.sha256 for entry in bundle.manifest.files.values()}


def test_dynamic_graphs_have_profiles_for_the_typical_case_and_the_whole_range(built: Run, demo_bundle: Path) -> None:
    specs = Bundle.open(demo_bundle).specs
    for engine in built.answer["engines"]:
        spec, profiles = specs[engine["graph"]], engine["key"]["profiles"]
        dynamic = [t for t in spec.inputs if t.dynamic]
        assert len(profiles) == (2 if dynamic else 0)
        for profile in profiles:
            assert [name for name, _ in profile] == [t.name for t in dynamic]
        for index, tensor in enumerate(dynamic):
            largest = tensor.shape({d: spec.ranges[d][2] for d in tensor.dynamic})
            assert tuple(profiles[-1][index][1][2]) == largest


def test_neither_the_command_nor_its_children_import_the_export_stack(built: Run) -> None:
    # The command itself, one child that describes, one per engine and one per layer report.
    assert built.processes == 2 + 2 * len(built.answer["engines"])


def test_every_layer_in_fp32_has_a_reason(built: Run) -> None:
    reports = {(r["graph"], r["variant"]): r for r in built.answer["layers"]}
    assert len(reports) == len(built.answer["engines"])
    reduced = 0
    for report in reports.values():
        assert len(report["layers"]) > 50
        if report["precision"] == "fp32":
            # Casts are those of weights stored in half precision, of comparisons, and of memories to bfloat16.
            assert {p for p in report["precisions"] if "->" not in p} == {"float32"}
            assert report["kept_in_fp32"] == {}
            continue
        reduced += 1
        assert report["precisions"]["float16"] > report["precisions"].get("float32", 0)
        assert UNKNOWN not in report["kept_in_fp32"], report["kept_in_fp32"][UNKNOWN]
    assert reduced


def test_the_copy_has_the_engines_and_finds_them(built: Run, demo_bundle: Path, tmp_path: Path) -> None:
    original, copy = Bundle.open(demo_bundle), Bundle.open(built.answer["bundle"])
    assert copy.hash == original.hash
    assert original.engines is None
    info = DeviceInfo("RTX 4090", "cuda", compute_capability="8.9", extra={"multiprocessors": "128"})
    box = Box("tensorrt_rtx", built.answer["version"], library.cuda_major("tensorrt_rtx"), "8.9", info.name, 128)
    empty = EngineCache(tmp_path)
    for graph in copy.specs:
        path = find_engine(copy, graph, "fp16", info, cache=empty, boxes=[box])
        assert path.parent == copy.root / "engines"
        assert find_engine(original, graph, "fp16", info, cache=built.cache, boxes=[box]).name == path.name


def test_a_second_build_takes_everything_from_the_cache(built: Run, demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    target = Target("tensorrt_rtx", built.answer["version"], library.cuda_major("tensorrt_rtx"), ("8.6", "8.9"))
    again = list(build_engines(bundle, choose(bundle), target, Options(), built.cache))
    assert all(engine.cached for engine in again)


def test_the_inspector_needs_a_driver_and_says_so(built: Run) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(DeviceError, match="cannot load graph") as caught:
        inspect_engine(Path(built.answer["engines"][0]["path"]))
    assert "doctor" in caught.value.action


def job(bundle: Bundle, output: Path, **changes: Any) -> dict[str, Any]:
    """The build of the fp16 mask decoder."""
    (choice,) = choose(bundle, ["mask_decoder"], ["fp16"])
    values = {"action": "build", "flavour": "tensorrt_rtx", "flags": {}, "compute_capabilities": ["SM86"]}
    return job_for(choice, bundle.root / choice.file) | values | {"output": str(output)} | changes


@pytest.mark.parametrize("limit", [60 << 20, 120 << 20])
def test_a_memory_limit_that_is_hit_is_named(demo_bundle: Path, tmp_path: Path, limit: int) -> None:
    """Little memory makes TensorRT abort or give up, depending on where it runs out; both must read the same."""
    work = job(Bundle.open(demo_bundle), tmp_path / "engine", memory_limit=limit)
    with pytest.raises(BuildError, match=f"more memory than the limit of {limit >> 20} MiB") as caught:
        check_problems(work, run_child(work))
    assert "--memory-limit" in caught.value.action
    assert list(tmp_path.iterdir()) == []


def test_a_build_can_be_cancelled_while_tensorrt_works(demo_bundle: Path, tmp_path: Path) -> None:
    bundle, cache = Bundle.open(demo_bundle), EngineCache(tmp_path)
    phases: list[str] = []

    def check() -> None:
        if "Building engine" in phases:
            raise CancelledError("Stopped.")

    target = Target("tensorrt_rtx", "1.7", 13, ("8.6",))
    wanted = choose(bundle, ["mask_decoder"], ["fp16"])
    with pytest.raises(CancelledError):
        list(
            build_engines(
                bundle, wanted, target, Options(), cache, progress=lambda phase, _: phases.append(phase), check=check
            )
        )
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def small(op: str) -> GraphSpec:
    tensors = [TensorSpec(name, "float32", ("B", 4)) for name in "aby"]
    return GraphSpec(op, (tensors[0], tensors[1]), (tensors[2],), {"B": (1, 2, 8)})


@pytest.mark.parametrize(("op", "takes"), [("Add", True), ("BitShift", False)])
def test_a_graph_that_tensorrt_cannot_take_fails(op: str, takes: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="making a graph needs onnx")
    spec = small(op)
    kind = onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, kind, ["B", 4]) for name in "aby"]
    node = onnx.helper.make_node(op, ["a", "b"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values[:2], values[2:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "g.onnx")
    from pixano_edge.engine.build.profiles import profiles

    work = {
        "action": "build",
        "name": op,
        "flavour": "tensorrt_rtx",
        "file": str(tmp_path / "g.onnx"),
        "spec": asdict(spec),
        "profiles": profiles(spec),
        "flags": {},
        "compute_capabilities": ["SM86", "SM120"],
        "output": str(tmp_path / "engine"),
    }
    answer = run_child(work)
    if takes:
        check_problems(work, answer)
        assert (tmp_path / "engine").stat().st_size == answer["engine_bytes"] > 0
    else:
        with pytest.raises(BuildError, match="TensorRT does not take 'BitShift'"):
            check_problems(work, answer)
        assert not (tmp_path / "engine").exists()
