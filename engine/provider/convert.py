"""Between the provider's types and the engine's: prompts and tensors in, run lengths and flat arrays out.

Everything read from a request is checked here or by the predictor; both end in `InvalidRequestError`. Requests are
read by attribute name, so the dataclasses of any Pixano version do.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.rle import encode_rle
from ..models.sam2.prompts import Prompt
from .errors import InvalidRequestError
from .types import ArrayData, CompressedRLEData, flat_to_array

Float = npt.NDArray[np.float32]


class LogitsMemory:
    """Which of several masks of an answer scored best, found again from the logits when a client sends them all back.

    Keyed by a digest of the logits, so nothing of tensor size is kept. Not locked: one model, one thread.
    """

    def __init__(self, size: int = 256) -> None:
        self._size = size
        self._best: OrderedDict[bytes, int] = OrderedDict()

    def note(self, logits: Float, scores: Float) -> None:
        """Remembers the best of one prompt's answer: `logits` (M, m, m), `scores` (M,)."""
        self._best[_digest(logits)] = int(np.argmax(scores))
        while len(self._best) > self._size:
            self._best.popitem(last=False)

    def best(self, logits: Float) -> int:
        """Index of the best mask of (M, m, m); 0 when these logits were not sent from here lately."""
        return self._best.get(_digest(logits), 0)


def _digest(array: Float) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()


def read_array(value: Any, what: str) -> Float:
    """A request's ``{values, shape}`` as a new float32 array; of `ArrayData` the memory is used, not copied.

    Raises:
        InvalidRequestError: Not of that kind, values and shape disagree, or NaN or infinite values.
    """
    values, shape = getattr(value, "values", None), getattr(value, "shape", None)
    if shape is None or values is None or callable(values):
        raise InvalidRequestError(f"{what} must be an array with 'values' and 'shape'.", "Send back what you received.")
    try:
        with np.errstate(over="ignore"):
            array = value.to_array() if isinstance(value, ArrayData) else flat_to_array(values, shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(f"{what} is malformed: {error}.", "Send a flat list in C order.") from error
    if not np.isfinite(array).all():
        raise InvalidRequestError(f"{what} holds NaN or infinite values.", "Send back what you received, unchanged.")
    return array


def read_features(request: Any) -> tuple[Float, list[Float]] | None:
    """Image embedding and finer maps of a request, or None when it carries none; the predictor checks their shapes.

    Raises:
        InvalidRequestError: One without the other, or no arrays.
    """
    embedding = getattr(request, "image_embedding", None)
    finer = getattr(request, "high_resolution_features", None) or None
    if embedding is None and finer is None:
        return None
    if embedding is None or finer is None:
        raise InvalidRequestError(
            "image_embedding and high_resolution_features must come together.",
            "Send both as received, or neither: the image is encoded then.",
        )
    if not isinstance(finer, Sequence):
        raise InvalidRequestError("high_resolution_features must be a list of arrays.", "Send them as received.")
    return (
        read_array(embedding, "image_embedding"),
        [read_array(f, f"high_resolution_features[{i}]") for i, f in enumerate(finer)],
    )


def read_multimask(request: Any) -> bool:
    """Whether three masks per prompt are wanted.

    Raises:
        InvalidRequestError: Three masks are what SAM 2 gives; another number was asked for.
    """
    multimask = bool(getattr(request, "multimask_output", True))
    number = getattr(request, "num_multimask_outputs", 3)
    if multimask and number != 3:
        raise InvalidRequestError(
            f"num_multimask_outputs must be 3 when multimask_output is true, got {number!r}.",
            "Ask for 3 masks, or set multimask_output to false for one.",
        )
    return multimask


MAX_PROMPTS = 1000
"""Prompts of one request. Each costs the decoder a millisecond or more, and a body has room for millions."""


def read_prompts(request: Any, mask_size: int, memory: LogitsMemory) -> list[Prompt]:
    """The P prompts of a request. Points, labels, boxes and masks with the same index belong together.

    None and ``[]`` mean absent, for a whole list and for one prompt's entry. Nothing at all is one empty prompt.
    Absent labels are foreground. The values are checked by `build_prompts` once the image's size is known.

    Args:
        request: Any of the mask generation inputs.
        mask_size: Side m of the mask logits.
        memory: Finds the best of several mask inputs.

    Raises:
        InvalidRequestError: Lists of different lengths, no lists, more than `MAX_PROMPTS`, or a mask input of the
            wrong shape.
    """
    points, labels, boxes = (_per_prompt(request, key) for key in ("points", "labels", "boxes"))
    counts = {key: len(v) for key, v in (("points", points), ("labels", labels), ("boxes", boxes)) if v}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{n} {key}" for key, n in counts.items())
        raise InvalidRequestError(f"The prompts disagree: {listed}.", "Send one entry per prompt in each list.")
    given = getattr(request, "mask_input", None)
    logits = None if given is None else read_array(given, "mask_input")
    count = next(iter(counts.values()), _mask_count(logits))
    if count > MAX_PROMPTS:
        raise InvalidRequestError(
            f"{count} prompts are more than {MAX_PROMPTS}.", "Ask for their masks in several requests."
        )
    masks: Sequence[Float | None]
    masks = [None] * count if logits is None else _split_masks(logits, count, mask_size, memory)
    return [
        Prompt(
            points=points[i] if points else None,
            labels=labels[i] if labels else None,
            box=boxes[i] if boxes else None,
            mask_input=masks[i],
        )
        for i in range(count)
    ]


def _per_prompt(request: Any, key: str) -> Sequence[Any]:
    value = getattr(request, key, None)
    if value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        raise InvalidRequestError(
            f"{key} must be a list, got {type(value).__name__}.", "The outermost list has one entry per prompt."
        )
    return list(value)


def _mask_count(logits: Float | None) -> int:
    """Prompts when only masks are given: (P, 1, m, m) says how many, everything else is one."""
    return logits.shape[0] if logits is not None and logits.ndim == 4 and logits.shape[0] else 1


def _split_masks(logits: Float, count: int, size: int, memory: LogitsMemory) -> list[Float | None]:
    """One (m, m) mask per prompt from (m, m), (1, m, m), (P, m, m), (P, 1, m, m) or several per prompt.

    Of several (M, m, m) for one prompt the best by score is taken when the answer they came from is remembered,
    otherwise the first.
    """
    if logits.ndim == 2:
        logits = logits[None]
    if logits.ndim == 3:
        logits = logits[None] if count == 1 else logits[:, None]
    if logits.ndim != 4 or logits.shape[0] != count or not logits.shape[1] or logits.shape[2:] != (size, size):
        raise InvalidRequestError(
            f"mask_input has the wrong shape for {count} prompt(s) and masks of {size}x{size}.",
            f"Send [1, {size}, {size}], [{size}, {size}] or [{count}, 1, {size}, {size}].",
        )
    return [one[memory.best(one) if len(one) > 1 else 0] for one in logits]


def rle_of(mask: npt.NDArray[np.bool_]) -> CompressedRLEData:
    """One (H, W) mask as run lengths."""
    encoded = encode_rle(mask)
    return CompressedRLEData(size=list(encoded["size"]), counts=bytes(encoded["counts"]))
