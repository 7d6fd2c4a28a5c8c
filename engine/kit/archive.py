"""The installer of a kit as one file, ``install.pyz``: the same bytes for the same version."""

from __future__ import annotations

import zipfile
from pathlib import Path

MODULES = ("ed25519", "manifest", "verify", "install", "installer")
_PACKAGE = "pixano_edge_kit"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_START = f"""\
import sys

if sys.version_info < (3, 10):
    sys.exit("Pixano Edge needs Python 3.10 or later; this is %d.%d." % sys.version_info[:2])

from {_PACKAGE}.installer import main

sys.exit(main())
"""


def write_installer(file: Path) -> None:
    """Writes the installer: an archive that ``python3`` runs, not compressed, so that any editor shows its source."""
    here = Path(__file__).parent
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "__main__.py", _START)
        _add(archive, f"{_PACKAGE}/__init__.py", '"""The installer of a Pixano Edge kit."""\n')
        for name in MODULES:
            _add(archive, f"{_PACKAGE}/{name}.py", (here / f"{name}.py").read_text("utf-8"))


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3  # else it depends on the system
    info.external_attr = 0o100644 << 16
    archive.writestr(info, text.encode())
