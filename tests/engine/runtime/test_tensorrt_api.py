"""The real TensorRT for RTX: the names that we use are there, and what happens without an NVIDIA driver.

`tensorrt` itself (10.x, 11.x) has no wheel here; how its names differ is documented in `tensorrt_names` and not tested.
"""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.errors import DeviceError, DeviceMemoryError, MissingDependencyError
from pixano_edge.engine.runtime import tensorrt_api
from pixano_edge.engine.runtime.tensorrt import TrtSession
from pixano_edge.engine.runtime.tensorrt_api import TensorRt, load_tensorrt
from pixano_edge.engine.runtime.tensorrt_callbacks import make_allocator, make_logger, make_recorder
from pixano_edge.engine.runtime.tensorrt_names import CALLS, RTX_CALLS, SCRATCH_SIZE, first_of, missing_calls
from tests.engine.runtime import trt
from tests.engine.runtime.real_engines import build_double, build_project
from tests.support import fake_tensorrt
from tests.support.gpu_stub import GpuStub

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT for RTX is not installed"
)


@pytest.fixture(scope="module")
def real() -> Any:
    return load_tensorrt("tensorrt_rtx").module


@pytest.fixture(scope="module")
def double(real: Any) -> bytes:
    return build_double(TensorRt(real, "tensorrt_rtx"), "SM86")


@needs_rtx
def test_every_name_that_we_use_is_in_the_real_package(real: Any) -> None:
    assert missing_calls(real, CALLS) == []
    assert missing_calls(real, RTX_CALLS) == []
    assert missing_calls(real, {"ICudaEngine": ("no_such", ("neither", "nor"))}) == [
        "ICudaEngine.no_such",
        "ICudaEngine.neither/nor",
    ]


# Method -> names of its arguments, as the bindings' docstrings give them.
_ARGUMENTS = {
    "Runtime.__init__": ["logger"],
    "Runtime.deserialize_cuda_engine": ["serialized_engine"],
    "ICudaEngine.get_tensor_profile_shape": ["name", "profile_index"],
    "ICudaEngine.get_device_memory_size_for_profile_v2": ["profile_index"],
    "ICudaEngine.get_engine_stat": ["stat"],
    "ICudaEngine.create_execution_context": ["strategy"],
    "IExecutionContext.set_optimization_profile_async": ["profile_index", "stream_handle"],
    "IExecutionContext.set_device_memory": ["memory", "size"],
    "IExecutionContext.set_input_shape": ["name", "shape"],
    "IExecutionContext.set_tensor_address": ["name", "memory"],
    "IExecutionContext.set_output_allocator": ["name", "output_allocator"],
    "IExecutionContext.execute_async_v3": ["stream_handle"],
    "IExecutionContext.is_stream_capturable": ["stream"],
    "IRuntimeCache.deserialize": ["blob"],
    "IErrorRecorder.report_error": ["arg0", "arg1"],
}

_FAKES: dict[str, Any] = {
    "Runtime": fake_tensorrt.Runtime,
    "ICudaEngine": fake_tensorrt.RtxEngine,
    "IExecutionContext": fake_tensorrt.RtxContext,
    "IRuntimeCache": fake_tensorrt.RtxCache,
}


@needs_rtx
@pytest.mark.parametrize("method", _ARGUMENTS)
def test_arguments_of_the_real_methods_and_of_the_fake_ones(real: Any, method: str) -> None:
    owner, name = method.split(".")
    lines = (getattr(getattr(real, owner), name).__doc__ or "").splitlines()
    found = [line.strip() for line in lines if f"{name}(self" in line]
    inside = [line[line.index("(") + 1 : line.rindex(") ->")] for line in found]
    assert _ARGUMENTS[method] in [[part.split(":")[0].strip() for part in text.split(",")][1:] for text in inside]
    if owner in _FAKES and name != "__init__":
        assert list(inspect.signature(getattr(_FAKES[owner], name)).parameters)[1:] == _ARGUMENTS[method]


@needs_rtx
def test_the_engine_of_the_gpu_tests_builds(real: Any) -> None:
    api = TensorRt(real, "tensorrt_rtx")
    assert len(build_project(api, np.ones((8, 5), np.float32), "SM89")) > 1000


@needs_rtx
def test_callbacks_are_called_by_the_real_runtime(real: Any) -> None:
    errors: list[str] = []
    warnings: list[str] = []
    logger, recorder = make_logger(real, errors, warnings), make_recorder(real, errors)
    logger.log(real.ILogger.Severity.WARNING, " careful ")
    logger.log(real.ILogger.Severity.INFO, "never mind")
    assert warnings == ["careful"]
    runtime = real.Runtime(logger)
    runtime.error_recorder = recorder
    assert runtime.deserialize_cuda_engine(b"not an engine" * 20) is None
    assert recorder.num_errors() == len(errors) > 0
    assert recorder.get_error_code(0).name in real.ErrorCodeTRT.__members__
    assert recorder.get_error_desc(0) == errors[0]
    assert not recorder.has_overflowed()
    assert recorder.clear()
    assert (recorder.num_errors(), errors) == (0, [])
    seen: list[Any] = []
    allocator = make_allocator(real, lambda *a: seen.append(a) or 4096, lambda *a: seen.append(a))
    assert isinstance(allocator, real.IOutputAllocator)
    assert allocator.reallocate_output_async("y", 0, 64, 256, 7) == allocator.reallocate_output("y", 0, 64, 256) == 4096
    allocator.notify_shape("y", real.Dims((3, 4)))
    assert seen == [("y", 64, 256), ("y", 64, 256), ("y", (3, 4))]
    for name in ("reallocate_output", "reallocate_output_async", "notify_shape"):
        assert f"def {name}(self" in real.IOutputAllocator.__doc__


