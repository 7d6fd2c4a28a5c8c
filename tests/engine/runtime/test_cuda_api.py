"""The calls against the real packages: names, argument counts, enum numbers, and a libcuda of our own behind them."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixano_edge.engine.errors import DeviceError, MissingDependencyError
from pixano_edge.engine.runtime import cuda_api, gpu_info
from pixano_edge.engine.runtime.cuda import CudaDevice
from pixano_edge.engine.runtime.cuda_calls import CudaError, long_pci
from tests.support.fake_cuda import ATTRIBUTES, CODES, FakeDriver, install_fake_cuda

driver: Any = pytest.importorskip("cuda.bindings.driver")
SOURCE = ast.parse(Path(str(cuda_api.__file__)).read_text())
SUPPORT = Path(__file__).resolve().parents[2] / "support"


def used_calls() -> dict[str, int]:
    """Driver functions that `BindingsApi` calls, with the number of arguments."""
    found = {}
    for node in ast.walk(SOURCE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_call":
            function, *arguments = node.args
            if isinstance(function, ast.Attribute):
                found[function.attr] = len(arguments)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr[:2] in ("cu", "CU"):
            found[node.func.attr] = len(node.args)
    return found


def used_names() -> set[str]:
    """Every attribute that looks like the driver's."""
    return {n.attr for n in ast.walk(SOURCE) if isinstance(n, ast.Attribute) and re.match(r"cu[A-Z]|CU", n.attr)}


def parameters(name: str) -> list[str]:
    """Parameter names of a real function: from the first line of its docstring, where Cython puts them."""
    line = (getattr(driver, name).__doc__ or "").split("\n")[0]
    text = re.fullmatch(rf"{name}\((.*)\)", line)
    assert text, f"no signature in the docstring of {name}: {line!r}"
    return [part.split(":")[0].split("=")[0].split()[-1] for part in re.split(r",\s*(?![^\[]*\])", text[1]) if part]


CALLS = used_calls()


def test_the_scan_finds_the_calls() -> None:
    assert len(CALLS) > 40
    assert CALLS["cuMemcpyAsync"] == 4


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_call_exists_with_these_arguments(name: str) -> None:
    function = getattr(driver, name)
    if isinstance(function, type):  # CUstream(number)
        return
    names = parameters(name)
    required = len(names) - (function.__doc__ or "").split("\n")[0].count("=")
    assert required <= CALLS[name] <= len(names)
    fake = list(inspect.signature(getattr(FakeDriver, name)).parameters)[1:]
    assert fake == names, "the stand-in takes other arguments than the real function"


def test_names_and_numbers_are_the_real_ones() -> None:
    enums = {
        enum: getattr(driver, enum)
        for enum in (
            "CUstream_flags",
            "CUevent_flags",
            "CUstreamCaptureMode",
            "CUgraphNodeType",
            "CUmemorytype",
            "CUpointer_attribute",
        )
    }
    for name in used_names():
        if hasattr(driver, name):
            continue
        owner = next((e for e in enums.values() if hasattr(e, name)), None)
        assert owner is not None, f"cuda.bindings.driver has no {name}"
    for enum, real in enums.items():
        for name, number in vars(getattr(FakeDriver, enum)).items():
            assert int(getattr(real, name)) == number
    for name in vars(FakeDriver):
        if name.startswith("CU_"):
            assert getattr(driver, name) == getattr(FakeDriver, name)
    for name, number in CODES.items():
        assert int(getattr(driver.CUresult, name)) == number
    for name in ATTRIBUTES:
        assert hasattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    asked = {n.args[0].value for n in ast.walk(SOURCE) if _asks_attribute(n)}  # type: ignore[attr-defined]
    assert asked == set(ATTRIBUTES)


