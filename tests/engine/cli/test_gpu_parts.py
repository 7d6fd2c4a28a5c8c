"""`doctor` on a GPU box: each part, whether it really loads, and the command that fixes what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.cli import gpu_parts as module
from pixano_edge.engine.cli.gpu_parts import (
    CUDA,
    LIBNVINFER,
    NVML,
    PYCUDA,
    TENSORRT,
    TENSORRT_RTX,
    GpuPart,
    driver_cuda,
    gpu_part_findings,
    gpu_parts,
    try_apart,
    try_here,
)
from pixano_edge.engine.cli.libraries import Finding
from pixano_edge.engine.cli.probe import ProviderState

CUDA_12, CUDA_13 = {"name": "A GPU", "runtime": "CUDA 12.6"}, {"name": "A GPU", "runtime": "CUDA 13.2"}
LOADS = [ProviderState("CUDAExecutionProvider", True)]
ABSENT = {name: GpuPart(name, None) for name in (CUDA, PYCUDA, NVML, TENSORRT, TENSORRT_RTX, LIBNVINFER)}
WHOLE = {
    **ABSENT,
    CUDA: GpuPart(CUDA, "13.5.0", True),
    NVML: GpuPart(NVML, "13.6"),
    TENSORRT: GpuPart(TENSORRT, "10.16.1", True),
}


def findings(parts: dict[str, GpuPart], **kwargs: Any) -> list[Finding]:
    given: dict[str, Any] = {
        "providers": LOADS,
        "gpus": [CUDA_13],
        "jetson": False,
        "version_of": {"onnxruntime-gpu": "1.31.1"}.get,
        "python": (3, 12),
        "machine": "x86_64",
        **kwargs,
    }
    return gpu_part_findings(list(parts.values()), **given)


def only(parts: dict[str, GpuPart], **kwargs: Any) -> Finding:
    (finding,) = findings(parts, **kwargs)
    return finding


def test_a_whole_box_has_nothing_to_fix_and_a_cpu_box_nothing_to_miss() -> None:
    assert findings(WHOLE) == []
    assert findings(ABSENT, gpus=[], providers=[]) == []


def test_parts_are_named_with_version_and_tried_once_installed() -> None:
    tried: list[str] = []

    def attempt(what: str) -> tuple[bool, str]:
        tried.append(what)
        return what != "tensorrt_rtx", "said"

    versions = {"cuda-bindings": "13.5.0", "nvidia-ml-py": "13.6"}
    parts = {p.name: p for p in gpu_parts(versions.get, attempt)}
    assert set(parts) == set(ABSENT)
    assert parts[CUDA].state == "13.5.0, loads"
    assert parts[NVML].state == "13.6"
    assert "cuda-bindings" in tried
    assert ("pycuda" in tried) == (parts[PYCUDA].version is not None)
    assert gpu_parts({}.get, attempt)[0].state == "absent"


def test_missing_cuda_library_names_the_major_of_the_driver() -> None:
    nothing = {**WHOLE, CUDA: GpuPart(CUDA, None)}
    assert only(nothing).action == "pip install 'cuda-bindings==13.*'"
    assert only(nothing, gpus=[{"name": "?"}]).action == "pip install cuda-bindings"
    assert findings({**nothing, PYCUDA: GpuPart(PYCUDA, "2026.1", True)}) == []
    broken = only({**WHOLE, CUDA: GpuPart(CUDA, "13.5.0", False, "no driver")}, gpus=[CUDA_12])
    assert "no driver" in broken.message
    assert broken.action == "pip install 'cuda-bindings==12.*'"


def test_bindings_newer_than_the_driver_are_noted() -> None:
    found = [f for f in findings(WHOLE, gpus=[CUDA_12]) if "newer CUDA" in f.message]
    assert [f.level for f in found] == ["note"]


@pytest.mark.parametrize(
    ("gpu", "machine", "python", "action"),
    [
        (CUDA_13, "x86_64", (3, 12), "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        (CUDA_12, "x86_64", (3, 12), "pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'"),
        (CUDA_12, "aarch64", (3, 10), "docs/gpu.md"),
        (CUDA_12, "aarch64", (3, 12), "docs/gpu.md"),
        (CUDA_13, "aarch64", (3, 12), "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
    ],
)
def test_onnx_runtime_without_cuda(gpu: dict[str, str], machine: str, python: tuple[int, int], action: str) -> None:
    cpu = [ProviderState("CPUExecutionProvider", True)]
    found = findings(WHOLE, gpus=[gpu], providers=cpu, version_of={}.get, machine=machine, python=python)
    (finding,) = [f for f in found if "ONNX Runtime" in f.message]
    assert finding.level == "warning"
    assert action in finding.action


def test_a_provider_that_does_not_load_gets_the_wheel_that_fits() -> None:
    state = [ProviderState("CUDAExecutionProvider", False, "libcublasLt.so.13: cannot open shared object file")]
    found = [f for f in findings(WHOLE, gpus=[CUDA_12], providers=state) if "ONNX Runtime" in f.message]
    assert "made for CUDA 13, the driver offers 12" in found[0].message
    assert found[0].action == "pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'"
    # A driver for CUDA 13 runs a wheel for CUDA 12: what is missing are the libraries.
    old = only(WHOLE, providers=state, version_of={"onnxruntime-gpu": "1.26.0"}.get)
    assert old.action == "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    kernel = [ProviderState("CUDAExecutionProvider", False, "cudaErrorNoKernelImageForDevice: no kernel image is")]
    assert "no code for the Jetson" in only(WHOLE, providers=kernel, jetson=True).action


def test_tensorrt() -> None:
    without = {**WHOLE, TENSORRT: GpuPart(TENSORRT, None)}
    assert only(without).action == "pip install tensorrt-cu13"
    assert [f.action for f in findings(without, gpus=[CUDA_12])][-1] == "pip install tensorrt-cu12"
    for parts, jetson in ((without, True), ({**without, LIBNVINFER: GpuPart(LIBNVINFER, "libnvinfer.so.10")}, False)):
        assert "--system-site-packages" in only(parts, jetson=jetson).action
    broken = only({**WHOLE, TENSORRT: GpuPart(TENSORRT, "10.1", False, "no libnvinfer")})
    assert "no libnvinfer" in broken.message
    assert findings({**without, TENSORRT_RTX: GpuPart(TENSORRT_RTX, "1.7", True)}) == []


def test_nvml_is_asked_for_where_it_knows_more() -> None:
    without = {**WHOLE, NVML: GpuPart(NVML, None)}
    assert only(without).action == "pip install nvidia-ml-py"
    assert findings(without, jetson=True) == []


def test_driver_cuda() -> None:
    assert driver_cuda([{"runtime": None}, CUDA_12]) == 12
    assert driver_cuda([{"runtime": "something"}]) is None


def test_trying_says_why_it_failed() -> None:
    works, said = try_here("tensorrt")
    assert works or "tensorrt" in said.lower()
    works, said = try_apart("cuda-bindings")
    assert works or said
    works, said = try_apart("no-such-part")
    assert not works
    assert "no-such-part" in said


def test_a_child_that_dies_or_hangs_is_no_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'Segmentation fault' >&2\nexit 139\n")
    script.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(script))
    assert try_apart("tensorrt") == (False, "the try ended with code 139. Segmentation fault")
    script.write_text("#!/bin/sh\nexec sleep 20\n")
    assert try_apart("tensorrt", timeout=0.5) == (False, "no answer within 0 s")
