"""Engines that ONNX Runtime's TensorRT providers keep on disk: one folder for everything they depend on.

The providers name their files by the graph's structure and the GPU's compute capability, and load them without asking
whether weights, ONNX Runtime, TensorRT or the driver changed (microsoft/onnxruntime issue 22244). So each folder has
all of that in its name, and a change leads to another, empty folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..contracts.base import GraphSpec
from ..errors import ContractError, DeviceError
from .base import DeviceInfo

_CHUNK = 1 << 20


def default_root() -> Path:
    """``$PIXANO_EDGE_HOME/engines/onnxruntime``, or below ``~/.cache/pixano-edge`` (``$XDG_CACHE_HOME`` counts)."""
    if home := os.environ.get("PIXANO_EDGE_HOME"):
        return Path(home).expanduser() / "engines" / "onnxruntime"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixano-edge" / "engines" / "onnxruntime"


def profile_shapes(spec: GraphSpec) -> dict[str, str]:
    """Smallest, typical and largest shapes as the providers take them: ``points:1x1x2,labels:1x1``.

    Every input with an open dimension is named: one that is left out makes the providers guess from the first run and
    build again whenever a shape leaves what they saw (microsoft/onnxruntime issue 12120).

    Returns:
        Text by ``min``, ``opt`` and ``max``; empty where all inputs have fixed shapes.

    Raises:
        ContractError: A dimension has no range.
    """
    dynamic = [tensor for tensor in spec.inputs if tensor.dynamic]
    missing = sorted({dim for tensor in dynamic for dim in tensor.dynamic} - set(spec.ranges))
    if missing:
        raise ContractError(
            f"Graph '{spec.name}' has no range for {missing}.", "Give each dynamic dimension one in the contract."
        )
    if not dynamic:
        return {}
    texts = {}
    for which, key in enumerate(("min", "opt", "max")):
        sizes = {dim: bounds[which] for dim, bounds in spec.ranges.items()}
        texts[key] = ",".join(f"{t.name}:{'x'.join(map(str, t.shape(sizes)))}" for t in dynamic)
    return texts


def tensorrt_version() -> str:
    """Version of the TensorRT library that ONNX Runtime's provider would load, for example ``libnvinfer.so.10=101600``.

    Raises:
        DeviceError: None is found.
    """
    if importlib.util.find_spec("tensorrt_libs") is not None:
        with contextlib.suppress(ImportError, OSError):  # the wheel's own loader: makes its libraries findable
            importlib.import_module("tensorrt_libs")
    found = [text for name in ("libnvinfer.so.10", "libnvinfer.so.11") if (text := _library_version(name))]
    if not found:
        raise DeviceError(
            "No TensorRT library (libnvinfer) is found.",
            "Install TensorRT for ONNX Runtime's provider, or use --backend onnxruntime for CUDA alone.",
        )
    return ";".join(found)


def _library_version(name: str) -> str | None:
    try:
        return f"{name}={int(ctypes.CDLL(name).getInferLibVersion())}"
    except (OSError, AttributeError):
        return None


def cache_key(path: Path, info: DeviceInfo, versions: Mapping[str, str], options: Mapping[str, str]) -> dict[str, Any]:
    """Everything a stored engine depends on; JSON-ready.

    Args:
        path: Graph file; weights beside it that are named after it count too.
        info: The GPU.
        versions: Of ONNX Runtime and of what compiles.
        options: Of the provider, shapes included. The stream and paths are left out.
    """
    stem = f"{path.stem}."
    beside = sorted(p for p in path.parent.iterdir() if p.name.startswith(stem) and p.suffix != ".onnx" and p.is_file())
    return {
        "graph": {p.name: _sha256(p) for p in (path, *beside)},
        "options": {k: v for k, v in sorted(options.items()) if not k.endswith(("stream", "_path", "device_id"))},
        "versions": dict(versions),
        "gpu": info.name,
        "multiprocessors": info.extra.get("multiprocessors"),
        "compute_capability": info.compute_capability,
        "driver": info.driver,
        "runtime": info.runtime,
    }


def cache_folder(root: Path, graph: str, key: Mapping[str, Any]) -> Path:
    """Makes the folder of a key, with the key itself in ``key.json``.

    Raises:
        DeviceError: The folder cannot be written.
    """
    text = json.dumps(key, sort_keys=True, indent=1)
    folder = root / f"{graph}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key.json").write_text(text)
    except OSError as error:
        raise DeviceError(
            f"The engine folder '{folder}' cannot be written: {error.strerror or error}.",
            "Pass another one with the option cache_dir, or set PIXANO_EDGE_HOME.",
        ) from error
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
