"""Class names to token ids, as CLIP's tokeniser makes them: lower case, byte pairs, a start, an end, padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tokenizers

from ...contracts.owlv2 import OwlConstants
from ...errors import BundleError, PromptError


class Tokenizer:
    """The tokeniser of one checkpoint. Thread-safe.

    Args:
        content: Of its ``tokenizer.json``.
        constants: Of the checkpoint.

    Raises:
        BundleError: The content is no tokeniser, or does not end texts with the end token of `constants`.
    """

    def __init__(self, content: str | bytes, constants: OwlConstants) -> None:
        text = content.decode() if isinstance(content, bytes) else content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library, written in Rust, raises no narrower type
            raise BundleError(f"The tokeniser cannot be read: {error}", "Copy or export the bundle again.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._constants = constants
        ids = self._tokenizer.encode("a").ids
        if len(ids) < 3 or ids[-1] != constants.end_token:
            raise BundleError(
                f"The tokeniser does not end a text with token {constants.end_token}.", "Export the bundle again."
            )

    def encode(self, classes: Sequence[str]) -> npt.NDArray[np.int32]:
        """(C, max_tokens) int32 ids; nothing is cut off.

        Raises:
            PromptError: A class has more tokens than the model takes, or none.
        """
        c = self._constants
        ids = np.full((len(classes), c.max_tokens), c.pad_token, np.int32)
        for row, name, found in zip(ids, classes, self._tokenizer.encode_batch(list(classes))):
            if len(found.ids) > c.max_tokens:
                raise PromptError(
                    f"Class '{_short(name)}' has {len(found.ids) - 2} tokens, more than {c.max_tokens - 2}.",
                    "Use a shorter phrase: the model reads no more, and half a name is another class.",
                )
            if len(found.ids) < 3:
                raise PromptError(f"Class '{_short(name)}' has no word that can be read.", "Name it in words.")
            row[: len(found.ids)] = found.ids
        return ids


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:40]}..."
