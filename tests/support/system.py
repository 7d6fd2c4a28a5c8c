"""A folder that stands for ``/``, with the system files a test needs; the memory of this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_system(root: Path, files: Mapping[str, str]) -> Path:
    """Writes the files (path below `root` -> text) and returns `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def resident() -> int:
    """Resident bytes of this process, file pages included (Linux); for tests on boxes without psutil."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
