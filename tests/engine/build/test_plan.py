"""What is built: variants, targets, keys; and finding engines again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixano_edge.engine.build import engines, library, plan
from pixano_edge.engine.build.cache import EngineCache
from pixano_edge.engine.build.engines import build_engines
from pixano_edge.engine.build.key import Box, EngineKey
from pixano_edge.engine.build.locate import find_engine
from pixano_edge.engine.build.plan import Options, Target, choices, choose, find_target, left_out, make_key
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.errors import BuildError, BundleError, CancelledError, DeviceError, MissingDependencyError
from pixano_edge.engine.runtime.base import DeviceInfo
from pixano_edge.engine.runtime.engine_file import read_engine
from tests.engine.bundle.sample import fields, make_bundle

ORIN = DeviceInfo("Orin", "cuda", compute_capability="8.7", extra={"multiprocessors": "16"})
A2000 = DeviceInfo("RTX A2000", "cuda", compute_capability="8.6", extra={"multiprocessors": "26"})
H100 = DeviceInfo("H100", "cuda", compute_capability="9.0", extra={"multiprocessors": "132"})
ON_ORIN = Target("tensorrt", "10.3.0", 12, ("8.7",), Box("tensorrt", "10.3.0", 12, "8.7", "Orin", 16))
ON_RTX = Target("tensorrt_rtx", "1.7.1", 13, ("8.6", "8.9"))
RTX_BOX = Box("tensorrt_rtx", "1.7.1", 13, "8.6", "RTX A2000", 26)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The sample with a decoder prepared for TensorRT in fp16."""
    graphs = fields()["graphs"]
    prepared = {**graphs["mask_decoder"]["variants"]["fp16"], "target": "tensorrt"}
    # The plain variant first, so that order alone does not decide; another file, so that hashes differ.
    prepared["file"] = "golden/one.npz"
    graphs["mask_decoder"]["variants"]["fp16-tensorrt"] = prepared
    return Bundle.open(make_bundle(tmp_path / "sample", graphs=graphs))


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Both flavours as if installed, the child's work noted instead of done."""
    seen: list[Mapping[str, Any]] = []

    def work(job: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        if job["action"] == "scratch":
            return {"scratch_bytes": [100 * len(Path(job["file"]).read_bytes()), 50]}
        seen.append(job)
        rtx = job["flavour"] == "tensorrt_rtx"
        if job["action"] == "describe":
            return {"version": "1.7.1" if rtx else "10.3.0", "compute_capabilities": ["NONE", "SM86", "SM89"]}
        Path(job["output"]).write_bytes(f"plan {len(seen)}".encode())
        if job["timing_output"]:
            Path(job["timing_output"]).write_bytes(b"timed")
        return {"problems": [], "seconds": 2.5, "peak_memory_bytes": 5, "warnings": ["careful"]}

    monkeypatch.setattr(plan, "run_child", work)
    monkeypatch.setattr(engines, "run_child", work)
    monkeypatch.setattr(library, "installed", lambda: ["tensorrt", "tensorrt_rtx"])
    monkeypatch.setattr(library, "cuda_major", lambda flavour: 13 if flavour == "tensorrt_rtx" else 12)
    return seen


def no_gpu() -> DeviceInfo:
    raise DeviceError("No NVIDIA driver answers.", "")


def test_the_variant_prepared_for_tensorrt_goes_first(bundle: Bundle) -> None:
    found = choices(bundle, "mask_decoder", "fp16")
    assert [(c.variant, c.target) for c in found] == [("fp16-tensorrt", "tensorrt"), ("fp16", "onnx")]
    assert found[0].sha256 == bundle.manifest.files["golden/one.npz"].sha256
    assert [c.variant for c in choices(bundle, "image_encoder", "fp16")] == ["fp16"]
    assert [c.variant for c in choices(bundle, "mask_decoder", "fp16-tensorrt")] == ["fp16-tensorrt"]
    assert choices(bundle, "mask_decoder", "int8") == []


def test_every_graph_in_every_precision_unless_named(bundle: Bundle) -> None:
    assert [(c.graph, c.variant) for c in choose(bundle)] == [
        ("image_encoder", "fp32"),
        ("image_encoder", "fp16"),
        ("mask_decoder", "fp32"),
        ("mask_decoder", "fp16-tensorrt"),
    ]
    assert [c.variant for c in choose(bundle, ["mask_decoder"], ["fp16", "fp16-tensorrt"])] == ["fp16-tensorrt"]


@pytest.mark.parametrize(
    ("graphs", "precisions", "words"),
    [
        (["memory_encoder"], [], "no graph 'memory_encoder'"),
        (["memory_encoder"], ["fp32"], "no graph 'memory_encoder'"),
        ([], ["int8"], "no variant 'int8'"),
    ],
)
def test_what_is_not_there_is_an_error(bundle: Bundle, graphs: list[str], precisions: list[str], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        choose(bundle, graphs, precisions)


def with_variants(bundle: Bundle, **variants: tuple[str, str, bool]) -> Bundle:
    """The bundle with more variants of its decoder: precision, target, and whether ONNX Runtime alone runs them."""
    held = bundle.manifest.graphs["mask_decoder"]
    plain = held.variants["fp32"]
    more = {
        name.replace("_", "-"): plain.model_copy(update={"precision": p, "target": t, "onnxruntime_only": alone})
        for name, (p, t, alone) in variants.items()
    }
    graph = held.model_copy(update={"variants": {**held.variants, **more}})
    graphs = {**bundle.manifest.graphs, "mask_decoder": graph}
    manifest = bundle.manifest.model_copy(update={"graphs": graphs})
    return Bundle(bundle.root, manifest, bundle.hash, bundle.specs)


def test_what_runs_in_onnx_runtime_alone_says_why_and_what_helps(bundle: Bundle) -> None:
    old = with_variants(bundle, int8=("int8", "onnx", True), int4=("int4", "onnx", True))
    words = "has no variant 'int8' for TensorRT: the decoder computes with operators of ONNX Runtime's own"
    with pytest.raises(BundleError, match=words) as caught:
        choose(old, ["mask_decoder"], ["int8"])
    assert caught.value.action.startswith("Calibrate it again, which makes one: pixano-edge calibrate <bundle>")
    with pytest.raises(BundleError, match=r"for TensorRT: the decoder's 4-bit weights .* MatMulNBits") as caught:
        choose(old, ["mask_decoder"], ["int4"])
    assert "Build fp16, or calibrate int8" in caught.value.action
    older = with_variants(bundle, fp32=("fp32", "onnx", True), mine=("int8", "onnx", True))
    with pytest.raises(BundleError, match="without a form for TensorRT") as caught:
        choose(older, ["mask_decoder"], ["mine"])
    assert caught.value.action.startswith("Export the bundle again, with a decoder for TensorRT. Calibrate it again")
    assert "--precision int8 --name mine --in-place" in caught.value.action
    told = left_out(old)
    assert [text.partition(" is not built")[0] for text in told] == ["mask_decoder in int8", "mask_decoder in int4"]
    assert {c.precision for c in choose(old)} == {"fp32", "fp16"}


def test_the_form_for_tensorrt_is_built_where_there_is_one(bundle: Bundle) -> None:
    new = with_variants(bundle, int8=("int8", "onnx", True), int8_tensorrt=("int8", "tensorrt", False))
    assert [c.variant for c in choose(new, ["mask_decoder"], ["int8"])] == ["int8-tensorrt"]
    assert left_out(new) == left_out(bundle) == []


def test_listed_gpus_are_for_tensorrt_for_rtx(jobs: list[Mapping[str, Any]]) -> None:
    target = find_target(["sm_89,sm_86"], None, no_gpu, Options())
    assert target == ON_RTX
    with pytest.raises(DeviceError, match="of the machine that it runs on alone"):
        find_target(["sm_86"], "tensorrt", no_gpu, Options())
    with pytest.raises(DeviceError, match="Jetson Orin"):
        find_target(["sm_87"], None, no_gpu, Options())


def test_without_targets_the_gpu_here_is_meant(jobs: list[Mapping[str, Any]]) -> None:
    assert find_target([], None, lambda: ORIN, Options()) == ON_ORIN
    assert find_target([], "tensorrt_rtx", lambda: A2000, Options()).capabilities == ("8.6",)
    with pytest.raises(DeviceError, match="Hopper"):
        find_target([], "tensorrt_rtx", lambda: H100, Options())


@pytest.mark.parametrize("flavour", [None, "tensorrt", "tensorrt_rtx"])
def test_without_a_gpu_the_way_out_is_named(jobs: list[Mapping[str, Any]], flavour: str | None) -> None:
    with pytest.raises(DeviceError, match=r"no GPU here to build for: No NVIDIA driver answers\.") as caught:
        find_target([], flavour, no_gpu, Options())
    assert "--target" in caught.value.action
    assert "Full TensorRT needs the GPU" in caught.value.action
    assert jobs == []


def test_a_missing_cuda_library_is_named_too(jobs: list[Mapping[str, Any]]) -> None:
    def absent() -> DeviceInfo:
        raise MissingDependencyError("cuda", "cuda", "A CUDA device")

    with pytest.raises(DeviceError) as caught:
        find_target([], None, absent, Options())
    assert "pixano-edge[cuda]" in caught.value.action
    assert "--target" in caught.value.action


@pytest.mark.parametrize("options", [Options(version_compatible=True), Options(hardware_compatible="ampere_plus")])
def test_compatible_engines_are_for_full_tensorrt(jobs: list[Mapping[str, Any]], options: Options) -> None:
    with pytest.raises(DeviceError, match="has no version- or hardware-compatible"):
        find_target(["sm_86"], None, no_gpu, options)
    assert find_target([], None, lambda: ORIN, options) == ON_ORIN


def test_unknown_hardware_level(jobs: list[Mapping[str, Any]]) -> None:
    with pytest.raises(DeviceError, match="'pascal' is not known"):
        find_target([], None, lambda: ORIN, Options(hardware_compatible="pascal"))


def test_missing_wheels_name_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "installed", lambda: [])
    with pytest.raises(MissingDependencyError, match=r"pixano-edge\[tensorrt-rtx\]"):
        find_target(["sm_86"], None, no_gpu, Options())
    with pytest.raises(DeviceError, match="Jetson Thor"):
        find_target(["sm_110"], None, no_gpu, Options())
    with pytest.raises(MissingDependencyError, match=r"pixano-edge\[tensorrt\]"):
        find_target([], None, lambda: ORIN, Options())
    monkeypatch.setattr(library, "installed", lambda: ["tensorrt"])
    with pytest.raises(MissingDependencyError, match=r"pixano-edge\[tensorrt-rtx\]"):
        find_target([], "tensorrt_rtx", lambda: A2000, Options())


def test_keys_name_the_product_for_full_tensorrt_only(bundle: Bundle) -> None:
    choice = choose(bundle, ["mask_decoder"], ["fp16"])[0]
    key = make_key(choice, ON_ORIN, Options())
    assert (key.device_name, key.sm_count, key.compute_capabilities) == ("Orin", 16, ("8.7",))
    assert key.graph_sha256 == choice.sha256
    assert len(key.profiles) == 2
    rtx = make_key(choice, ON_RTX, Options())
    assert (rtx.device_name, rtx.sm_count, rtx.compute_capabilities) == (None, None, ("8.6", "8.9"))
    level = make_key(choice, ON_ORIN, Options(hardware_compatible="same_compute_capability"))
    assert (level.device_name, level.sm_count) == (None, None)


def test_every_option_that_changes_the_engine_is_in_the_key(bundle: Bundle) -> None:
    choice = choose(bundle)[0]
    options = [
        Options(),
        Options(workspace=1 << 20),
        Options(tf32=True),
        Options(version_compatible=True),
        Options(hardware_compatible="ampere_plus"),
    ]
    assert len({make_key(choice, ON_ORIN, o).digest for o in options}) == len(options)
    # The builder's own memory does not change what it builds.
    assert make_key(choice, ON_ORIN, Options(memory_limit=1)) == make_key(choice, ON_ORIN, Options())


def test_builds_once_and_takes_it_from_the_cache(
    bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]]
) -> None:
    wanted = choose(bundle, [], ["fp16"])
    first = list(build_engines(bundle, wanted, ON_ORIN, Options(memory_limit=7), cache))
    assert [b.cached for b in first] == [False, False]
    assert [job["memory_limit"] for job in jobs] == [7, 7]
    assert bytes(read_engine(first[0].path)[1]) == b"plan 1"
    assert first[0].warnings == ("careful",)
    assert (first[0].seconds, first[0].peak_memory_bytes, first[0].engine_bytes) == (2.5, 5, 6)
    again = list(build_engines(bundle, wanted, ON_ORIN, Options(), cache))
    assert [b.cached for b in again] == [True, True]
    assert [b.path for b in again] == [b.path for b in first]
    assert len(jobs) == 2
    list(build_engines(bundle, wanted[:1], ON_ORIN, Options(), cache, rebuild=True))
    list(build_engines(bundle, wanted[:1], ON_ORIN, Options(tf32=True), cache))
    assert len(jobs) == 4
    assert list((cache.root / "work").iterdir()) == []


