"""A folder that stands for ``/``, with the system files a test needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_system(root: Path, files: Mapping[str, str]) -> Path:
    """Writes the files (path below `root` -> text) and returns `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