def _asks_attribute(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_attribute"


def test_error_codes_that_are_treated_apart_exist() -> None:
    calls = importlib.import_module("pixano_edge.engine.runtime.cuda_calls")
    for name in (*calls._LOST, *calls.OUT_OF_MEMORY, *calls.ENDING):
        assert hasattr(driver.CUresult, name), name


def test_cuda_core_takes_the_device_as_a_stream() -> None:
    protocol = importlib.import_module("cuda.core.typing").IsStreamType
    wanted = [name for name in vars(protocol) if name.startswith("__cuda")]
    assert wanted == ["__cuda_stream__"]
    assert callable(CudaDevice.__cuda_stream__)


def test_nvml_has_what_is_asked() -> None:
    nvml = importlib.import_module("pynvml")
    text = Path(str(gpu_info.__file__)).read_text()
    names = set(re.findall(r"nvml\.([nN]\w+)", text))
    assert len(names) > 12
    assert not [name for name in names if not hasattr(nvml, name)]
    for name in ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetPciInfo"):
        assert list(inspect.signature(getattr(nvml, name)).parameters) == ["handle"]
    assert list(inspect.signature(nvml.nvmlDeviceGetTemperature).parameters) == ["handle", "sensor"]


SCRIPT = """
import gc
import os
import sys
import numpy as np
from pixano_edge.engine.errors import ContractError, DeviceError, DeviceMemoryError
from pixano_edge.engine.runtime.cuda import CudaDevice
from pixano_edge.engine.runtime.cuda_api import BindingsApi

device, other = CudaDevice(1), CudaDevice(0)
info = device.info()
assert (info.name, info.compute_capability, info.memory_free, info.runtime) == ("Fake 1", "8.9", 12345, "CUDA 13.5")
assert info.extra["uuid"] == "GPU-abababab-abab-abab-abab-abababababab" and info.extra["pci"] == "00000000:a1:00.0"
data = np.arange(4, dtype=np.float32)
buffer, host = device.empty((4,), "float32"), device.host_empty((4,), "float32")
for _ in range(2):
    device.upload(buffer, data)
device.copy(host, buffer)
assert (device.download(buffer) == data).all() and (host.array == data).all()
assert device.elapsed(device.record(timed=True), device.record(timed=True)) == 2.5
mark = other.record()
device.wait(mark)
other.wait_on_host(mark)
graph = device.capture(lambda: device.copy(host, buffer))
graph.replay()
graph.close()

def refused(kind, call):
    try:
        call()
    except kind as error:
        return error.message
    raise AssertionError(call)

refused(DeviceError, lambda: device.capture(lambda: None))
os.environ["FAKE_LIBCUDA_HOST_NODE"] = "1"  # the library says that a graph's second node is a call of a host function
assert "on the host" in refused(DeviceError, lambda: device.capture(lambda: [device.copy(host, buffer) for _ in "ab"]))
device.capture(lambda: device.copy(host, buffer)).close()
del os.environ["FAKE_LIBCUDA_HOST_NODE"]
os.environ["FAKE_LIBCUDA_HOST_COPY"] = "1"  # and now that copies read host memory
copies = lambda: device.copy(host, buffer)
assert "out of host memory" in refused(DeviceError, lambda: device.capture(copies, host_copies=False))
del os.environ["FAKE_LIBCUDA_HOST_COPY"]
device.capture(copies, host_copies=False).close()
refused(DeviceMemoryError, lambda: device.empty((1 << 22,), "uint8"))

class Foreign:
    def __init__(self, pointer, stream):
        self.__cuda_array_interface__ = {
            "version": 3, "shape": (4,), "typestr": "<f4", "data": (pointer, False), "stream": stream}

assert other.wrap(Foreign(buffer.pointer, 7)).pointer == buffer.pointer
assert "cuda:0" in refused(ContractError, lambda: device.wrap(Foreign(buffer.pointer, None)))
assert "does not know" in refused(ContractError, lambda: device.wrap(Foreign(64, None)))
api = BindingsApi()
context = api.retain(0)
api.push(context)
assert api.host_register(data.ctypes.data, 16) == data.ctypes.data
api.host_unregister(data.ctypes.data)
api.pop(context)
api.release(0, context)
number = device.stream
print(number)
if sys.argv[1:] == ["leave"]:  # everything is open when the process ends
    graph = device.capture(lambda: device.copy(host, buffer))
    sys.exit(0)
device.close()
other.close()
del device, other, buffer, host, graph, mark
gc.collect()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a libcuda.so.1 made from a small C file that notes its calls."""
    folder = tmp_path_factory.mktemp("libcuda")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and Linux")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", SUPPORT / "fake_libcuda.c"], check=True
    )
    return folder