def test_a_truncated_engine_is_built_again(bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]]) -> None:
    wanted = choose(bundle, ["image_encoder"], ["fp32"])
    (built,) = build_engines(bundle, wanted, ON_RTX, Options(), cache)
    built.path.write_bytes(built.path.read_bytes()[:-1])
    (again,) = build_engines(bundle, wanted, ON_RTX, Options(), cache)
    assert not again.cached
    assert bytes(read_engine(again.path)[1]) == b"plan 2"
    assert "truncated" in cache.warnings[0]


def test_the_timing_cache_is_for_full_tensorrt_and_is_kept(
    bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]]
) -> None:
    wanted = choose(bundle, ["image_encoder"], ["fp32"])
    list(build_engines(bundle, wanted, ON_RTX, Options(), cache))
    assert jobs[0]["timing_output"] is None
    assert jobs[0]["compute_capabilities"] == ["SM86", "SM89"]
    list(build_engines(bundle, wanted, ON_ORIN, Options(), cache))
    assert ON_ORIN.box is not None
    kept = cache.timing_path(ON_ORIN.box)
    assert jobs[1]["timing_input"] == str(kept)
    assert kept.read_bytes() == b"timed"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), BuildError("crashed", "")])
def test_an_end_in_the_middle_keeps_what_was_finished_and_leaves_no_half(
    bundle: Bundle,
    cache: EngineCache,
    jobs: list[Mapping[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    stop: BaseException,
) -> None:
    work = engines.run_child

    def second_stops(job: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        if jobs:
            Path(job["output"]).write_bytes(b"half")
            raise stop
        return work(job, **options)

    monkeypatch.setattr(engines, "run_child", second_stops)
    with pytest.raises(type(stop)):
        list(build_engines(bundle, choose(bundle, [], ["fp32"]), ON_RTX, Options(), cache))
    assert len(list(cache.root.rglob("*.engine"))) == 1
    assert [p for p in cache.root.rglob("*") if p.is_file() and p.suffix != ".engine"] == []


def find(bundle: Bundle, cache: EngineCache, info: DeviceInfo = A2000, box: Box = RTX_BOX, **kw: Any) -> Path:
    return find_engine(
        bundle, kw.get("graph", "mask_decoder"), kw.get("precision", "fp16"), info, cache=cache, boxes=[box]
    )


def test_finds_what_was_built(bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]]) -> None:
    (built,) = build_engines(bundle, choose(bundle, ["mask_decoder"], ["fp16"]), ON_RTX, Options(), cache)
    assert find(bundle, cache) == built.path
    assert find(bundle, cache, precision="fp16-tensorrt") == built.path


def test_prefers_the_prepared_graph_then_the_newest(
    bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]]
) -> None:
    prepared, plain = choices(bundle, "mask_decoder", "fp16")
    (a,) = build_engines(bundle, [plain], ON_RTX, Options(), cache)
    assert find(bundle, cache) == a.path
    (b,) = build_engines(bundle, [prepared], ON_RTX, Options(), cache)
    (c,) = build_engines(bundle, [prepared], ON_RTX, Options(tf32=True), cache)
    os.utime(b.path, (10, 10))
    assert find(bundle, cache) == c.path
    os.utime(c.path, (5, 5))
    assert find(bundle, cache) == b.path


