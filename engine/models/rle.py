"""COCO run-length encoding of binary masks: column-major, compressed counts, size ``[height, width]``.

Encoding uses pycocotools' C code. Decoding is written here because counts come from clients: they are summed and
checked against the size before anything of that size is allocated, which pycocotools' decoder leaves to C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import PromptError

Mask = npt.NDArray[np.bool_]

MAX_PIXELS = 100_000_000


def encode_rle(mask: npt.NDArray[Any]) -> dict[str, Any]:
    """Encodes one mask.

    Args:
        mask: (H, W), bool or uint8 (non-zero is foreground), any strides.

    Returns:
        ``{"size": [H, W], "counts": bytes}``, as pycocotools writes it.

    Raises:
        PromptError: Not two-dimensional, empty, or of another dtype.
    """
    from pycocotools import mask as coco

    if mask.ndim != 2 or mask.size == 0 or mask.dtype not in (np.bool_, np.uint8):
        raise PromptError(
            f"A mask must be a non-empty bool or uint8 array of shape (height, width), "
            f"got {mask.dtype}{list(mask.shape)}.",
            "Threshold logits before encoding them.",
        )
    if mask.dtype != np.bool_:
        mask = mask != 0
    encoded = coco.encode(np.asfortranarray(mask).view(np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": bytes(encoded["counts"])}


def encode_rle_at(part: Mask, corner: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """Encodes a mask that is empty outside a part, without an array of its full size.

    Args:
        part: (h, w) bool, any strides; h and w at least 1.
        corner: x, y of the part's first pixel in the full mask.
        size: (height, width) of the full mask, which holds the part.

    Returns:
        Exactly what `encode_rle` returns for the full mask.
    """
    from pycocotools import mask as coco

    (height, width), (left, top) = part.shape, corner
    # One column after the other, each between two background pixels, so that runs end where columns do.
    framed = np.zeros((width, height + 2), np.bool_)
    framed[:, 1:-1] = part.T
    flat = framed.ravel()
    columns, rows = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), height + 2)
    edges = (left + columns) * size[0] + top + rows
    starts, stops = edges[0::2], edges[1::2]
    # A run that ends at the image's last row goes on in the next column.
    joined = starts[1:] == stops[:-1]
    starts, stops = starts[np.append(True, ~joined)[: len(starts)]], stops[np.append(~joined, True)[: len(stops)]]
    ends = np.concatenate([[0], np.stack([starts, stops], axis=1).ravel(), [size[0] * size[1]]])
    counts = np.diff(ends)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    runs = {"size": [int(n) for n in size], "counts": counts.tolist()}
    encoded = coco.frPyObjects(runs, size[0], size[1])
    return {"size": runs["size"], "counts": bytes(encoded["counts"])}


def decode_rle(rle: Mapping[str, Any], max_pixels: int = MAX_PIXELS) -> Mask:
    """Decodes one mask to (H, W) bool, C-contiguous, owned by the caller.

    Args:
        rle: ``size`` [H, W] and ``counts``: compressed (bytes or ASCII str), or a sequence of run lengths.
        max_pixels: Refuses larger sizes before allocating.

    Raises:
        PromptError: Missing keys, a bad size, or counts that do not fill the size exactly.
    """
    height, width = _size(rle, max_pixels)
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = counts.encode("ascii", errors="replace")
    if isinstance(counts, (bytes, bytearray)):
        runs = _uncompress(bytes(counts))
    elif isinstance(counts, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in counts):
        runs = list(counts)
    else:
        raise _bad(f"'counts' must be bytes, str or a list of integers, got {type(counts).__name__}")
    if any(n < 0 for n in runs):
        raise _bad("a run length is negative")
    if sum(runs) != height * width:
        raise _bad(f"the runs cover {sum(runs)} pixels, the size {height}x{width} has {height * width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape((height, width), order="F"))


def _size(rle: Mapping[str, Any], max_pixels: int) -> tuple[int, int]:
    size = rle.get("size") if isinstance(rle, Mapping) else None
    if (
        not isinstance(size, Sequence)
        or isinstance(size, (str, bytes))
        or len(size) != 2
        or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in size)
    ):
        raise _bad(f"'size' must be [height, width] with positive integers, got {size!r:.60}")
    height, width = int(size[0]), int(size[1])
    if height * width > max_pixels:
        raise _bad(f"size {height}x{width} is larger than {max_pixels} pixels")
    return height, width


def _uncompress(text: bytes) -> list[int]:
    """Run lengths from COCO's ASCII form (``rleFrString`` in pycocotools' maskApi.c).

    Each number is a little-endian run of 5-bit groups plus 48, bit 5 meaning "more", the last group sign-extended;
    from the fourth number on, the difference to the number two places before is stored.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in text:
        group = byte - 48
        if not 0 <= group < 64 or shift > 40:
            raise _bad("'counts' is not a compressed run-length string")
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        if group & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise _bad("'counts' ends in the middle of a number")
    return runs


def _bad(reason: str) -> PromptError:
    return PromptError(f"The run-length mask is malformed: {reason}.", "Send COCO RLE: {size: [h, w], counts}.")
