"""The child's work with full TensorRT, on a recording stand-in; the names it uses against the real RTX package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixano_edge.engine.build import child
from pixano_edge.engine.build.names import BUILD_CALLS, RTX_BUILD_CALLS
from pixano_edge.engine.errors import BuildError, DeviceError
from pixano_edge.engine.runtime.tensorrt_api import TensorRt
from pixano_edge.engine.runtime.tensorrt_names import missing_calls
from tests.engine.runtime.trt import DYNAMIC, fake
from tests.support.fake_trt_builder import DataType, FakeBuilderModule, Layer, LayerType, Network, Tensor
from tests.support.gpu_stub import GpuStub

SPEC = {
    "inputs": [{"name": "a", "dtype": "float32", "dims": ["B", 4]}],
    "outputs": [{"name": "y", "dtype": "float32", "dims": ["B", 4]}],
}
PROFILE = [["a", [[1, 4], [2, 4], [8, 4]]]]


def make_module(**changes: Any) -> FakeBuilderModule:
    a, y = Tensor("a", DataType.FLOAT, (-1, 4)), Tensor("y", DataType.FLOAT, (-1, 4))
    return FakeBuilderModule(Network([a], [y], [Layer("add", LayerType.ELEMENTWISE, [a, a], [y])]), **changes)


def run(fake: FakeBuilderModule, folder: Path, action: str = "build", **job: Any) -> dict[str, Any]:
    api: Any = SimpleNamespace(module=fake, flavour="tensorrt", version=fake.__version__, rtx=False)
    values = {
        "name": "g",
        "file": "g.onnx",
        "spec": SPEC,
        "profiles": [PROFILE, PROFILE],
        "flags": {},
        "output": str(folder / "engine"),
        "timing_input": str(folder / "timing.cache"),
        "timing_output": str(folder / "timing.new"),
    }
    answer: dict[str, Any] = getattr(child, action)(api, values | job, _said.append_event)
    return answer


class _Events(list[tuple[str, Mapping[str, Any]]]):
    def append_event(self, event: str, values: Mapping[str, Any]) -> None:
        self.append((event, values))


_said = _Events()


def test_builds_strongly_typed_with_all_profiles_and_without_tf32(tmp_path: Path) -> None:
    fake = make_module()
    answer = run(fake, tmp_path)
    assert answer["problems"] == []
    assert (tmp_path / "engine").read_bytes() == b"plan"
    assert answer["engine_bytes"] == 4
    assert answer["warnings"] == ["careful"]
    assert answer["peak_memory_bytes"] > 1 << 20
    assert fake.flags == 1 << 1
    config = fake.config
    assert config is not None
    assert config.set == set()
    assert config.profiles == [{"a": ((1, 4), (2, 4), (8, 4))}] * 2
    assert config.profiling_verbosity == fake.ProfilingVerbosity.DETAILED
    assert config.pools == {}
    assert ("progress", {"phase": "Building engine", "fraction": 0.0}) in _said


def test_options_reach_the_builder(tmp_path: Path) -> None:
    fake = make_module()
    flags = {"tf32": True, "version_compatible": True, "hardware_compatible": "ampere_plus"}
    run(fake, tmp_path, flags=flags, workspace=1 << 30)
    config = fake.config
    assert config is not None
    assert config.set == {"TF32", "VERSION_COMPATIBLE"}
    assert config.hardware_compatibility_level == fake.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.pools == {"WORKSPACE": 1 << 30}


def test_a_level_that_the_release_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no hardware compatibility 'same_compute_capability'"):
        run(make_module(), tmp_path, flags={"hardware_compatible": "same_compute_capability"})


def test_the_timing_cache_is_read_and_written_beside(tmp_path: Path) -> None:
    run(make_module(), tmp_path)
    assert (tmp_path / "timing.new").read_bytes() == b"+timed"
    (tmp_path / "timing.cache").write_bytes(b"old")
    run(make_module(), tmp_path)
    assert (tmp_path / "timing.new").read_bytes() == b"old+timed"
    assert (tmp_path / "timing.cache").read_bytes() == b"old"


def test_a_foreign_timing_cache_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "timing.cache").write_bytes(b"foreign")
    run(make_module(), tmp_path)
    assert (tmp_path / "timing.new").read_bytes() == b"+timed"


def test_a_failed_build_gives_tensorrts_words_and_no_file(tmp_path: Path) -> None:
    answer = run(make_module(engine=None), tmp_path)
    assert answer["problems"] == ["no tactic"]
    assert not (tmp_path / "engine").exists()
    fake = make_module()
    fake.parses = False
    assert run(fake, tmp_path)["problems"] == ["Unsupported operator"]


def test_refused_profiles_are_an_error(tmp_path: Path) -> None:
    fake = make_module()
    fake.refuse_profiles = True
    with pytest.raises(BuildError, match="refuses the profile"):
        run(fake, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": [{"name": "b", "dtype": "float32", "dims": ["B", 4]}]}, "inputs are ['a']"),
        ({"outputs": []}, "outputs are ['y']"),
        ({"inputs": [{"name": "a", "dtype": "int32", "dims": ["B", 4]}]}, "a is float32 (-1, 4), expected int32"),
        ({"inputs": [{"name": "a", "dtype": "float32", "dims": ["B", 5]}]}, "expected float32 ['B', 5]"),
        ({"inputs": [{"name": "a", "dtype": "float32", "dims": ["B", 4, 1]}]}, "expected float32 ['B', 4, 1]"),
        ({"inputs": [{"name": "a", "dtype": "float32", "dims": [2, 4]}]}, ""),
    ],
)
def test_differences_from_the_contract_are_found(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    problems = run(make_module(), tmp_path, spec=SPEC | change)["problems"]
    assert words in " ".join(problems)
    assert bool(problems) == bool(words)


def test_profiles_must_fit_the_network(tmp_path: Path) -> None:
    assert "no profile for them" in run(make_module(), tmp_path, profiles=[])["problems"][0]
    strange = [["b", [[1], [1], [1]]]]
    problems = run(make_module(), tmp_path, profiles=[strange])["problems"]
    assert problems == [
        "profile 0 has no shapes for ['a']",
        "profile 0 has shapes for ['b'], whose sizes are fixed in the graph",
    ]


def test_a_shape_tensor_among_the_inputs_is_a_problem(tmp_path: Path) -> None:
    fake = make_module()
    fake.network.get_input(0).is_shape_tensor = True
    assert run(fake, tmp_path)["problems"] == ["a is read on the host (a shape tensor)"]


def test_layers_are_described(tmp_path: Path) -> None:
    (layer,) = run(make_module(), tmp_path, action="parse")["layers"]
    tensors = {"inputs": [["a", "float32", [-1, 4]]] * 2, "outputs": [["y", "float32", [-1, 4]]]}
    assert layer == {"name": "add", "type": "ELEMENTWISE", "op": "ADD", "node": "node_add", **tensors}


def test_full_tensorrt_lists_no_targets(tmp_path: Path) -> None:
    assert run(make_module(), tmp_path, action="describe") == {"version": "10.16.2", "compute_capabilities": []}


def test_a_release_without_a_call_is_refused() -> None:
    api: Any = SimpleNamespace(module=SimpleNamespace(), flavour="tensorrt", version="9.0", rtx=False)
    with pytest.raises(DeviceError, match=r"tensorrt 9\.0 has no Builder"):
        child.check_names(api)


def test_every_name_is_in_the_real_package() -> None:
    pytest.importorskip("tensorrt_rtx_libs", reason="pip install 'pixano-edge[tensorrt-rtx]'")
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    assert missing_calls(trt, BUILD_CALLS) == []
    assert missing_calls(trt, RTX_BUILD_CALLS) == []
    for name in ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"):
        owner, member = name.split(".")
        assert hasattr(getattr(trt, owner), member)
    assert hasattr(trt.ILayer, "metadata")
    keywords = {
        "INetworkDefinition.get_layer": "index",
        "Builder.create_network": "flags",
        "Builder.build_serialized_network": "network, config",
        "IBuilderConfig.set_timing_cache": "cache, ignore_mismatch",
        "IBuilderConfig.create_timing_cache": "serialized_timing_cache",
        "IBuilderConfig.set_memory_pool_limit": "pool, pool_size",
        "IBuilderConfig.set_compute_capability": "compute_capability, index",
        "IOptimizationProfile.set_shape": "input, min, opt, max",
        "OnnxParser.parse_from_file": "model",
    }
    for name, arguments in keywords.items():
        owner, member = name.split(".")
        signature = getattr(getattr(trt, owner), member).__doc__.splitlines()[0]
        named = [part.partition(":")[0].strip() for part in signature.partition("(")[2].split(",")]
        assert named[1 : 1 + len(arguments.split(", "))] == arguments.split(", "), signature
    for method in BUILD_CALLS["IProgressMonitor"]:
        assert hasattr(trt.IProgressMonitor, method)
    assert {m for m in trt.ComputeCapability.__members__ if m.startswith("SM")} >= {"SM75", "SM86", "SM89", "SM120"}


def test_scratch_memory_is_that_of_every_profile_and_the_engine_is_closed(tmp_path: Path) -> None:
    device = GpuStub()
    trt = fake(device)
    (tmp_path / "engine").write_bytes(DYNAMIC)
    job = {"name": "dynamic", "file": str(tmp_path / "engine"), "host_code": True}
    with device.current():
        answer = child.scratch(TensorRt(trt, "tensorrt"), job, _said.append_event)
    assert answer["scratch_bytes"] == [16384, 1024, 4096]
    assert ("load", True) in trt.calls
    (tmp_path / "engine").write_bytes(b"foreign")
    with device.current(), pytest.raises(DeviceError, match="cannot load graph 'dynamic'"):
        child.scratch(TensorRt(trt, "tensorrt"), job, _said.append_event)