def test_prefers_an_engine_for_this_very_gpu(bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]]) -> None:
    wanted = choose(bundle, ["mask_decoder"], ["fp16"])
    (own,) = build_engines(bundle, wanted, ON_ORIN, Options(), cache)
    (wide,) = build_engines(bundle, wanted, ON_ORIN, Options(hardware_compatible="ampere_plus"), cache)
    os.utime(own.path, (5, 5))
    assert ON_ORIN.box is not None
    assert find(bundle, cache, ORIN, ON_ORIN.box) == own.path
    other = Box("tensorrt", "10.3.0", 12, "8.6", "RTX A2000", 26)
    assert find(bundle, cache, A2000, other) == wide.path


@pytest.mark.parametrize(
    ("box", "words"),
    [
        (Box("tensorrt_rtx", "1.8.0", 13, "8.6", "RTX A2000", 26), "built by tensorrt_rtx 1.7.1, this box has 1.8.0"),
        (Box("tensorrt_rtx", "1.7.1", 12, "8.6", "RTX A2000", 26), "built for CUDA 13, this box has 12"),
        (Box("tensorrt_rtx", "1.7.1", 13, "12.0", "RTX 5090", 170), "8.6 and 8.9, this GPU has 12.0"),
        (Box("tensorrt", "10.3.0", 13, "8.6", "RTX A2000", 26), "built by tensorrt_rtx, this box has tensorrt"),
    ],
)
def test_stale_and_foreign_engines_are_never_found(
    bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]], box: Box, words: str
) -> None:
    list(build_engines(bundle, choose(bundle, ["mask_decoder"], ["fp16"]), ON_RTX, Options(), cache))
    with pytest.raises(DeviceError) as caught:
        find(bundle, cache, box=box)
    assert words in caught.value.message
    assert f"pixano-edge build {bundle.root} --precision fp16" in caught.value.action


