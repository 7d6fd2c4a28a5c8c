"""Which TensorRT is installed, found out without loading it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path

from ..machine import ROOT, read_text
from .key import FLAVOURS, TENSORRT, TENSORRT_RTX

# The wheels bring the first module; NVIDIA's system packages (JetPack, apt) the same, the split wheels the second.
_MODULES = {
    TENSORRT: (("tensorrt",), ("tensorrt_libs", "tensorrt_bindings")),
    TENSORRT_RTX: (("tensorrt_rtx",), ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")),
}
EXTRAS = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt-rtx"}


def installed() -> list[str]:
    """Flavours whose Python modules are there, full TensorRT first. Nothing is imported."""
    return [f for f in FLAVOURS if any(all(map(importlib.util.find_spec, group)) for group in _MODULES[f])]


def cuda_major(flavour: str, names: Iterable[str] | None = None, root: Path = ROOT) -> int | None:
    """CUDA major that a TensorRT was made for; None where nothing tells.

    A wheel says it in its name (``tensorrt-cu12-libs``); a system package belongs to the system's CUDA.

    Args:
        flavour: ``tensorrt`` or ``tensorrt_rtx``.
        names: Installed distributions; asked for when None.
        root: Folder that stands for ``/``.
    """
    if names is None:
        names = [str(d.metadata["Name"]) for d in importlib.metadata.distributions()]
    pattern = re.compile(rf"{flavour}_cu(\d+)(_libs|_bindings)?")
    found = (pattern.fullmatch(re.sub(r"[-.]", "_", name.lower())) for name in names)
    if majors := {int(match[1]) for match in found if match}:
        return max(majors)
    try:
        version = json.loads(read_text(root / "usr/local/cuda/version.json"))["cuda"]["version"]
    except (ValueError, KeyError, TypeError):
        return None
    major = str(version).partition(".")[0]
    return int(major) if major.isdigit() else None
