"""From class names to captions: token ids, phrase spans, and the masks that keep phrases apart.

Reference: transformers' ``processing_grounding_dino.py`` (a list of names becomes "a cat. a remote control.", in lower
case) and ``generate_masks_with_special_tokens_and_transfer_map`` of ``modeling_grounding_dino.py``. Names without a dot
or question mark give the very ids of that processor. What differs, on purpose:

* a dot or question mark inside a name is dropped, since either one would split the name into two phrases;
* equal phrases are asked for once; the first of the equal names gets the boxes;
* names that do not fit one caption are spread over several, where the original cuts the caption off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...contracts.grounding_dino import GroundingDinoConstants
from ...errors import BundleError, PromptError
from ..detection.tokenizer import read_tokenizer


@dataclass(frozen=True, eq=False)
class Caption:
    """One caption of T tokens, ready for the graphs.

    Attributes:
        ids: The token ids; two captions are equal when these are.
        input_ids: (1, T) int32.
        position_ids: (1, T) int32, counted from the start of each phrase.
        mask: (1, T, T) float32, 1 where the row's token looks at the column's.
        labels: Index of the class of each phrase, (K,) int64.
        edges: (2 K,) int64: start and end of each phrase's tokens, the dot not included.
    """

    ids: tuple[int, ...]
    input_ids: npt.NDArray[np.int32]
    position_ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    edges: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


class Captioner:
    """Makes captions of class names. Thread-safe.

    Args:
        tokenizer: Content of the checkpoint's ``tokenizer.json`` (BERT WordPiece).
        constants: Of the checkpoint.

    Raises:
        BundleError: The tokeniser cannot be read, or its special tokens are not those of the constants.
    """

    def __init__(self, tokenizer: str | bytes, constants: GroundingDinoConstants) -> None:
        self._tokenizer = read_tokenizer(tokenizer)
        # A class called "[SEP]" is text like any other.
        self._tokenizer.encode_special_tokens = True
        self._constants = constants
        self._unknown = self._tokenizer.token_to_id("[UNK]")
        c = constants
        wanted = {"[CLS]": c.start_token, "[SEP]": c.end_token, ".": c.dot_token, "?": c.question_token}
        wrong = [token for token, number in wanted.items() if self._tokenizer.token_to_id(token) != number]
        if wrong:
            raise BundleError(
                f"The tokeniser does not have the model's ids for {' '.join(wrong)}.",
                "Export the bundle from a checkpoint whose tokeniser belongs to its weights.",
            )

    def phrase(self, name: str) -> tuple[int, ...]:
        """Token ids of a class name, without anything that would end the phrase; may be empty."""
        ids = self._tokenizer.encode(name.strip().lower(), add_special_tokens=False).ids
        return tuple(i for i in ids if i not in self._constants.special_tokens)

    def captions(self, classes: Sequence[str]) -> list[Caption]:
        """Captions that together hold every class, filled in order.

        Raises:
            PromptError: A class has no word that the tokeniser knows of (two of them would be one phrase, and one
                would find anything), or is too long for one caption.
        """
        room = self._constants.max_text_len - 2
        packs: list[list[tuple[int, tuple[int, ...]]]] = []
        left, seen = 0, set()
        for label, name in enumerate(classes):
            phrase = self.phrase(name)
            if not phrase:
                raise PromptError(f"Class {label} {name[:40]!r} has no word in it.", "Name it with letters or digits.")
            if all(token == self._unknown for token in phrase):
                raise PromptError(
                    f"The model knows no word of class {label} {name[:40]!r}.", "Name it in English, or describe it."
                )
            if len(phrase) + 1 > room:
                raise PromptError(
                    f"Class {label} {name[:40]!r} has {len(phrase)} tokens; {room - 1} fit into one caption.",
                    "Use a shorter phrase.",
                )
            if phrase in seen:
                continue
            seen.add(phrase)
            if len(phrase) + 1 > left:
                packs.append([])
                left = room
            packs[-1].append((label, phrase))
            left -= len(phrase) + 1
        return [self._caption(pack) for pack in packs]

    def _caption(self, pack: Sequence[tuple[int, tuple[int, ...]]]) -> Caption:
        ids = [self._constants.start_token]
        for _, phrase in pack:
            ids += [*phrase, self._constants.dot_token]
        ids.append(self._constants.end_token)
        return self.from_ids(ids, [label for label, _ in pack])

    def from_ids(self, ids: Sequence[int], labels: Sequence[int] | None = None) -> Caption:
        """The caption of these tokens: start, phrases that a dot ends, end. `labels`: 0, 1, ... if None."""
        dots = np.flatnonzero(np.array(ids) == self._constants.dot_token)
        starts = np.concatenate([[1], dots[:-1] + 1])
        mask, positions = phrase_masks(ids, self._constants.special_tokens)
        return Caption(
            tuple(int(i) for i in ids),
            np.array([ids], np.int32),
            positions[None],
            mask[None].astype(np.float32),
            np.array(range(len(dots)) if labels is None else labels, np.int64),
            np.stack([starts, dots], axis=1).reshape(-1).astype(np.int64),
        )


def phrase_masks(
    ids: Sequence[int], special_tokens: Sequence[int]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
    """Which tokens see each other, and where each one stands in its phrase.

    A phrase is a run of tokens with the special token that ends it. The first and the last token of the caption are
    alone, and so is everything that no special token before the last one ends.

    Returns:
        (T, T) mask and (T,) positions.
    """
    count = len(ids)
    places = np.arange(count)
    special = np.flatnonzero(np.isin(ids, special_tokens))
    after = np.searchsorted(special, places)  # which special token ends the phrase of each place
    end = np.append(special, count)[after]
    start = np.insert(special, 0, -1)[after] + 1
    inside = (end > 0) & (end < count - 1)
    mask = (end[:, None] == end[None, :]) & inside[None, :] | np.eye(count, dtype=np.bool_)
    return mask, np.where(inside, places - start, 0).astype(np.int32)
