"""Golden samples: a picture, prompts and PyTorch's answers inside the bundle, so a box without torch can check itself.

Keys of each ``golden/<name>.npz`` (P prompts, N point slots, m = mask_size; all arrays little-endian, no pickles):

=====================  ================  ====================================================================
key                    shape, dtype      meaning
=====================  ================  ====================================================================
original_size          (2,) int32        height and width of the picture
points                 (P, N, 2) float32 x, y in original pixels
labels                 (P, N) int32      1 inside, 0 outside, -1 slot not used (drop it, it is no padding point)
boxes                  (P, 4) float32    x0, y0, x1, y1 in original pixels; NaN where the prompt has no box
mask_input             (P, m, m) float32 mask prompt, logits; zeros where has_mask_input is 0
has_mask_input         (P,) float32      1 where the prompt has a mask
low_res_logits         (P, 4, m, m)      float32, all four masks, not thresholded
iou_scores             (P, 4) float32    predicted IoU of the four masks
object_score_logits    (P, 1) float32    object score
<tensor>_index         (K,) int64        flat C-order positions in <tensor>
<tensor>_values        (K,) float32      values there
=====================  ================  ====================================================================

``<tensor>`` is each of ``pixel_values``, ``image_embed``, ``high_res_0``, ``high_res_1`` of the contract: a sample of
K values spread evenly, since whole features would weigh megabytes. Prompts are answered one at a time (P of a call
is 1), as the number of points differs; answering prompts 0 and 1 in one call is not the same computation.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixano_edge.engine.bundle.manifest import GoldenSample
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.export.photos import Photo, reduce
from pixano_edge.export.sam2 import reference
from pixano_edge.export.sam2.reference import PromptCase

SAMPLES = 2
FEATURE_VALUES = 512
MAX_SIDE = 384


def add_golden(
    writer: BundleWriter, model: Any, photos: Sequence[Photo], constants: Sam2Constants
) -> list[GoldenSample]:
    """Writes `SAMPLES` golden samples into the bundle and returns their manifest entries."""
    samples = []
    for index, photo in enumerate(photos[:SAMPLES]):
        small = reduced(photo, constants)
        name = f"golden-{index}"
        buffer = io.BytesIO()
        # PNG: every decoder gives the same pixels, which JPEG does not promise.
        Image.fromarray(small.pixels).save(buffer, format="PNG", optimize=True)
        writer.add_file(f"golden/{name}.png", buffer.getvalue())
        arrays: dict[str, Any] = {**make_sample(model, small, constants)}
        stored = io.BytesIO()
        np.savez_compressed(stored, **arrays)
        writer.add_file(f"golden/{name}.npz", stored.getvalue())
        samples.append(GoldenSample(name=name, image=f"golden/{name}.png", tensors=f"golden/{name}.npz"))
    return samples


def reduced(photo: Photo, constants: Sam2Constants) -> Photo:
    """A photo as it is stored in the bundle."""
    return dataclasses.replace(photo, pixels=reduce(photo.pixels, min(MAX_SIDE, 2 * constants.image_size)))


def picture_note(sample: GoldenSample, photo: Photo) -> str:
    """Manifest note that says whose picture a golden sample holds."""
    origin = photo.origin or "the user's own picture; its rights go with every copy of this bundle"
    return f"{sample.image} is {photo.name}, reduced ({origin})."


def make_sample(model: Any, photo: Photo, constants: Sam2Constants) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one golden sample: one click; a box with a click outside the object and a mask prompt."""
    features = reference.encode(model, photo, constants)
    cases = _cases(model, features, photo, constants)
    answers = [reference.answer(model, features, case, photo.size, constants) for case in cases]
    slots = max(len(c.points) for c in cases)
    side = constants.mask_size
    arrays: dict[str, npt.NDArray[Any]] = {
        "original_size": np.array(photo.size, np.int32),
        "points": np.zeros((len(cases), slots, 2), np.float32),
        "labels": np.full((len(cases), slots), -1, np.int32),
        "boxes": np.full((len(cases), 4), np.nan, np.float32),
        "mask_input": np.zeros((len(cases), side, side), np.float32),
        "has_mask_input": np.zeros(len(cases), np.float32),
        "low_res_logits": np.concatenate([a.masks for a in answers]),
        "iou_scores": np.concatenate([a.iou_scores for a in answers]),
        "object_score_logits": np.concatenate([a.object_score_logits for a in answers]),
    }
    for row, case in enumerate(cases):
        arrays["points"][row, : len(case.points)] = case.points
        arrays["labels"][row, : len(case.labels)] = case.labels
        if case.box is not None:
            arrays["boxes"][row] = case.box
        if case.mask is not None:
            arrays["mask_input"][row] = case.mask
            arrays["has_mask_input"][row] = 1
    for name, value in {contract.PIXEL_VALUES: features.pixel_values, **features.arrays}.items():
        index = np.linspace(0, value.size - 1, min(FEATURE_VALUES, value.size)).astype(np.int64)
        arrays[f"{name}_index"] = index
        arrays[f"{name}_values"] = value.reshape(-1)[index]
    return arrays


def _cases(model: Any, features: reference.Features, photo: Photo, constants: Sam2Constants) -> list[PromptCase]:
    height, width = photo.size

    def at(*fractions: float) -> npt.NDArray[np.float32]:
        return (np.array(fractions, np.float32).reshape(-1, 2) * (width, height)).astype(np.float32)

    click = PromptCase("click", at(0.47, 0.53), np.array([1], np.int32))
    first = reference.answer(model, features, click, photo.size, constants)
    best = 1 + int(first.iou_scores[0, 1:].argmax())
    # Rounded to a quarter: a coarser mask prompt compresses well and is as good a prompt.
    mask = np.round(np.clip(first.masks[0, best], -reference.LOGIT_LIMIT, reference.LOGIT_LIMIT) * 4) / 4
    corrected = PromptCase(
        "box, click and mask",
        at(0.31, 0.22, 0.62, 0.71),
        np.array([0, 1], np.int32),
        at(0.21, 0.18, 0.83, 0.77).reshape(4),
        mask.astype(np.float32),
    )
    return [click, corrected]
