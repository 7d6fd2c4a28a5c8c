"""Checking a kit: signature, every file's size and SHA-256, no file too many, no links. Nothing of it is run before."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from .ed25519 import verify_signature
from .manifest import AGAIN, MANIFEST, MAX_MANIFEST, SIGNATURE, Entry, KitRefused, Manifest, parse_manifest

UNSIGNED = (
    "WARNING: the origin of this kit is not checked. Its checksums were compared, and they find damage; but whoever "
    "alters a kit can write new checksums into it. Only a signature, checked with a key that came another way, tells "
    "who made it. Install an unsigned kit only if you trust every hand it went through."
)

_CHUNK = 1 << 20
_DISTRUST = "Do not install it. Get the kit again from whoever made it, and tell them."

Say = Callable[[str], None]
"""Gets lines for the user."""

_SPKI = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of an Ed25519 key in a PEM public key (RFC 8410)."""


def read_public_key(text: str) -> bytes:
    """The 32 bytes of a public key, given as 64 hexadecimal digits or as the path of a PEM file.

    Raises:
        KitRefused: Neither of the two, or a key of another kind.
    """
    compact = re.sub(r"[\s:]", "", text)
    if re.fullmatch(r"[0-9a-fA-F]{64}", compact):
        return bytes.fromhex(compact)
    try:
        content = Path(text).expanduser().read_text("ascii")[:4096]
    except (OSError, ValueError) as error:
        message = f"The public key {text[:200]!r} cannot be read: {error}."
        raise KitRefused(message, "Give its file, or its 64 hexadecimal digits.") from None
    if re.fullmatch(r"[0-9a-fA-F]{64}", re.sub(r"[\s:]", "", content)):
        return bytes.fromhex(re.sub(r"[\s:]", "", content))
    found = re.search(r"-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----", content)
    if found is not None:
        with contextlib.suppress(binascii.Error):
            der = base64.b64decode(found[1])
            if len(der) == 44 and der.startswith(_SPKI):
                return der[12:]
    kind = "a private key: keep it secret" if "PRIVATE KEY" in content else "not an Ed25519 public key"
    raise KitRefused(f"'{text}' is {kind}.", "Give the .pub file that 'pixano-edge kit keygen' wrote.")


def verify(kit: Path, key: bytes | None, allow_unsigned: bool = False, say: Say = lambda _: None) -> Manifest:
    """Checks a kit: signature, every file's size and SHA-256, no file too many, no links.

    Args:
        kit: The folder.
        key: Public key; its signature must be right, whatever `allow_unsigned` says.
        allow_unsigned: Without a key, check the checksums alone and say loudly what that means.
        say: Gets lines for the user.

    Raises:
        KitRefused: Anything does not match.
    """
    if not kit.is_dir():
        raise KitRefused(f"There is no kit at '{kit}'.", "Give the folder that 'pixano-edge kit create' made.")
    if key is None and not allow_unsigned:
        raise KitRefused(
            "No public key was given, so nothing tells who made this kit.",
            "Give the maker's key with --key. To install a kit without a signature: --allow-unsigned.",
        )
    with _reading(kit):
        data = _read(kit, MANIFEST, MAX_MANIFEST)
        if key is not None:
            signature = _signature(kit)
            if not verify_signature(key, data, signature):
                raise KitRefused(
                    f"The signature of '{kit}' does not fit its manifest and this key: it was made with another key, "
                    "or the kit was altered.",
                    f"Check that this is the maker's key. {_DISTRUST}",
                )
        manifest = parse_manifest(data)
        _check_names(kit, manifest)
        for name, entry in manifest.files.items():
            check_file(kit, name, entry)
    if key is None:
        say(UNSIGNED)
    return manifest


def _signature(kit: Path) -> bytes:
    if not os.path.lexists(kit / SIGNATURE):
        raise KitRefused(f"'{kit}' has no signature ({SIGNATURE}).", _DISTRUST)
    try:
        return bytes.fromhex(_read(kit, SIGNATURE, 1000).decode("ascii").strip())
    except ValueError:
        raise KitRefused(f"{SIGNATURE} does not hold a signature.", AGAIN) from None


@contextlib.contextmanager
def _reading(kit: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KitRefused(f"'{kit}' cannot be read: {error}.", AGAIN) from error


def _open(path: Path) -> int:
    """A descriptor of a plain file; links and special files are refused, as is what appears in between."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise KitRefused(f"The kit lacks the file '{path.name}'.", AGAIN) from None
    except OSError as error:
        if path.is_symlink():
            raise KitRefused(f"'{path}' is a link; a kit holds plain files only.", _DISTRUST) from None
        raise error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise KitRefused(f"'{path}' is not a plain file.", _DISTRUST)
    return handle


def _read(kit: Path, name: str, limit: int) -> bytes:
    with open(_open(kit / name), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise KitRefused(f"{name} is larger than {limit} bytes.", _DISTRUST)
    return data


def _check_names(kit: Path, manifest: Manifest) -> None:
    present = set()
    for folder, folders, names in os.walk(kit, onerror=_raise):
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise KitRefused(f"'{Path(folder) / name}' is a link; a kit holds plain files only.", _DISTRUST)
        present |= {(Path(folder) / name).relative_to(kit).as_posix() for name in names}
    if missing := sorted(set(manifest.files) - present):
        raise KitRefused(f"The kit lacks {len(missing)} of its files: {', '.join(missing[:5])}.", AGAIN)
    if extra := sorted(present - set(manifest.files) - {MANIFEST, SIGNATURE}):
        raise KitRefused(f"The kit holds files that its manifest does not list: {', '.join(extra[:5])}.", _DISTRUST)


def _raise(error: OSError) -> None:
    raise error


def check_file(kit: Path, name: str, entry: Entry, copy: Path | None = None) -> None:
    """Compares a file with its entry; with `copy`, writes it there on the way, so what was checked is what is used."""
    digest, size = hashlib.sha256(), 0
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open(_open(kit / name), "rb"))
        target = stack.enter_context(copy.open("xb")) if copy is not None else None
        while size <= entry.size and (chunk := source.read(_CHUNK)):
            digest.update(chunk)
            size += len(chunk)
            if target is not None:
                target.write(chunk)
        if target is not None:
            target.flush()
            os.fsync(target.fileno())
    if size != entry.size:
        kind = "truncated" if size < entry.size else "longer than it was"
        raise KitRefused(f"'{name}' is {kind}: {size} bytes instead of {entry.size}.", AGAIN)
    if digest.hexdigest() != entry.sha256:
        raise KitRefused(f"'{name}' was damaged or altered: its SHA-256 differs from the manifest's.", _DISTRUST)
