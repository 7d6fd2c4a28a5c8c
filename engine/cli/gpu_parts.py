"""What `doctor` says about a GPU box beyond ONNX Runtime: CUDA for Python, NVML, pycuda, TensorRT, and what to install.

TensorRT and the CUDA libraries are tried in a child process each, so that a broken driver cannot end `doctor`.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from ctypes.util import find_library
from dataclasses import dataclass
from typing import Any

import typer

from ..errors import EdgeError
from ..libraries import Versions, installed_version, module_version
from .libraries import Finding
from .probe import ProviderState

TIMEOUT_SECONDS = 60.0
DOCS = "docs/gpu.md"

ORT_CUDA_13 = (1, 27)
"""First onnxruntime-gpu whose wheels are made for CUDA 13 (their metadata asks for nvidia-cuda-runtime ~=13.0)."""

CUDA, PYCUDA, NVML, TENSORRT, TENSORRT_RTX, LIBNVINFER = (
    "CUDA for Python (cuda-bindings)",
    "CUDA for Python (pycuda)",
    "NVML (nvidia-ml-py)",
    "TensorRT (Python)",
    "TensorRT for RTX (Python)",
    "libnvinfer (system)",
)
_TRIED = {CUDA: "cuda-bindings", PYCUDA: "pycuda", TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}


@dataclass(frozen=True)
class GpuPart:
    """One part of the software for a GPU.

    Attributes:
        name: Which.
        version: What is installed; None where it is absent.
        works: Whether it loaded and answered; None where it was not tried.
        reason: Why not, or what it said.
    """

    name: str
    version: str | None
    works: bool | None = None
    reason: str = ""

    @property
    def state(self) -> str:
        """For the table."""
        if self.version is None:
            return "absent"
        return self.version + {True: ", loads", False: ", does not work", None: ""}[self.works]


Try = Callable[[str], tuple[bool, str]]


def gpu_parts(version_of: Versions = installed_version, attempt: Try | None = None) -> list[GpuPart]:
    """Every part, the absent ones included.

    Args:
        version_of: Version of an installed wheel.
        attempt: Tries ``cuda-bindings``, ``pycuda``, ``tensorrt`` or ``tensorrt_rtx``; in a child process by default.
    """
    attempt = attempt or try_apart
    versions = {
        CUDA: version_of("cuda-bindings"),
        PYCUDA: module_version("pycuda", ("pycuda",), version_of),
        NVML: version_of("nvidia-ml-py"),
        TENSORRT: _module("tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), version_of)
        or _module("tensorrt_bindings", ("tensorrt-cu13-bindings", "tensorrt-cu12-bindings"), version_of),
        TENSORRT_RTX: _module("tensorrt_rtx", ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"), version_of)
        or _module("tensorrt_rtx_bindings", ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"), version_of),
        LIBNVINFER: find_library("nvinfer"),
    }
    parts = []
    for name, version in versions.items():
        works, reason = attempt(_TRIED[name]) if version and name in _TRIED else (None, "")
        parts.append(GpuPart(name, version, works, reason))
    return parts


def _module(module: str, wheels: Sequence[str], version_of: Versions) -> str | None:
    return module_version(module, wheels, version_of)


def gpu_part_findings(
    parts: Sequence[GpuPart],
    providers: Sequence[ProviderState],
    gpus: Sequence[Mapping[str, Any]],
    jetson: bool,
    version_of: Versions = installed_version,
    python: tuple[int, int] = sys.version_info[:2],
    machine: str = platform.machine(),
) -> list[Finding]:
    """What is missing on a machine with a GPU and the command that brings it; nothing on one without.

    Args:
        parts: From `gpu_parts`.
        providers: ONNX Runtime's, as tried.
        gpus: As in server info.
        jetson: Whether this is a Jetson.
        version_of: Version of an installed wheel.
        python: Version of Python.
        machine: Architecture.
    """
    if not gpus and not jetson:
        return []
    by_name = {part.name: part for part in parts}
    major = driver_cuda(gpus)
    findings = _cuda_findings(by_name, major)
    if by_name[NVML].version is None and not jetson:
        findings.append(
            Finding("warning", "Load, temperature and power are unknown without NVML.", "pip install nvidia-ml-py")
        )
    if not any(p.name == "CUDAExecutionProvider" and p.loads for p in providers):
        findings.append(_onnxruntime_finding(providers, major, version_of, python, machine, jetson))
    findings += _tensorrt_findings(by_name, major, jetson)
    return findings


def driver_cuda(gpus: Sequence[Mapping[str, Any]]) -> int | None:
    """CUDA major that the driver offers, from ``runtime`` such as ``CUDA 12.6``; None where nothing tells."""
    found = (re.match(r"CUDA (\d+)", str(gpu.get("runtime") or "")) for gpu in gpus)
    return next((int(match[1]) for match in found if match), None)


def _cuda_findings(parts: Mapping[str, GpuPart], major: int | None) -> list[Finding]:
    bindings, pycuda = parts[CUDA], parts[PYCUDA]
    pin = f"'cuda-bindings=={major}.*'" if major is not None else "cuda-bindings"
    if bindings.version is None and pycuda.version is None:
        return [Finding("warning", "No library for CUDA calls is installed, so no GPU is used.", f"pip install {pin}")]
    findings = [
        Finding("warning", f"{part.name} {part.version} does not work: {part.reason}", f"pip install {pin}")
        for part in (bindings, pycuda)
        if part.works is False
    ]
    installed = re.match(r"\d+", bindings.version or "")
    if major is not None and installed and int(installed[0]) > major and bindings.works is not False:
        findings.append(
            Finding(
                "note",
                f"cuda-bindings {installed[0]}.x is made for a newer CUDA than this driver's ({major}.x).",
                f"If CUDA calls fail: pip install {pin}",
            )
        )
    return findings


def _onnxruntime_finding(
    providers: Sequence[ProviderState],
    major: int | None,
    version_of: Versions,
    python: tuple[int, int],
    machine: str,
    jetson: bool,
) -> Finding:
    """Why ONNX Runtime does not use the GPU. TensorRT serves without it, so this is no more than a warning."""
    installed = version_of("onnxruntime-gpu")
    state = next((p for p in providers if p.name == "CUDAExecutionProvider"), None)
    numbers = tuple(int(n) for n in re.findall(r"\d+", installed or "")[:2])
    needs = 13 if numbers >= ORT_CUDA_13 else 12
    if state is None:
        message = "ONNX Runtime has no CUDA provider here; graphs run on the GPU through TensorRT only."
        if machine == "aarch64" and (python < (3, 11) or major == 12):
            return Finding("warning", message, f"PyPI has no wheel for this machine; {DOCS} says where one comes from.")
        pin = "'onnxruntime-gpu[cuda,cudnn]<1.27'" if major == 12 else "'onnxruntime-gpu[cuda,cudnn]'"
        return Finding("warning", message, f"pip uninstall -y onnxruntime && pip install {pin}")
    message = f"ONNX Runtime's CUDA provider does not load: {state.reason}"
    if "no kernel image" in state.reason:
        what = "Jetson" if jetson else "GPU"
        return Finding("warning", message, f"This wheel has no code for the {what}; {DOCS} says which one has.")
    if installed and major is not None and needs != major:
        pin = "<1.27" if major == 12 else ">=1.27"
        message += f" It is made for CUDA {needs}, the driver offers {major}."
        if needs > major:
            return Finding("warning", message, f"pip install 'onnxruntime-gpu[cuda,cudnn]{pin}'")
    return Finding("warning", message, "pip install 'onnxruntime-gpu[cuda,cudnn]'" if installed else "")


def _tensorrt_findings(parts: Mapping[str, GpuPart], major: int | None, jetson: bool) -> list[Finding]:
    flavours = [parts[TENSORRT], parts[TENSORRT_RTX]]
    findings = [
        Finding(
            "warning",
            f"{part.name} {part.version} is installed but does not load: {part.reason}",
            f"{DOCS} has the versions that fit together.",
        )
        for part in flavours
        if part.works is False
    ]
    if any(part.version for part in flavours):
        return findings
    if jetson or parts[LIBNVINFER].version:
        text = "TensorRT is on this system, but this Python does not see it."
        if parts[LIBNVINFER].version is None:
            text = "TensorRT is not seen by this Python; JetPack brings it."
        action = "python3 -m venv --system-site-packages .venv (JetPack: sudo apt install python3-libnvinfer)"
        return [*findings, Finding("note", text, action)]
    wheel = f"tensorrt-cu{major}" if major in (12, 13) else "tensorrt"
    return [*findings, Finding("note", "TensorRT is not installed.", f"pip install {wheel}")]


def try_here(what: str) -> tuple[bool, str]:
    """Loads one part in this process; the second value is what it says, or why it does not work."""
    try:
        if what in ("tensorrt", "tensorrt_rtx"):
            from ..build.library import cuda_major
            from ..runtime.tensorrt_api import load_tensorrt

            loaded = load_tensorrt(what)
            made_for = cuda_major(what)
            return True, f"{loaded.version}" + (f" for CUDA {made_for}" if made_for else "")
        from ..runtime.cuda_open import open_cuda_api

        api = open_cuda_api(what)
        return True, f"{api.count()} device(s)"
    except EdgeError as error:
        return False, error.message


def try_apart(what: str, timeout: float = TIMEOUT_SECONDS) -> tuple[bool, str]:
    """`try_here` in a child process."""
    command = [sys.executable, "-m", "pixano_edge.engine.cli.gpu_parts", what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return False, f"the try ended with code {done.returncode}. {lines[-1][-300:] if lines else ''}".strip()
    answer = json.loads(done.stdout.splitlines()[-1])
    return bool(answer["works"]), str(answer["said"])


if __name__ == "__main__":
    answered, said = try_here(sys.argv[1])
    typer.echo(json.dumps({"works": answered, "said": said}))
