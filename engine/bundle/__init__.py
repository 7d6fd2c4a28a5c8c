"""Bundles: the manifest, opening with checks, writing, packing to one file, and the local store."""

from __future__ import annotations

from .archive import inspect_archive, pack, unpack
from .bundle import Bundle, check_manifest, parse_manifest
from .manifest import MANIFEST_NAME, SCHEMA_VERSION, GoldenSample, Manifest
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
