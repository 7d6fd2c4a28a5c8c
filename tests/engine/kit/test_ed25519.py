"""Signatures: the RFC's own vectors, OpenSSL's opinion on good and bad ones, and what must never pass."""

from __future__ import annotations

import hashlib
import secrets

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pixano_edge.engine.kit.ed25519 import _BASE, _L, _P, _encode, _multiply, verify_signature

# RFC 8032 section 7.1: public key, message, signature.
VECTORS = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        b"",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe"
        "24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        b"\x72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302ae"
        "eb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        b"\xaf\x82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28"
        "dc027beceea1ec40a",
    ),
    (
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        hashlib.sha512(b"abc").digest(),
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17"
        "ad9bef1177331a704",
    ),
]


@pytest.mark.parametrize(("key", "message", "signature"), VECTORS)
def test_the_vectors_of_the_rfc(key: str, message: bytes, signature: str) -> None:
    assert verify_signature(bytes.fromhex(key), message, bytes.fromhex(signature))
    assert not verify_signature(bytes.fromhex(key), message + b"x", bytes.fromhex(signature))


def _openssl(key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def test_it_agrees_with_openssl() -> None:
    for size in (0, 1, 63, 64, 1000):
        private = Ed25519PrivateKey.generate()
        key, message = private.public_key().public_bytes_raw(), secrets.token_bytes(size)
        signature = private.sign(message)
        assert verify_signature(key, message, signature)
        for _ in range(6):
            which = secrets.randbelow(3)
            parts = [bytearray(key), bytearray(message or b"\0"), bytearray(signature)]
            parts[which][secrets.randbelow(len(parts[which]))] ^= 1 << secrets.randbelow(8)
            changed = tuple(map(bytes, parts))
            assert verify_signature(*changed) == _openssl(*changed) == False  # noqa: E712


@pytest.fixture(scope="module")
def good() -> tuple[bytes, bytes, bytes]:
    private = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    return private.public_key().public_bytes_raw(), b"kit", private.sign(b"kit")


def test_a_second_form_of_a_signature_is_refused(good: tuple[bytes, bytes, bytes]) -> None:
    """S and S + L fulfil the same equation."""
    key, message, signature = good
    larger = (int.from_bytes(signature[32:], "little") + _L).to_bytes(32, "little")
    assert not verify_signature(key, message, signature[:32] + larger)


def test_lengths_are_checked(good: tuple[bytes, bytes, bytes]) -> None:
    key, message, signature = good
    assert verify_signature(key, message, signature)
    assert not verify_signature(key, message, signature + b"\0")
    assert not verify_signature(key, message, signature[:63])
    assert not verify_signature(key[:31], message, signature)
    assert not verify_signature(key, message, b"")
    assert not verify_signature(key, message, bytes(64))


def test_keys_of_small_order_are_refused() -> None:
    """With the neutral element as the key, S = 1 and R = B sign every message."""
    assert _BASE is not None
    forged = _encode(_BASE) + (1).to_bytes(32, "little")
    assert _encode(_multiply(1, _BASE)) == forged[:32]
    neutral = (1).to_bytes(32, "little")
    assert not verify_signature(neutral, b"anything", forged)
    for key in (bytes(32), (_P - 1).to_bytes(32, "little")):  # orders 4 and 2
        assert not verify_signature(key, b"anything", forged)


def test_only_the_one_encoding_of_a_point_is_read() -> None:
    for key in (
        (_P + 1).to_bytes(32, "little"),  # 1, not reduced
        (2).to_bytes(32, "little"),  # not on the curve
        (1 | 1 << 255).to_bytes(32, "little"),  # x = 0 with a sign
        b"\xff" * 32,
    ):
        assert not verify_signature(key, b"", bytes(64))
