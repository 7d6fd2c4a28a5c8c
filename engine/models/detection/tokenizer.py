"""Reading a bundle's tokeniser file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import BundleError, MissingDependencyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_tokenizer(content: str | bytes) -> Tokenizer:
    """The tokeniser of a ``tokenizer.json``; it neither pads nor cuts off.

    Raises:
        MissingDependencyError: The library `tokenizers` is not installed.
        BundleError: The content is no tokeniser.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError("tokenizers", "detection", "Detecting objects by their names") from error
    try:
        found = Tokenizer.from_str(content.decode() if isinstance(content, bytes) else content)
    except Exception as error:  # the library, written in Rust, raises no narrower type
        raise BundleError(f"The tokeniser cannot be read: {error}.", "Copy or export the bundle again.") from error
    found.no_padding()
    found.no_truncation()
    return found
