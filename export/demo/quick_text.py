"""Texts as training wants them: each phrase goes through BERT once, however many captions of a step it stands in.

Grounding DINO's text tokens see only those of their own phrase, up to and with the mark that ends it, and their
positions count from its start: what BERT makes of a phrase depends on nothing else. A step's captions have over a
thousand phrases, of which some two hundred are different.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GroundingDinoForObjectDetection
from transformers.modeling_outputs import BaseModelOutput

from pixano_edge.export.demo.gdino_model import FIXED_TOKENS

WIDTH = 24
"""Tokens in a row of different phrases; more where one phrase has more."""
_ENDS = [FIXED_TOKENS[name] for name in ("[PAD]", "[CLS]", "[SEP]", ".", "?")]


def pack(
    ids: NDArray[np.int64], width: int = WIDTH
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The different phrases of captions, one after the other in rows.

    Args:
        ids: (B, T), padded with 0.
        width: Tokens in a row.

    Returns:
        Of R rows of W tokens: ids (R, W); number (R, W) of the phrase, unlike for different ones, -1 for what is free;
        positions (R, W) in the phrase. And for each token of the captions (B, T) its place in the flattened rows.
    """
    ends = np.isin(ids, _ENDS)
    starts = np.ones_like(ends)
    starts[:, 1:] = ends[:, :-1]
    first = np.flatnonzero(starts)
    after = np.append(first[1:], ids.size)
    flat = ids.ravel()
    width = max(width, int((after - first).max()))
    rows, numbers, positions = [], [], []
    places: dict[bytes, int] = {}
    used = width
    where = np.empty(ids.size, np.int64)
    for begin, end in zip(first.tolist(), after.tolist(), strict=True):
        phrase, count = flat[begin:end], end - begin
        place = places.get(key := phrase.tobytes())
        if place is None:
            if used + count > width:
                rows.append(np.zeros(width, np.int64))
                numbers.append(np.full(width, -1, np.int64))
                positions.append(np.zeros(width, np.int64))
                used = 0
            part = slice(used, used + count)
            rows[-1][part], numbers[-1][part], positions[-1][part] = phrase, len(places), np.arange(count)
            place = places[key] = (len(rows) - 1) * width + used
            used += count
        where[begin:end] = np.arange(place, place + count)
    return np.stack(rows), np.stack(numbers), np.stack(positions), where.reshape(ids.shape)


@contextlib.contextmanager
def quick_text(model: GroundingDinoForObjectDetection) -> Iterator[None]:
    """Inside, ``model`` computes the states of its texts phrase by phrase, equal to its own up to rounding."""
    text: Any = model.model.text_backbone
    own = text.forward

    def forward(input_ids: Tensor, *_: Any, **__: Any) -> BaseModelOutput:
        ids, numbers, positions, where = (torch.from_numpy(part) for part in pack(input_ids.numpy()))
        same = (numbers[:, :, None] == numbers[:, None])[:, None]
        states = own(ids, same, torch.zeros_like(ids), positions, return_dict=True).last_hidden_state
        return BaseModelOutput(last_hidden_state=states.flatten(0, 1)[where])

    text.forward = forward
    try:
        yield
    finally:
        del text.forward
