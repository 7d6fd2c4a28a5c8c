"""Prompts in original pixels to the padded point arrays of the mask decoder.

As in transformers' ``Sam2Model`` (the parity reference) a prompt becomes its points, then its box as two corner
points with labels 2 and 3, then one padding point with label -1; without points and box it becomes two padding
points. A mask input alone counts as "without". Upstream's ``SAM2ImagePredictor`` puts the corners first, which
changes nothing because the decoder's attention ignores the order, and sends no point at all where there is none.

Every padding point is a token of its own and moves the result a little. Prompts with different numbers of points
are therefore never padded to the longest: they are batched by their number of points, and each prompt gets the
answer it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...contracts import sam2
from ...contracts.sam2 import Sam2Constants
from ...errors import PromptError

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

DEFAULT_BATCH = 64
"""Prompts per decoder call."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What marks one object on one image. Points and box combine; all None means "no prompt".

    Attributes:
        points: (N, 2) x, y in pixels of the original image; an empty list means none.
        labels: (N,) 1 foreground, 0 background; None means all foreground.
        box: (4,) x1, y1, x2, y2 in pixels of the original image, x1 < x2 and y1 < y2.
        mask_input: (m, m) or (1, m, m) float32 logits of an earlier answer, m = the bundle's mask size.
    """

    points: npt.ArrayLike | None = None
    labels: npt.ArrayLike | None = None
    box: npt.ArrayLike | None = None
    mask_input: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts with the same number of points, for one decoder call.

    Attributes:
        indices: Position of each prompt in the caller's list.
        point_coords: (P, N, 2) float32 in model pixels, before the half-pixel shift that the graph adds.
        point_labels: (P, N) int32, codes ``LABEL_*`` of the contract.
        masks: Per prompt the (m, m) mask input or None; the arrays are the caller's.
    """

    indices: list[int]
    point_coords: Float32
    point_labels: Int32
    masks: list[Float32 | None]

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the decoder's dynamic dimensions."""
        return {"P": self.point_labels.shape[0], "N": self.point_labels.shape[1]}

    def halves(self) -> list[PromptBatch]:
        """The same prompts as two batches, in order; the arrays are views. For batches of two and more."""
        cut = len(self.indices) // 2
        parts = (slice(None, cut), slice(cut, None))
        return [PromptBatch(self.indices[p], self.point_coords[p], self.point_labels[p], self.masks[p]) for p in parts]


def build_prompts(
    prompts: Sequence[Prompt],
    original_size: tuple[int, int],
    constants: Sam2Constants,
    max_batch: int = DEFAULT_BATCH,
) -> list[PromptBatch]:
    """Checks prompts and groups them into decoder calls.

    Args:
        prompts: At least one; ``[Prompt()]`` asks for the answer without a prompt.
        original_size: (height, width) of the image that the coordinates refer to.
        constants: Image and mask size of the checkpoint.
        max_batch: Most prompts per call.

    Returns:
        Batches that hold every prompt once, in order within each number of points.

    Raises:
        PromptError: No prompt; malformed, NaN or infinite values; labels other than 0 and 1 or not one per point;
            points or box corners more than one image size outside the image (nearer ones are passed on as they
            are, as upstream does); a box without area; a mask input of another shape or dtype; more points than
            the decoder takes.
    """
    if not prompts:
        raise PromptError("No prompt was given.", "Pass at least one; [Prompt()] asks for the answer without a prompt.")
    if not 1 <= max_batch <= sam2.MAX_PROMPTS:
        raise PromptError(
            f"A batch holds 1 to {sam2.MAX_PROMPTS} prompts, got {max_batch}.", "Choose another max_batch."
        )
    height, width = original_size
    scale = np.array([constants.image_size / width, constants.image_size / height])
    groups: dict[int, list[tuple[int, npt.NDArray[np.float64], list[int], Float32 | None]]] = {}
    for index, prompt in enumerate(prompts):
        where = f"Prompt {index}" if len(prompts) > 1 else "The prompt"
        coords, labels = _points(where, prompt, original_size)
        mask = _mask(where, prompt.mask_input, constants.mask_size)
        groups.setdefault(len(labels), []).append((index, coords * scale, labels, mask))
    batches = []
    for group in groups.values():
        for start in range(0, len(group), max_batch):
            part = group[start : start + max_batch]
            batches.append(
                PromptBatch(
                    indices=[index for index, *_ in part],
                    point_coords=np.array([coords for _, coords, _, _ in part], np.float32),
                    point_labels=np.array([labels for _, _, labels, _ in part], np.int32),
                    masks=[mask for *_, mask in part],
                )
            )
    return batches


