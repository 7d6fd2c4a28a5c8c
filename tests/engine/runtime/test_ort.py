"""ONNX Runtime sessions: bound memory, refusals at opening, chaining."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import helper

from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import BundleError, ContractError, DeviceError, MissingDependencyError
from pixano_edge.engine.runtime import CpuDevice, OrtSession, StubDevice, open_device, open_session
from pixano_edge.engine.runtime.ort import check_graph
from tests.engine.runtime.graphs import save, spec, twice

CPU = CpuDevice()
ONES = np.ones((2, 4), np.float32)


def opened(path: Path, graph: GraphSpec, **options: object) -> OrtSession:
    session = open_session(path, graph, CPU, threads=1, options=options)
    assert isinstance(session, OrtSession)
    return session


@pytest.fixture
def session(tmp_path: Path) -> OrtSession:
    return opened(*twice(tmp_path))


def test_addresses_stay_and_outputs_are_views(session: OrtSession) -> None:
    binding = session.prepare({"P": 2})
    addresses = {n: b.pointer for n, b in (*binding.inputs.items(), *binding.outputs.items())}
    assert all(a % 64 == 0 for a in addresses.values())
    view = binding.read("y")
    for value in (1, 2, 3):
        binding.write("x", ONES * value)
        binding.run()
        assert (view == 2 * value).all(), "the view taken before shows every later run"
        assert binding.read("y").ctypes.data == addresses["y"]
        assert binding.inputs["x"].host().ctypes.data == addresses["x"]
        assert session.prepare({"P": 2}) is binding
    assert session.runs == 3


def test_weights_are_what_the_bundle_says_or_the_files_size(tmp_path: Path) -> None:
    path, graph = twice(tmp_path)
    assert open_session(path, graph, CPU, threads=1).memory().weights == path.stat().st_size
    assert open_session(path, graph, CPU, threads=1, weight_bytes=10**9).memory().weights == 10**9


def test_onnxruntime_works_on_our_memory(session: OrtSession) -> None:
    binding = session.prepare({"P": 2})
    for buffer in (binding.inputs["x"], binding.outputs["y"]):
        assert buffer.handle.data_ptr() == buffer.pointer
    # Writing the memory behind everyone's back is seen: there is no copy on the way in.
    binding.inputs["x"].host()[:] = 5
    binding.run()
    assert (binding.outputs["y"].host() == 10).all()


def test_borrowed_input_and_output(session: OrtSession) -> None:
    binding = session.prepare({"P": 2})
    source, target = ONES * 4, np.zeros_like(ONES)
    binding.bind("x", CPU.wrap(source))
    binding.bind("y", CPU.wrap(memoryview(target)))
    binding.run()
    assert (target == 8).all()
    source[:] = 1
    binding.run()
    assert (target == 2).all()
    assert binding.read("y").ctypes.data == target.ctypes.data


def test_read_only_memory_is_an_input_only(session: OrtSession) -> None:
    binding = session.prepare({"P": 2})
    fixed = ONES.copy()
    fixed.flags.writeable = False
    binding.bind("x", CPU.wrap(fixed))
    binding.run()
    assert (binding.read("y") == 2).all()
    with pytest.raises(ContractError, match="read-only"):
        binding.write("x", ONES)
    held = binding.outputs["y"]
    with pytest.raises(ContractError, match="read-only"):
        binding.bind("y", CPU.wrap(fixed))
    assert binding.outputs["y"] is held, "a refused buffer is not bound"
    binding.run()
    assert (fixed == 1).all()


def test_two_sessions_chained_without_a_copy(tmp_path: Path) -> None:
    first = opened(*twice(tmp_path, spec("first"))).prepare({"P": 2})
    second = opened(*twice(tmp_path, spec("second", source="a", target="b"))).prepare({"P": 2})
    middle = first.outputs["y"]
    handle = middle.handle
    second.bind("a", middle)
    assert second.inputs["a"] is middle
    assert middle.handle is handle, "the same OrtValue serves both sessions"
    assert middle.handle.data_ptr() == middle.pointer
    for value in (1, 3):
        first.write("x", ONES * value)
        first.run()
        second.run()
        assert (second.read("b") == 4 * value).all()


def test_binding_again_binds_once(session: OrtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = session.prepare({"P": 2})
    calls: list[str] = []
    impl = session._bind_impl
    monkeypatch.setattr(session, "_bind_impl", lambda b, name, buffer: (calls.append(name), impl(b, name, buffer)))
    buffer = CPU.wrap(ONES.copy())
    for _ in range(3):
        binding.bind("x", buffer)
        binding.run()
    assert calls == ["x"]
    session.prepare({"P": 2}).run()
    assert calls == ["x"]
    session.prepare({"P": 3})
    assert calls == ["x", "x", "y"], "a new shape binds its own buffers"


def test_least_recently_used_binding_goes(session: OrtSession) -> None:
    session.max_bindings = 2
    one = session.prepare({"P": 1})
    session.prepare({"P": 2})
    assert session.prepare({"P": 1}) is one
    session.prepare({"P": 3})
    assert session.prepare({"P": 1}) is one
    assert len(session._bindings) == 2


@pytest.mark.parametrize(
    "array",
    [
        ONES.astype(np.float64),
        ONES.astype(np.float16),
        ONES.astype(np.int32),
        ONES.astype(">f4"),
        ONES[0],
        ONES[:1],
        ONES[:, :3],
        ONES[None],
    ],
)
def test_no_conversion_ever(session: OrtSession, array: np.ndarray) -> None:
    binding = session.prepare({"P": 2})
    before = binding.inputs["x"].host().copy()
    with pytest.raises(ContractError, match="is bound as float32"):
        binding.write("x", array)
    assert np.array_equal(binding.inputs["x"].host(), before, equal_nan=True)
    if array.dtype.isnative:
        with pytest.raises(ContractError, match="is bound as float32"):
            binding.bind("x", CPU.wrap(np.ascontiguousarray(array)))


def test_strided_source_is_copied_right(session: OrtSession) -> None:
    binding = session.prepare({"P": 2})
    wide = np.arange(16, dtype=np.float32).reshape(2, 8)
    binding.write("x", wide[:, ::2])
    binding.run()
    assert np.array_equal(binding.read("y"), 2 * wide[:, ::2])


def test_float16_stays_float16(tmp_path: Path) -> None:
    binding = opened(*twice(tmp_path, spec("half", dtype="float16"))).prepare({"P": 2})
    binding.write("x", ONES.astype(np.float16))
    binding.run()
    assert binding.read("y").dtype == np.float16
    assert (binding.read("y") == 2).all()


def test_wrong_names_and_devices(session: OrtSession) -> None:
    binding = session.prepare({"P": 2})
    with pytest.raises(ContractError, match=r"no bound input 'y'.*\['x'\]"):
        binding.write("y", ONES)
    with pytest.raises(ContractError, match="no tensor 'z'"):
        binding.bind("z", CPU.wrap(ONES.copy()))
    with pytest.raises(ContractError, match="lives on stub, the session on cpu"):
        binding.bind("x", StubDevice().wrap(ONES.copy()))


# --- opening ---------------------------------------------------------------------------------------------------


def _change(**changes: object) -> Callable[[GraphSpec], GraphSpec]:
    """A contract that asks for something else than the file `twice` has."""

    def change(graph: GraphSpec) -> GraphSpec:
        tensor = graph.inputs[0]
        values = {"name": tensor.name, "dtype": tensor.dtype, "dims": tensor.dims, **changes}
        return GraphSpec(graph.name, (TensorSpec(**values),), graph.outputs, graph.ranges)  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_change(name="image"), r"input 'image' is missing; input 'x' is not in the contract"),
        (_change(dtype="float16"), r"input 'x' is float32 instead of float16"),
        (_change(dims=("P", 4, 1)), r"input 'x' has rank 2 \['P', 4\] instead of 3"),
        (_change(dims=("P", 5)), r"input 'x' has 4 instead of 5 in dimension 1"),
        (_change(dims=("P", "N")), r"input 'x' has 4 instead of N in dimension 1"),
        (lambda g: GraphSpec("g", g.inputs, (*g.outputs, TensorSpec("q", "float32", (1,)))), r"output 'q' is missing"),
        (lambda g: GraphSpec("g", (), g.outputs), r"input 'x' is not in the contract"),
    ],
)
def test_a_graph_that_differs_is_refused(tmp_path: Path, change: Callable[[GraphSpec], GraphSpec], words: str) -> None:
    path, graph = twice(tmp_path)
    with pytest.raises(ContractError, match=words) as caught:
        opened(path, change(graph))
    assert "Export" in caught.value.action


def test_dimensions_left_open_by_the_file_fit_anything(tmp_path: Path) -> None:
    path, _ = twice(tmp_path, spec("open", dims=("P", "N")))
    binding = opened(path, spec("open", dims=(2, 4))).prepare()
    binding.write("x", ONES)
    binding.run()
    assert (binding.read("y") == 2).all()
    check_graph(spec(), {"x": ("tensor(float)", None)}, {"y": ("tensor(float)", [None, 4])})


def test_unknown_tensor_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"input 'x' is seq\(tensor\(float\)\) instead of float32"):
        check_graph(spec(), {"x": ("seq(tensor(float))", None)}, {"y": ("tensor(float)", ["P", 4])})


def test_output_of_another_shape_than_the_contract_fails_the_run(tmp_path: Path) -> None:
    graph = GraphSpec("g", (TensorSpec("x", "float32", ("P", 4)),), (TensorSpec("y", "float32", ("Q", 4)),))
    path = save(tmp_path / "g.onnx", [helper.make_node("Relu", ["x"], ["y"])], graph)
    binding = opened(path, graph).prepare({"P": 2, "Q": 3})
    with pytest.raises(DeviceError, match=r"'g' failed.*shape"):
        binding.run()


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no graph file"):
        opened(tmp_path / "none.onnx", spec())
    for name, data in (("empty", b""), ("text", b"hello world"), ("cut", twice(tmp_path)[0].read_bytes()[:-30])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DeviceError, match="cannot load graph 'twice'"):
            opened(tmp_path / name, spec())


def test_an_unknown_provider_is_an_error(tmp_path: Path) -> None:
    path, graph = twice(tmp_path)
    with pytest.raises(DeviceError, match=r"no MadeUpExecutionProvider, only \['"):
        opened(path, graph, provider="MadeUpExecutionProvider")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_did_not_load_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with missing CUDA libraries: compiled in, and the session silently runs on the CPU."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    path, graph = twice(tmp_path)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(DeviceError, match=r"CUDAExecutionProvider was asked for .* fell back to CPUExecution"):
        opened(path, graph, provider="CUDAExecutionProvider")


def test_stub_device_has_no_provider(tmp_path: Path) -> None:
    path, graph = twice(tmp_path)
    with pytest.raises(DeviceError, match="no provider for 'stub'"):
        open_session(path, graph, StubDevice())


def test_options(tmp_path: Path) -> None:
    path, graph = twice(tmp_path)
    with pytest.raises(DeviceError, match=r"no options \['spining'\]"):
        opened(path, graph, spining=True)
    with pytest.raises(DeviceError, match="Unknown optimization"):
        opened(path, graph, optimization="max")
    with pytest.raises(DeviceError, match="at least 1 thread"):
        open_session(path, graph, CPU, threads=0)
    with pytest.raises(DeviceError, match="Back end 'openvino' is not there"):
        open_session(path, graph, CPU, backend="openvino")
    session = opened(path, graph, optimization="none", arena=False, memory_pattern=True, spinning=True)
    binding = session.prepare({"P": 2})
    binding.write("x", ONES)
    binding.run()
    assert (binding.read("y") == 2).all()
    used = session._session.get_session_options()
    assert used.intra_op_num_threads == 1
    assert not used.enable_cpu_mem_arena
    assert used.enable_mem_pattern
    assert used.get_session_config_entry("session.intra_op.allow_spinning") == "1"


def test_defaults(tmp_path: Path) -> None:
    dynamic = opened(*twice(tmp_path))._session.get_session_options()
    static = opened(*twice(tmp_path, spec("static", dims=(2, 4))))._session.get_session_options()
    assert dynamic.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert dynamic.enable_cpu_mem_arena
    # A pattern's block comes on top of what the first run left in the arena: twice the memory, static or not.
    assert (dynamic.enable_mem_pattern, static.enable_mem_pattern) == (False, False)


def test_opening_gives_back_what_parsing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("pixano_edge.engine.runtime.ort._trim", lambda: calls.append("trim"))
    opened(*twice(tmp_path))
    assert calls == ["trim"]


def test_info(session: OrtSession) -> None:
    info = session.info()
    assert info["provider"] == info["providers"][0] == "CPUExecutionProvider"
    assert (info["backend"], info["threads"], info["device"]) == ("onnxruntime", 1, "cpu")
    assert "auto" in info["reason"]


def test_closed(session: OrtSession) -> None:
    binding = session.prepare({"P": 1})
    session.close()
    session.close()
    for call in (binding.run, session.info, lambda: session.prepare({"P": 1})):
        with pytest.raises(DeviceError, match="closed"):
            call()


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, graph = twice(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pixano-edge\[cpu\]'"):
        opened(path, graph)
    # What is left after uninstalling one of two wheels that overwrote each other.
    monkeypatch.setitem(sys.modules, "onnxruntime", type(sys)("onnxruntime"))
    with pytest.raises(DeviceError, match="incomplete"):
        opened(path, graph)


def test_importing_the_runtime_loads_no_back_end() -> None:
    code = (
        "import sys, pixano_edge.engine.runtime, pixano_edge.engine.bundle; "
        "sys.exit(any(m in sys.modules for m in ('onnxruntime', 'torch', 'transformers', 'onnx', 'cv2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert open_device("auto").name == "cpu"


@pytest.mark.parametrize("name", ["x", "y"])
def test_released_buffers_are_freed(session: OrtSession, name: str) -> None:
    """An idle binding must not keep the features of an evicted image, or a client's arrays, alive."""
    binding = session.prepare({"P": 2}, borrowed=(name,))
    array = np.ones((2, 4), np.float32)
    binding.bind(name, session.device.wrap(array))
    binding.run()
    gone = weakref.ref(array)
    del array
    gc.collect()
    assert gone() is not None  # control: while bound, it is kept
    binding.release(name)
    gc.collect()
    assert gone() is None
    with pytest.raises(ContractError, match="no memory"):
        binding.run()
    again = np.full((2, 4), 3, np.float32)
    binding.bind(name, session.device.wrap(again))
    if name == "y":
        binding.write("x", again)
    binding.run()
    assert (binding.read("y") == 6).all()
