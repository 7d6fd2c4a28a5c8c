"""Making Ed25519 keys and signing a kit's manifest, through `cryptography` (extra ``[kit]``).

Verifying is `bootstrap.verify_signature`, which needs no library.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import EdgeError, MissingDependencyError

Ask = Callable[[], str]
"""Asks for the passphrase of an encrypted key."""


def generate(file: Path, passphrase: str | None = None) -> tuple[Path, str]:
    """Writes a new private key (PEM, mode 0600) to `file` and the public one beside it with the suffix ``.pub``.

    Args:
        file: Must not exist; a key is never overwritten.
        passphrase: Encrypts the private key.

    Returns:
        The public key's file, and the key as 64 hexadecimal digits.

    Raises:
        EdgeError: A file exists already or cannot be written.
    """
    serialization, ed25519 = _library()
    key = ed25519.Ed25519PrivateKey.generate()
    encryption: Any = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    beside = file.with_name(f"{file.name}.pub")
    if beside.exists():
        raise EdgeError(f"'{beside}' exists already.", "Choose another name; old kits need the old key.")
    _write_new(file, private, 0o600)
    _write_new(beside, public, 0o644)
    return beside, public_digits(key)


def load(file: Path, ask: Ask) -> Any:
    """The private key in a PEM file.

    Args:
        file: As written by `generate`.
        ask: Called where the key is encrypted.

    Raises:
        EdgeError: Absent, damaged, of another kind, or a wrong passphrase.
    """
    serialization, ed25519 = _library()
    try:
        data = file.read_bytes()
    except OSError as error:
        raise EdgeError(f"The key '{file}' cannot be read: {error.strerror}.", "Check the path and rights.") from error
    try:
        try:
            key = serialization.load_pem_private_key(data, None)
        except TypeError:  # how the library says that it is encrypted
            key = serialization.load_pem_private_key(data, ask().encode())
    except (ValueError, TypeError) as error:
        raise EdgeError(
            f"'{file}' holds no private key, or the passphrase is wrong.", "Make one with: pixano-edge kit keygen"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise EdgeError(f"'{file}' is not an Ed25519 key.", "Make one with: pixano-edge kit keygen")
    return key


def sign(key: Any, message: bytes) -> bytes:
    """The signature, 64 bytes."""
    return bytes(key.sign(message))


def public_digits(key: Any) -> str:
    """The public half of a private key, as 64 hexadecimal digits."""
    return str(key.public_key().public_bytes_raw().hex())


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise MissingDependencyError("cryptography", "kit", "Signing a kit") from error
    return serialization, ed25519


def _write_new(file: Path, data: bytes, mode: int) -> None:
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise EdgeError(f"'{file}' exists already.", "Choose another name; a key is never overwritten.") from error
    except OSError as error:
        raise EdgeError(f"'{file}' cannot be written: {error.strerror}.", "Check the folder and its rights.") from error
    with open(handle, "wb") as stream:
        stream.write(data)
