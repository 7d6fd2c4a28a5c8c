"""Writing the demo's pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


def write_png(path: Path, image: NDArray[np.uint8]) -> Path:
    """Writes an image (H, W, 3) uint8 RGB; equal images give equal files.

    Raises:
        OSError: The file cannot be written.
    """
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise OSError(f"cannot write {path}")
    return path


def write_list(path: Path, pictures: list[dict[str, Any]]) -> None:
    """Writes what is known about pictures beside them, as JSON."""
    path.write_text(json.dumps({"pictures": pictures}, indent=1) + "\n", encoding="utf-8")