def run_script(library: Path, log: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `SCRIPT` with the real cuda-bindings on the library."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "FAKE_LIBCUDA_LOG": str(log)}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_end_of_the_process_is_quiet(library: Path, tmp_path: Path) -> None:
    done = run_script(library, tmp_path / "log", "leave")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_real_bindings_take_every_argument(library: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run_script(library, log)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "something could not be freed"
    lines = [line.split() for line in log.read_text().splitlines()]
    count = SimpleNamespace(**{name: sum(line[0] == name for line in lines) for name in {line[0] for line in lines}})
    for made, freed in (
        ("retain", "release"),
        ("alloc", "free"),
        ("host_alloc", "host_free"),
        ("register", "unregister"),
        ("stream", "stream_destroy"),
        ("event", "event_destroy"),
        ("instantiate", "executable_destroy"),
    ):
        assert getattr(count, made) == getattr(count, freed) > 0, (made, freed)
    assert count.end == count.graph_destroy == 6
    stream = done.stdout.strip()
    assert ["stream", stream, "1", "0"] in lines, "a non-blocking stream"
    assert ["begin", stream, "1", "0"] in lines, "thread-local recording"
    assert all(line[2] not in ("0", "1", "2") for line in lines if line[0] in ("copy", "launch")), "a default stream"
    assert {line[2] for line in lines if line[0] == "host_alloc"} == {"3"}, "portable and mapped"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MissingDependencyError, match=r"pixano-edge\[cuda\]"):
        cuda_api.BindingsApi()


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install_fake_cuda(monkeypatch, FakeDriver())
    api = cuda_api.BindingsApi()

    def missing(*_: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    missing.__name__ = "cuInit"
    monkeypatch.setattr(fake, "cuInit", missing)
    with pytest.raises(DeviceError, match="No NVIDIA driver: Failed to dlopen"):
        cuda_api.BindingsApi()
    monkeypatch.setattr(fake, "cuDeviceGetCount", missing)  # a driver that is older than the function
    with pytest.raises(CudaError, match="CUDA_ERROR_NOT_FOUND"):
        api.count()
    install_fake_cuda(monkeypatch, FakeDriver(count=0))
    with pytest.raises(DeviceError, match="CUDA_ERROR_NO_DEVICE"):
        cuda_api.BindingsApi()


def test_a_driver_that_is_too_old_for_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_cuda(monkeypatch, FakeDriver(cuda=12060), version="13.2.0")
    with pytest.raises(DeviceError, match=r"up to 12.6, cuda-bindings 13.2.0 .*'cuda-bindings<13'"):
        cuda_api.BindingsApi()
    install_fake_cuda(monkeypatch, FakeDriver(cuda=12060), version="12.9.10")
    assert cuda_api.BindingsApi().facts(0).cuda == "12.6"  # JetPack 6


def test_words_of_errors() -> None:
    assert "start the process again" in CudaError("cuX", "CUDA_ERROR_ILLEGAL_ADDRESS").action
    assert "without graph capture" in CudaError("cuX", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED").action
    assert str(CudaError("cuX", "CUDA_ERROR_INVALID_VALUE", "bad")).startswith(
        "cuX failed: CUDA_ERROR_INVALID_VALUE (bad)."
    )
    assert long_pci("0000:0A:00.0") == long_pci("00000000:0A:00.0") == "00000000:0a:00.0"