@needs_rtx
def test_a_broken_engine_is_a_clear_error_that_says_what_to_do() -> None:
    with pytest.raises(DeviceError, match=r"tensorrt_rtx 1\.\S+ cannot load graph 'broken': .*Serialization") as caught:
        load_tensorrt("tensorrt_rtx").open(b"x" * 1000, "broken")
    assert "pixano-edge" in caught.value.action


@needs_rtx
def test_a_good_engine_without_a_driver_is_a_clear_error(double: bytes) -> None:
    if _has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(DeviceError, match="CUDA driver version is insufficient") as caught:
        load_tensorrt("tensorrt_rtx").open(memoryview(double), "double")
    assert "doctor" in caught.value.action
    assert "recent driver" in caught.value.action
    device = GpuStub()
    with pytest.raises(DeviceError, match="cannot load graph 'fixed'"):
        TrtSession(double, trt.FIXED_SPEC, device, metadata={"flavour": "tensorrt_rtx"})
    assert device.calls == [], "nothing was allocated"


def _has_driver() -> bool:
    return (
        subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout.count("libcuda.so") > 0
    )


def test_what_is_not_installed_or_not_known() -> None:
    with pytest.raises(DeviceError, match="Known: tensorrt, tensorrt_rtx"):
        load_tensorrt("tensorrt_lean")
    if importlib.util.find_spec("tensorrt") is None and importlib.util.find_spec("tensorrt_bindings") is None:
        with pytest.raises(MissingDependencyError, match=r"pixano-edge\[tensorrt\]"):
            load_tensorrt("tensorrt")


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensorrt_api.importlib.util, "find_spec", lambda name: name == "tensorrt")
    monkeypatch.setattr(tensorrt_api.importlib, "import_module", broken)
    with pytest.raises(DeviceError, match="tensorrt is installed but does not load: libnvinfer"):
        load_tensorrt()


def test_releases() -> None:
    fake = trt.fake(GpuStub())
    for version in ("10.3.0", "10.16.1.2", "11.4.1"):
        fake.__version__ = version
        assert TensorRt(fake, "tensorrt").version == version
    fake.__version__ = "8.6.1"
    with pytest.raises(DeviceError, match=r"8\.6\.1 is not supported, only 10 and 11"):
        TensorRt(fake, "tensorrt")
    fake.__version__ = "10.3.0"
    del fake.IOutputAllocator
    fake.ICudaEngine = type("Engine", (fake.ICudaEngine,), {"num_io_tensors": None})
    with pytest.raises(DeviceError, match="has no IOutputAllocator"):
        TensorRt(fake, "tensorrt")


def test_renamed_calls_are_found() -> None:
    old = SimpleNamespace(get_device_memory_size_for_profile=lambda profile: 7)
    assert first_of(old, SCRATCH_SIZE)(0) == 7
    both = SimpleNamespace(get_device_memory_size_for_profile_v2=lambda profile: 8, **vars(old))
    assert first_of(both, SCRATCH_SIZE)(0) == 8
    assert missing_calls(SimpleNamespace(ICudaEngine=old), {"ICudaEngine": (SCRATCH_SIZE,)}) == []


@pytest.mark.parametrize(
    ("said", "kind", "action"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 123 bytes.)", DeviceMemoryError, "Unload"),
        ("(cudaError 2: out of memory)", DeviceMemoryError, "Unload"),
        ("CUDA initialization failure with error: 35 (cudaError 35: too old)", DeviceError, "driver"),
        ("The engine plan file is generated on an incompatible device, expecting compute 8.6", DeviceError, "build"),
        ("Version tag does not match", DeviceError, "build"),
    ],
)
def test_what_tensorrt_says_decides_the_advice(said: str, kind: type, action: str) -> None:
    device = GpuStub()
    fake = trt.fake(device, fixed=trt.fixed(fail={"load": said}))
    with pytest.raises(DeviceError, match="cannot load graph 'fixed'") as caught:
        trt.session(device, fake)
    assert type(caught.value) is kind
    assert said in caught.value.message
    assert action in caught.value.action


def test_importing_the_back_end_loads_no_tensorrt() -> None:
    code = (
        "import sys, pixano_edge.engine.runtime.tensorrt, pixano_edge.engine.runtime.factory\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in "
        "('tensorrt', 'tensorrt_rtx', 'tensorrt_rtx_bindings', 'tensorrt_rtx_libs', 'cuda', 'onnxruntime')]\n"
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
