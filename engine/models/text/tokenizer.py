"""The tokeniser of a language model: control tokens only where the caller means them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ...errors import BundleError, MissingDependencyError
from ..detection.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_AGAIN = "Copy or export the bundle again."


def require_text_libraries() -> None:
    """Raises MissingDependencyError when a library of the extra ``vlm`` is absent: asked before graphs are opened."""
    for module in ("tokenizers", "jinja2"):
        if find_spec(module) is None:
            raise MissingDependencyError(module, "vlm", "Describing images")


class TextTokenizer:
    """Text to token ids and back. Thread-safe.

    Args:
        content: Of the bundle's ``tokenizer.json``.

    Attributes:
        special: Content of each control token and its id.

    Raises:
        MissingDependencyError: The library `tokenizers` is not installed.
        BundleError: The content is no tokeniser.
    """

    def __init__(self, content: str | bytes) -> None:
        require_text_libraries()
        self._tokenizer: Tokenizer = read_tokenizer(content)
        self._lock = threading.Lock()  # the library keeps what `encode` does with control tokens as a state
        added = self._tokenizer.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: index for index, token in added.items() if token.special}

    @property
    def size(self) -> int:
        """Ids that the tokeniser knows; the model may have more."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def id_of(self, token: str) -> int:
        """Id of one token; raises BundleError where the tokeniser has none of that name."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise BundleError(f"The tokeniser has no token '{token}'.", _AGAIN)
        return int(found)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which the names of control tokens stand for these. Nothing is added around it."""
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token: ``<image>`` is the seven characters."""
        with self._lock:
            self._tokenizer.encode_special_tokens = True
            try:
                return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
            finally:
                self._tokenizer.encode_special_tokens = False

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