def test_an_engine_of_another_export_is_not_found(
    bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]], tmp_path: Path
) -> None:
    list(build_engines(bundle, choose(bundle), ON_RTX, Options(), cache))
    other = Bundle.open(make_bundle(tmp_path / "other", seed=1))
    with pytest.raises(DeviceError, match="None was built yet"):
        find(other, cache)


def test_a_truncated_engine_is_not_found_and_named(
    bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]]
) -> None:
    (built,) = build_engines(bundle, choose(bundle, ["mask_decoder"], ["fp16"]), ON_RTX, Options(), cache)
    built.path.write_bytes(built.path.read_bytes()[:-1])
    with pytest.raises(DeviceError, match="is truncated") as caught:
        find(bundle, cache)
    assert "pixano-edge build" in caught.value.action


def test_precisions_and_graphs_that_the_bundle_lacks(bundle: Bundle, cache: EngineCache) -> None:
    with pytest.raises(BundleError, match="no variant 'int8'"):
        find(bundle, cache, precision="int8")
    with pytest.raises(BundleError, match="no graph 'x'"):
        find(bundle, cache, graph="x")


def test_without_tensorrt_the_extra_is_named(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "installed", lambda: [])
    with pytest.raises(MissingDependencyError, match=r"pixano-edge\[tensorrt\]"):
        find_engine(bundle, "mask_decoder", "fp16", A2000, cache=cache)