def _points(where: str, prompt: Prompt, original_size: tuple[int, int]) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Points, box corners and padding of one prompt, in original pixels."""
    points = _floats(where, "points", prompt.points)
    if points.size == 0:
        points = points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise PromptError(
            f"{where}: points must have shape (N, 2), got {list(points.shape)}.", "Send [[x, y], ...] in pixels."
        )
    labels = _labels(where, prompt.labels, len(points))
    box = _floats(where, "box", prompt.box)
    if box.size:
        if box.shape != (4,):
            raise PromptError(f"{where}: a box must have shape (4,), got {list(box.shape)}.", "Send [x1, y1, x2, y2].")
        if not (box[0] < box[2] and box[1] < box[3]):
            raise PromptError(
                f"{where}: the box {box.tolist()} has no area.", "Send [x1, y1, x2, y2] with x1 < x2 and y1 < y2."
            )
        points = np.concatenate([points, box.reshape(2, 2)])
        labels += [sam2.LABEL_BOX_TOP_LEFT, sam2.LABEL_BOX_BOTTOM_RIGHT]
    _check_inside(where, points, original_size)
    padding = 1 if labels else 2
    if len(labels) + padding > sam2.MAX_POINTS:
        raise PromptError(
            f"{where} has {len(labels)} points and box corners; the decoder takes {sam2.MAX_POINTS - 1}.",
            "Send fewer points, or send the previous logits as mask_input with the new points.",
        )
    labels += [sam2.LABEL_PAD] * padding
    return np.concatenate([points, np.zeros((padding, 2))]), labels


def _floats(where: str, what: str, values: npt.ArrayLike | None) -> npt.NDArray[np.float64]:
    if values is None:
        return np.empty(0)
    try:
        given = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise PromptError(f"{where}: {what} cannot be read as numbers: {error}.", "Send numbers only.") from error
    # By the kind, not by trying: numpy would parse texts and take True for 1.
    if given.size and given.dtype.kind not in ("iufb" if what == "labels" else "iuf"):
        raise PromptError(f"{where}: {what} are not numbers (numpy reads them as {given.dtype}).", "Send numbers only.")
    array = given.astype(np.float64)
    if not np.isfinite(array).all():
        raise PromptError(f"{where}: {what} hold NaN or infinity.", "Send finite pixel coordinates.")
    return array


def _labels(where: str, values: npt.ArrayLike | None, count: int) -> list[int]:
    if values is None:
        return [sam2.LABEL_FOREGROUND] * count
    labels = _floats(where, "labels", values)
    if labels.size == 0:
        labels = labels.reshape(0)
    if labels.shape != (count,):
        raise PromptError(
            f"{where}: {count} points but labels of shape {list(labels.shape)}.", "Send one label per point."
        )
    if not np.isin(labels, (sam2.LABEL_BACKGROUND, sam2.LABEL_FOREGROUND)).all():
        raise PromptError(
            f"{where}: labels must be 1 (foreground) or 0 (background), got {labels.tolist()}.",
            "Send boxes as boxes; padding is added here.",
        )
    return [int(label) for label in labels]


def _check_inside(where: str, points: npt.NDArray[np.float64], original_size: tuple[int, int]) -> None:
    height, width = original_size
    size = np.array([width, height])
    far = ((points < -size) | (points > 2 * size)).any(axis=1)
    if far.any():
        raise PromptError(
            f"{where}: ({points[far][0, 0]:g}, {points[far][0, 1]:g}) is far outside the {width}x{height} image.",
            "Send pixels of the original image, not normalised or scaled ones.",
        )


def _mask(where: str, mask: Any, size: int) -> Float32 | None:
    """The mask input as (m, m) view, or None."""
    if mask is None:
        return None
    if (
        not isinstance(mask, np.ndarray)
        or mask.dtype != np.float32
        or mask.shape not in ((size, size), (1, size, size))
    ):
        given = f"{mask.dtype}{list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise PromptError(
            f"{where}: mask_input must be float32[{size}, {size}] or float32[1, {size}, {size}], got {given}.",
            "Send one mask of low_res_logits of an earlier answer.",
        )
    # A sum is not finite when a term is not, and needs no array of the mask's size.
    if not np.isfinite(mask.sum(dtype=np.float64)):
        raise PromptError(f"{where}: mask_input holds NaN or infinity.", "Send logits as they were returned.")
    return mask.reshape(size, size)
