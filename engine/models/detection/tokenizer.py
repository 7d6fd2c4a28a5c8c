"""Reading a bundle's tokeniser file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import BundleError, MissingDependencyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def require_tokenizers() -> None:
    """Raises MissingDependencyError when the library is not installed: to be asked before graphs are opened."""
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("tokenizers", "detection", "Detecting objects by their names") from error


def read_tokenizer(content: str | bytes) -> Tokenizer:
    """The tokeniser of a ``tokenizer.json``; it neither pads nor cuts off.

    Raises:
        MissingDependencyError: The library `tokenizers` is not installed.
        BundleError: The content is no tokeniser.
    """
    require_tokenizers()
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(content.decode() if isinstance(content, bytes) else content)
    except Exception as error:  # the library, written in Rust, raises no narrower type
        raise BundleError(f"The tokeniser cannot be read: {error}.", "Copy or export the bundle again.") from error
    found.no_padding()
    found.no_truncation()
    return found
