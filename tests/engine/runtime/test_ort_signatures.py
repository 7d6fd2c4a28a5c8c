"""Every name and parameter of the real ONNX Runtime that our code and its stand-in use exists there."""

from __future__ import annotations

import inspect
import re
from typing import Any

import onnxruntime
import pytest

from tests.support import fake_ort

C = onnxruntime.capi.onnxruntime_pybind11_state


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", ["bind_input", "bind_output"])
def test_bindings_take_what_the_stand_in_takes(name: str) -> None:
    real, fake = getattr(onnxruntime.IOBinding, name), getattr(fake_ort.FakeIOBinding, name)
    assert _parameters(real) == _parameters(fake)


@pytest.mark.parametrize("name", ["bind_ortvalue_input", "bind_ortvalue_output"])
def test_bindings_of_values(name: str) -> None:
    assert _parameters(getattr(onnxruntime.IOBinding, name)) == ["name", "ortvalue"]


def test_sessions() -> None:
    real, fake = onnxruntime.InferenceSession, fake_ort.TellingSession
    for name in ("__init__", "run_with_iobinding"):
        assert _parameters(getattr(real, name)) == _parameters(getattr(fake, name)), name
    used = [name for name, value in vars(fake).items() if inspect.isfunction(value) and not name.startswith("_")] + [
        name for name, value in vars(fake_ort.FakeSession).items() if inspect.isfunction(value) and name[0] != "_"
    ]
    assert len(used) > 7
    for name in used:
        assert callable(getattr(real, name)), name
    for name in ("enable_fallback", "disabled_optimizers"):
        assert name in inspect.getsource(real.__init__)


def test_options() -> None:
    options = onnxruntime.SessionOptions()
    for name in vars(fake_ort.FakeSessionOptions()):
        if name not in ("entries", "devices", "device_options"):
            getattr(options, name)
    for kind, fake in (
        (onnxruntime.SessionOptions, fake_ort.FakeSessionOptions),
        (onnxruntime.RunOptions, fake_ort.FakeRunOptions),
    ):
        for name in (n for n, v in vars(fake).items() if inspect.isfunction(v) and n[0] != "_"):
            assert callable(getattr(kind, name)), name
    run = onnxruntime.RunOptions()
    run.add_run_config_entry("gpu_graph_id", "-1")
    assert run.get_run_config_entry("gpu_graph_id") == "-1"
    assert onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    for level in ("ORT_ENABLE_ALL", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_BASIC", "ORT_DISABLE_ALL"):
        assert getattr(onnxruntime.GraphOptimizationLevel, level) is not None


def test_module() -> None:
    device = fake_ort.OrtGpu()
    fake = fake_ort.FakeOrt(fake_ort.GraphSpec("g", (), ()), device, lambda inputs: {})
    names = [n for n, v in vars(type(fake)).items() if inspect.isfunction(v) and n[0] != "_"]
    assert set(names) == {
        "get_available_providers",
        "get_ep_devices",
        "preload_dlls",
        "register_execution_provider_library",
        "set_default_logger_severity",
    }
    for name in names:
        assert callable(getattr(onnxruntime, name)), name
    assert _parameters(onnxruntime.preload_dlls) == _parameters(fake_ort.FakeOrt.preload_dlls)
    # pybind functions have no signature but a first line of documentation.
    for function, kinds in (
        (C.register_execution_provider_library, ["str", "str"]),
        (C.SessionOptions.add_provider_for_devices, ["OrtEpDevice", "str, str"]),
        (C.RunOptions.add_run_config_entry, ["str", "str"]),
    ):
        assert re.search(".*".join(kinds), function.__doc__.replace("\n", " ")), function.__doc__


def test_devices_of_plugins() -> None:
    device = onnxruntime.get_ep_devices()[0]  # the CPU's, always there
    assert device.ep_name == fake_ort.CPU
    assert isinstance(device.ep_metadata, dict)
    assert isinstance(device.ep_options, dict)
    assert device.device.type.name == "CPU"
    assert {"CPU", "GPU"} <= set(C.OrtHardwareDeviceType.__members__)
    assert {"ep_name", "get_nodes"} <= set(dir(C.OrtEpAssignedSubgraph))
    assert "op_type" in dir(C.OrtEpAssignedNode)
    assert "name" in dir(C.OrtMemoryInfo)


def test_a_cuda_address_is_bound_to_the_nvidia_device() -> None:
    """`IOBinding.bind_input` makes this device from the name; without the vendor, ONNX Runtime would copy."""
    made = onnxruntime.OrtDevice.make("cuda", 1)
    assert (made.device_id(), made.device_vendor_id()) == (1, 0x10DE)


def test_config_entries_exist_in_the_library() -> None:
    """The library ignores entries that it does not know, so a renamed one would change nothing and say nothing."""
    from pathlib import Path

    entries = [
        b"session.record_ep_graph_assignment_info",
        b"session.disable_cpu_ep_fallback",
        b"session.intra_op.allow_spinning",
        b"disable_synchronize_execution_providers",
        b"gpu_graph_id",
    ]
    folder = Path(onnxruntime.__file__).parent / "capi"
    library = next(folder.glob("onnxruntime_pybind11_state*.so")).read_bytes()
    # Where the compiler writes a string as immediates, long names are split: look for their ends too.
    for entry in entries:
        assert entry in library or entry[-20:] in library, entry
