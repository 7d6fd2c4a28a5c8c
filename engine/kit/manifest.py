"""What ``kit.json`` says: every file of a kit, what to install, and for which machine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

FORMAT = "pixano-edge-kit"
VERSION = 1
MANIFEST = "kit.json"
SIGNATURE = "kit.sig"
INSTALLER = "install.pyz"
MAX_MANIFEST = 16 << 20
AGAIN = "Copy the kit again, or get it again from whoever made it."

_BUNDLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")


class KitRefused(Exception):
    """A kit does not verify or cannot be installed; `action` says what to do."""

    def __init__(self, message: str, action: str) -> None:
        self.message = message
        self.action = action
        super().__init__(f"{message} {action}")


@dataclass(frozen=True)
class Entry:
    """Size and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Pin:
    """A distribution to install: name, version, and its wheel in the kit."""

    name: str
    version: str
    wheel: str


@dataclass(frozen=True)
class KitBundle:
    """A bundle of the kit: its name in a store, its hash, and its folder in the kit."""

    name: str
    hash: str
    folder: str


@dataclass(frozen=True)
class Manifest:
    """What ``kit.json`` says; parsed with `parse_manifest`.

    Attributes:
        pixano_edge: Version.
        extras: Extras of pixano-edge that its wheels cover.
        created: ISO 8601, UTC.
        python: ``3.11``.
        machine: ``x86_64`` or ``aarch64``.
        space_bytes: Free space that the installation needs: wheels, packed and unpacked, and bundles.
        pip: The wheel of pip.
        pins: Everything to install.
        bundles: Bundles for the store.
        files: Every file of the kit but the manifest and its signature, by POSIX path.
    """

    pixano_edge: str
    extras: tuple[str, ...]
    created: str
    python: str
    machine: str
    space_bytes: int
    pip: str
    pins: tuple[Pin, ...]
    bundles: tuple[KitBundle, ...]
    files: dict[str, Entry]


def parse_manifest(data: bytes) -> Manifest:
    """Reads a manifest.

    Raises:
        KitRefused: Not a manifest, of a newer version, or with names that could lead out of the kit.
    """
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=_no_twins)
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}")
        if raw["version"] != VERSION:
            raise KitRefused(
                f"The kit has version {raw['version']!r}, this installer reads {VERSION}.",
                "Use the installer of the pixano-edge that made it.",
            )
        files = {
            _safe(name): Entry(_number(entry["size"]), _matching(_DIGEST, entry["sha256"]))
            for name, entry in raw["files"].items()
        }
        folded = [name.casefold() for name in files]
        if len(set(folded)) != len(folded) or {MANIFEST, SIGNATURE} & set(folded):
            raise ValueError("a file is listed twice")
        bundles = tuple(
            KitBundle(_matching(_BUNDLE_NAME, b["name"]), _matching(_DIGEST, b["hash"]), _safe(b["folder"]))
            for b in raw["bundles"]
        )
        pins = tuple(
            Pin(_matching(_NAME, p["name"]), _matching(_RELEASE, p["version"]), _listed(files, p["wheel"]))
            for p in raw["requirements"]
        )
        for bundle in bundles:
            _listed(files, f"{bundle.folder}/manifest.json")
        return Manifest(
            pixano_edge=_matching(_RELEASE, raw["pixano_edge"]),
            extras=tuple(_matching(_RELEASE, extra) for extra in raw["extras"]),
            created=_text(raw["created"]),
            python=_matching(re.compile(r"3\.[0-9]{1,2}"), raw["python"]),
            machine=_matching(_RELEASE, raw["machine"]),
            space_bytes=_number(raw["space_bytes"]),
            pip=_listed(files, raw["pip"]),
            pins=pins,
            bundles=bundles,
            files=files,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise KitRefused(f"{MANIFEST} is not a kit's manifest: {type(error).__name__}: {error}.", AGAIN) from None


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{value!r} is not a printable text")
    return value


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{str(value)[:100]!r} has not the right form")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{str(value)[:100]!r} is not a size")
    return value


def _listed(files: dict[str, Entry], name: Any) -> str:
    if name not in files:
        raise ValueError(f"{str(name)[:200]!r} is not among the files")
    return str(name)


def _safe(name: str) -> str:
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and len(part.encode()) <= 200 for part in parts)
    if not plain or len(name) > 1000 or any(c in "\\:" or not c.isprintable() for c in name):
        raise ValueError(f"{name[:200]!r} is not a plain path inside the kit")
    return name