def test_the_installed_tensorrt_is_asked(bundle: Bundle, cache: EngineCache) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'pixano-edge[tensorrt-rtx]'")
    with pytest.raises(DeviceError, match="None was built yet"):
        find_engine(bundle, "mask_decoder", "fp16", A2000, cache=cache)
    from pixano_edge.engine.build.locate import boxes_of

    boxes = {box.flavour: box for box in boxes_of(A2000)}
    assert boxes["tensorrt_rtx"] == Box("tensorrt_rtx", trt.__version__, 13, "8.6", "RTX A2000", 26)


def test_keys_in_files_are_those_of_the_build(
    bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]]
) -> None:
    choice = choose(bundle)[0]
    (built,) = build_engines(bundle, [choice], ON_RTX, Options(), cache)
    header, _ = read_engine(built.path)
    assert EngineKey.from_dict(header.key) == make_key(choice, ON_RTX, Options()) == built.key
    assert header.facts["built_from"] == "onnx"


def test_the_header_tells_the_scratch_memory_where_a_gpu_told_it(
    bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose(bundle)[0]
    (built,) = build_engines(bundle, [choice], ON_ORIN, Options(), cache)
    header, _ = read_engine(built.path)
    assert header.facts["scratch_bytes"] == [600, 50]  # of the engine as built: "plan 1"
    assert header.scratch_bytes == 600
    real = engines.run_child

    def no_room(job: Mapping[str, Any], **calls: Any) -> dict[str, Any]:
        if job["action"] == "scratch":
            raise DeviceError("No room for the weights.", "")
        return real(job, **calls)

    monkeypatch.setattr(engines, "run_child", no_room)
    (built,) = build_engines(bundle, [choice], ON_ORIN, Options(), cache, rebuild=True)
    header, _ = read_engine(built.path)
    assert header.scratch_bytes is None
    assert header.facts["scratch_reason"] == "No room for the weights."


def test_the_header_says_that_no_gpu_was_there_to_tell(
    bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, facts = choose(bundle)[0], SimpleNamespace(compute_capability=ON_RTX.capabilities[0])
    for found, scratch in (((), None), ((facts,), 600)):
        monkeypatch.setattr(engines, "cuda_facts", lambda found=found: (found, None))
        (built,) = build_engines(bundle, [choice], ON_RTX, Options(), cache, rebuild=True)
        header, _ = read_engine(built.path)
        assert header.scratch_bytes == scratch
        said = header.facts.get("scratch_reason", "")
        assert said == ("" if found else "built without a GPU of compute capability 8.6 or 8.9 to open it on")


def test_a_cancelled_build_is_no_unknown_scratch_memory(
    bundle: Bundle, cache: EngineCache, jobs: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engines.run_child

    def cancelled(job: Mapping[str, Any], **calls: Any) -> dict[str, Any]:
        if job["action"] == "scratch":
            raise CancelledError("Cancelled.", "")
        return real(job, **calls)

    monkeypatch.setattr(engines, "run_child", cancelled)
    with pytest.raises(CancelledError):
        list(build_engines(bundle, choose(bundle)[:1], ON_ORIN, Options(), cache))
    assert list((cache.root / "work").iterdir()) == []
