"""Bundles: the manifest, opening with checks, writing, packing to one file, and the local store.

The names below are imported when they are first asked for: they need pydantic, `names` does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .archive import inspect_archive, pack, unpack
    from .bundle import Bundle, check_manifest, parse_manifest
    from .manifest import SCHEMA_VERSION, GoldenSample, Manifest
    from .names import MANIFEST_NAME
    from .store import DEMO_NAME, DEMO_NAMES, BundleStore, demo_path
    from .writer import BundleWriter

__all__ = [
    "DEMO_NAME",
    "DEMO_NAMES",
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Bundle",
    "BundleStore",
    "BundleWriter",
    "GoldenSample",
    "Manifest",
    "check_manifest",
    "demo_path",
    "inspect_archive",
    "pack",
    "parse_manifest",
    "unpack",
]

_MODULES = {
    "DEMO_NAME": "store",
    "DEMO_NAMES": "store",
    "MANIFEST_NAME": "names",
    "SCHEMA_VERSION": "manifest",
    "Bundle": "bundle",
    "BundleStore": "store",
    "BundleWriter": "writer",
    "GoldenSample": "manifest",
    "Manifest": "manifest",
    "check_manifest": "bundle",
    "demo_path": "store",
    "inspect_archive": "archive",
    "pack": "archive",
    "parse_manifest": "bundle",
    "unpack": "archive",
}

if not TYPE_CHECKING:  # with it in sight, a type checker takes every name for known

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        found = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        return found
