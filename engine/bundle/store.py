"""The local model store: bundles by name in one folder, and the demo bundles of the package."""

from __future__ import annotations

import builtins
import importlib.resources
import os
import re
import secrets
import shutil
from pathlib import Path

from ..errors import BundleError
from .archive import inspect_archive, unpack
from .bundle import Bundle
from .files import Staging, os_errors
from .manifest import MANIFEST_NAME, NAME_PATTERN

DEMO_NAME = "sam2-demo"
DEMO_NAMES = ("grounding-dino-demo", "owlv2-demo", DEMO_NAME, "smolvlm-demo")
"""Bundles of the package; the names are taken in every store."""

_NAME = re.compile(NAME_PATTERN)


def default_root() -> Path:
    """``$PIXANO_EDGE_HOME/bundles``, or ``~/.local/share/pixano-edge/bundles``."""
    home = os.environ.get("PIXANO_EDGE_HOME")
    return Path(home).expanduser() / "bundles" if home else Path.home() / ".local/share/pixano-edge/bundles"


def demo_path(name: str = DEMO_NAME) -> Path:
    """Where a demo bundle lies in the installed package (it may be absent in a source tree)."""
    return Path(str(importlib.resources.files("pixano_edge.engine.assets"))) / name


class BundleStore:
    """Bundles by name. The demo bundles are always there under their own names, read-only.

    Args:
        root: Folder of the bundles; `default_root` if not given. Made when the first bundle is added.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root).expanduser() if root is not None else default_root()

    def list(self) -> builtins.list[str]:
        """Names of the bundles, sorted. They are not verified here; opening one does that."""
        found = {name for name in DEMO_NAMES if (demo_path(name) / MANIFEST_NAME).is_file()}
        if self.root.is_dir():
            with os_errors(f"reading '{self.root}'"):
                found |= {
                    path.name
                    for path in self.root.iterdir()
                    if _NAME.fullmatch(path.name) and path.name not in DEMO_NAMES and (path / MANIFEST_NAME).is_file()
                }
        return sorted(found)

    def path(self, name: str) -> Path:
        """Folder of a bundle.

        Raises:
            BundleError: Not a valid name, or no such bundle; lists the known ones.
        """
        folder = demo_path(name) if name in DEMO_NAMES else self.root / _checked(name)
        if not (folder / MANIFEST_NAME).is_file():
            known = self.list()
            raise BundleError(
                f"There is no bundle '{name}' in the store.",
                f"Known: {', '.join(known)}." if known else "The store is empty: pixano-edge bundle add <folder>.",
            )
        return folder

    def add(self, source: Path | str, name: str | None = None) -> Path:
        """Copies a bundle folder, or unpacks a packed bundle, into the store and returns its folder.

        Args:
            source: Folder or ``*.pxe`` file.
            name: Name in the store; the manifest's own if not given.

        Raises:
            BundleError: Not a valid bundle, a name that is taken, or a full disk. The store is unchanged then.
        """
        path = Path(source).expanduser()
        if path.is_file():
            return unpack(path, self._free(name or inspect_archive(path)[0].name))
        bundle = Bundle.open(path)
        target = self._free(name or bundle.manifest.name)
        with Staging(target) as staging:
            with os_errors(f"copying to '{target}'"):
                for rel in bundle.contents():
                    copy = staging.root / rel
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(bundle.root / rel, copy)
            Bundle.open(staging.root)  # the source may have changed since it was verified
            return staging.publish()

    def remove(self, name: str) -> None:
        """Deletes a bundle. One that is open elsewhere keeps working until it is closed.

        Raises:
            BundleError: No such bundle, or a demo bundle, which belongs to the package.
        """
        if name in DEMO_NAMES:
            raise BundleError(f"'{name}' is part of the package.", "It cannot be removed.")
        folder = self.path(name)
        # Renamed first, so that nobody sees half a bundle; names with a dot in front are no bundles.
        hidden = self.root / f".{name[:100]}.old-{secrets.token_hex(4)}"
        with os_errors(f"removing '{folder}'"):
            os.rename(folder, hidden)
            shutil.rmtree(hidden)

    def _free(self, name: str) -> Path:
        target = self.root / _checked(name)
        if name in DEMO_NAMES or target.exists():
            raise BundleError(
                f"The store has a bundle '{name}' already.", "Give another name (--name), or remove the old one first."
            )
        return target


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise BundleError(
            f"{name[:150]!r} is not a bundle name.",
            "Use letters, digits, '.', '_' and '-', starting with a letter or digit, at most 128.",
        )
    return name
