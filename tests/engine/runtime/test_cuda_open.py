"""Opening CUDA devices by name, choosing the library, and what ``auto`` is."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pixano_edge.engine.errors import DeviceError, MissingDependencyError
from pixano_edge.engine.runtime import cuda_open, open_device
from pixano_edge.engine.runtime.cuda import CudaDevice
from pixano_edge.engine.runtime.pycuda import PycudaDevice
from tests.support.fake_cuda import FakeDriver, install_fake_cuda
from tests.support.fake_pycuda import install_fake_pycuda


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    monkeypatch.delenv(cuda_open.DRIVER_VARIABLE, raising=False)
    monkeypatch.setattr(cuda_open, "_installed", lambda module: module == "cuda.bindings")
    monkeypatch.setattr(cuda_open, "gpu_backends", lambda: ["onnxruntime"])
    return install_fake_cuda(monkeypatch, FakeDriver(count=2))


def test_by_name(driver: FakeDriver) -> None:
    assert [open_device(name).name for name in ("cuda", "cuda:0", "cuda:1")] == ["cuda:0", "cuda:0", "cuda:1"]
    assert type(open_device("cuda")) is CudaDevice
    assert open_device("cuda").stream != open_device("cuda").stream, "each device object has a stream of its own"
    with pytest.raises(DeviceError, match="no device 'cuda:2'"):
        open_device("cuda:2")
    for name in ("cuda:", "cuda:-1", "gpu", "cuda:0 ", ""):
        with pytest.raises(DeviceError, match=r"Unknown device.*cuda:N"):
            open_device(name)


def test_the_library_is_chosen(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_pycuda(monkeypatch, FakeDriver())
    assert type(open_device("cuda", driver="pycuda")) is PycudaDevice
    monkeypatch.setenv(cuda_open.DRIVER_VARIABLE, "pycuda")
    assert type(open_device("cuda")) is PycudaDevice
    assert type(open_device("cuda", driver="cuda-bindings")) is CudaDevice
    monkeypatch.setenv(cuda_open.DRIVER_VARIABLE, "numba")
    with pytest.raises(DeviceError, match=r"'numba' is no library.*PIXANO_EDGE_CUDA"):
        open_device("cuda")
    monkeypatch.delenv(cuda_open.DRIVER_VARIABLE)
    for there, chosen in (
        ({"cuda.bindings", "pycuda"}, "cuda-bindings"),
        ({"pycuda"}, "pycuda"),
        (set(), "cuda-bindings"),  # whose error then names the extra
    ):
        monkeypatch.setattr(cuda_open, "_installed", there.__contains__)
        assert cuda_open.choose_driver() == chosen


def test_auto_takes_the_gpu_and_says_why(driver: FakeDriver) -> None:
    device = open_device("auto")
    assert device.name == "cuda:0"
    assert device.info().extra["reason"] == "auto: cuda-bindings 13.5.0 works, onnxruntime can run on it"
    assert cuda_open.auto_device().gpus == ("cuda:0", "cuda:1")


@pytest.mark.parametrize("case", ["no library", "no driver", "no back end", "no context"])
def test_auto_takes_the_cpu_and_says_why(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    if case == "no library":
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    elif case == "no driver":
        driver.fail["cuInit"] = "CUDA_ERROR_NO_DEVICE"
    elif case == "no back end":
        monkeypatch.setattr(cuda_open, "gpu_backends", list)
    else:
        driver.fail["cuDevicePrimaryCtxRetain"] = "CUDA_ERROR_OUT_OF_MEMORY"
    words = {
        "no library": "needs the Python module 'cuda.bindings'",
        "no driver": "CUDA_ERROR_NO_DEVICE",
        "no back end": "no back end for GPUs is installed",
        "no context": "cuda:0 does not open: cuDevicePrimaryCtxRetain",
    }
    device = open_device("auto")
    assert device.name == "cpu"
    assert words[case] in device.info().extra["reason"]


def test_a_named_gpu_is_never_replaced_by_the_cpu(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MissingDependencyError, match=r"pixano-edge\[cuda\]"):
        open_device("cuda:0")


@pytest.mark.parametrize(
    ("providers", "modules", "found"),
    [
        (["CPUExecutionProvider"], set(), []),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], set(), ["onnxruntime"]),
        (["CPUExecutionProvider"], {"tensorrt"}, ["tensorrt"]),
        (["TensorrtExecutionProvider"], {"tensorrt_rtx"}, ["onnxruntime", "tensorrt"]),
    ],
)
def test_back_ends_for_gpus(
    monkeypatch: pytest.MonkeyPatch, providers: list[str], modules: set[str], found: list[str]
) -> None:
    stub = SimpleNamespace(get_available_providers=lambda: providers)
    monkeypatch.setattr(cuda_open, "load_onnxruntime", lambda: stub)
    monkeypatch.setattr(cuda_open, "_installed", modules.__contains__)
    assert cuda_open.gpu_backends() == found

    def absent() -> Any:
        raise MissingDependencyError("onnxruntime", "cpu", "x")

    monkeypatch.setattr(cuda_open, "load_onnxruntime", absent)
    assert cuda_open.gpu_backends() == [name for name in found if name == "tensorrt"]


def test_what_counts_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_open._installed("numpy")
    assert not cuda_open._installed("no_such_package.inner")
    monkeypatch.setitem(sys.modules, "stand_in", ModuleType("stand_in"))
    assert not cuda_open._installed("stand_in")
