"""Versions of what is installed: distributions that may come as one of several wheels, or as a system build."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterable

DISTRIBUTION = "pixano-edge"

ORT_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn")
OPENCV_WHEELS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
SYSTEM = "installed (system)"
"""Version of a module that no wheel brought; only importing it could tell more."""

Versions = Callable[[str], str | None]


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    import importlib.metadata  # here: it brings a parser of e-mails

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_version(module: str, wheels: Iterable[str], version_of: Versions = installed_version) -> str | None:
    """Version of a module that may come from one of several wheels or from the system; None where it is absent."""
    if importlib.util.find_spec(module) is None:
        return None
    return next((version for wheel in wheels if (version := version_of(wheel))), SYSTEM)


def engine_versions(version_of: Versions = installed_version) -> dict[str, str]:
    """Python and every library the engine runs on, by the name of its wheel; imports nothing.

    ONNX Runtime and OpenCV are listed whichever wheel they came from, and as `SYSTEM` under their plain names when
    none did (a Jetson's own builds).
    """
    found = {DISTRIBUTION: version_of(DISTRIBUTION) or "unknown", "python": platform.python_version()}
    plain = {name: version for name in ("numpy", "pillow") if (version := version_of(name))}
    for name, module, wheels in (("onnxruntime", "onnxruntime", ORT_WHEELS), ("opencv", "cv2", OPENCV_WHEELS)):
        built = {wheel: version for wheel in wheels if (version := version_of(wheel))}
        if not built and importlib.util.find_spec(module) is not None:
            built = {name: SYSTEM}
        plain |= built
    return found | plain
