"""Wheels made by hand, so that a kit is made and installed in seconds and without a network."""

from __future__ import annotations

import base64
import ensurepip
import hashlib
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

COMMAND = """\
import os, sys
def main():
    if "--version" in sys.argv:
        print("pixano-edge", "1.2.3")
    else:
        import small_part
        print(small_part.ANSWER, sys.prefix)
"""


def make_wheel(
    folder: Path,
    name: str,
    version: str,
    *,
    requires: Sequence[str] = (),
    extras: Sequence[str] = (),
    files: dict[str, str] | None = None,
    script: str = "",
    tag: str = "py3-none-any",
) -> Path:
    """Writes a valid wheel and returns it."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    head = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    head += [f"Provides-Extra: {extra}" for extra in extras]
    head += [f"Requires-Dist: {text}" for text in requires]
    contents = {f"{path}": text for path, text in (files or {f"{module}.py": ""}).items()}
    contents[f"{info}/METADATA"] = "\n".join(head) + "\n"
    contents[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    if script:
        contents[f"{info}/entry_points.txt"] = f"[console_scripts]\n{script}\n"
    record = []
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(text.encode())}")
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    file = folder / f"{module}-{version}-{tag}.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
    return file


def pip_wheel() -> Path | None:
    """The pip that this Python brings along; some systems keep it in a package of their own."""
    return next(iter(sorted(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"))), None)


def small_wheels(folder: Path) -> Path:
    """A folder with a stand-in for pixano-edge, a package that it needs, and pip where there is one."""
    folder.mkdir()
    make_wheel(
        folder,
        "pixano-edge",
        "1.2.3",
        requires=["small-part>=2", "not-needed; extra == 'gpu'"],
        extras=["cpu", "gpu"],
        files={"small_command.py": COMMAND},
        script="pixano-edge = small_command:main",
    )
    make_wheel(folder, "small-part", "2.5", files={"small_part.py": "ANSWER = 42\n"})
    if (pip := pip_wheel()) is not None:
        shutil.copyfile(pip, folder / pip.name)
    else:
        make_wheel(folder, "pip", "99.0")
    return folder
