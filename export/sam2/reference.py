"""What PyTorch answers: the stock `Sam2Model.forward`, asked one prompt at a time.

Nothing here uses the export wrappers or the engine, so a mistake in either shows as a difference. Pre-processing is
torch's own antialiased interpolation on values 0..1, as in upstream's ``sam2/utils/transforms.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.export.photos import Photo

FloatArray = npt.NDArray[np.float32]
LOGIT_LIMIT = 32.0
"""Upstream clamps the logits it hands back as a mask prompt."""


@dataclass(frozen=True)
class PromptCase:
    """One prompt in original pixels.

    Attributes:
        name: Kind of prompt, for the report.
        points: (N, 2) float32 x, y; N may be 0.
        labels: (N,) int32, 1 inside and 0 outside the object.
        box: (4,) float32 x0, y0, x1, y1, or None.
        mask: (mask_size, mask_size) float32 logits, or None.
    """

    name: str
    points: FloatArray
    labels: npt.NDArray[np.int32]
    box: FloatArray | None = None
    mask: FloatArray | None = None


@dataclass(frozen=True)
class Answer:
    """Stock outputs for one prompt: `masks` (1, 4, m, m), `iou_scores` (1, 4), `object_score_logits` (1, 1)."""

    masks: FloatArray
    iou_scores: FloatArray
    object_score_logits: FloatArray


@dataclass(frozen=True)
class Features:
    """Stock image features, and the pixels they come from.

    Attributes:
        pixel_values: (1, 3, S, S) float32.
        arrays: The encoder's outputs by contract name.
        tensors: The same as the list that `Sam2Model.forward(image_embeddings=...)` takes.
    """

    pixel_values: FloatArray
    arrays: dict[str, FloatArray]
    tensors: list[Tensor]


def preprocess(pixels: npt.NDArray[np.uint8], constants: Sam2Constants) -> Tensor:
    """(H, W, 3) uint8 RGB to the normalised (1, 3, S, S) float32 input."""
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255
    side = constants.image_size
    image = torch.nn.functional.interpolate(
        image, size=(side, side), mode="bilinear", align_corners=False, antialias=True
    )
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (constants.mean, constants.std))
    return (image - mean) / std


@torch.no_grad()
def encode(model: Any, photo: Photo, constants: Sam2Constants) -> Features:
    """Image features of the stock forward on `pixel_values`."""
    pixels = preprocess(photo.pixels, constants)
    # No prompt: the features do not depend on it.
    high_0, high_1, embed = model(pixel_values=pixels).image_embeddings
    arrays = {contract.IMAGE_EMBED: embed, contract.HIGH_RES_0: high_0, contract.HIGH_RES_1: high_1}
    return Features(pixels.numpy(), {k: v.numpy() for k, v in arrays.items()}, [high_0, high_1, embed])


@torch.no_grad()
def answer(model: Any, features: Features, case: PromptCase, size: tuple[int, int], constants: Sam2Constants) -> Answer:
    """Masks 1..3 of the stock multimask forward, and mask 0 of the single-mask forward without its fallback."""
    scale = torch.tensor([constants.image_size / size[1], constants.image_size / size[0]])
    prompt: dict[str, Tensor] = {}
    if len(case.points):
        prompt["input_points"] = (torch.from_numpy(case.points) * scale)[None, None]
        prompt["input_labels"] = torch.from_numpy(case.labels)[None, None]
    if case.box is not None:
        prompt["input_boxes"] = (torch.from_numpy(case.box).reshape(2, 2) * scale).reshape(1, 1, 4)
    if case.mask is not None:
        prompt["input_masks"] = torch.from_numpy(case.mask)[None, None]
    multi = model(image_embeddings=features.tensors, multimask_output=True, **prompt)
    with single_mask_as_is(model):
        single = model(image_embeddings=features.tensors, multimask_output=False, **prompt)
    return Answer(
        masks=torch.cat([single.pred_masks, multi.pred_masks], dim=2)[0].numpy(),
        iou_scores=torch.cat([single.iou_scores, multi.iou_scores], dim=2)[0].numpy(),
        object_score_logits=multi.object_score_logits[0].numpy(),
    )


@contextmanager
def single_mask_as_is(model: Any) -> Iterator[None]:
    """Switches off the stability fallback, which would replace mask 0 by one of the others."""
    before = model.mask_decoder.dynamic_multimask_via_stability
    model.mask_decoder.dynamic_multimask_via_stability = False
    try:
        yield
    finally:
        model.mask_decoder.dynamic_multimask_via_stability = before


def decoder_feeds(
    cases: Sequence[PromptCase], size: tuple[int, int], constants: Sam2Constants
) -> dict[str, npt.NDArray[Any]]:
    """Contract inputs of the mask decoder for prompts with equal numbers of points: box corners, points, padding."""
    scale = np.array([constants.image_size / size[1], constants.image_size / size[0]], np.float32)
    coords, labels = [], []
    for case in cases:
        corners = np.zeros((0, 2), np.float32) if case.box is None else case.box.reshape(2, 2)
        codes = [contract.LABEL_BOX_TOP_LEFT, contract.LABEL_BOX_BOTTOM_RIGHT][: len(corners)]
        # The stock forward pads a prompt with neither points nor box twice.
        padding = 1 if len(case.points) or len(corners) else 2
        coords.append(np.concatenate([corners * scale, case.points * scale, np.zeros((padding, 2), np.float32)]))
        labels.append([*codes, *case.labels.tolist(), *[contract.LABEL_PAD] * padding])
    side = constants.mask_size
    masks = [np.zeros((side, side), np.float32) if c.mask is None else c.mask for c in cases]
    return {
        contract.POINT_COORDS: np.stack(coords).astype(np.float32),
        contract.POINT_LABELS: np.array(labels, np.int32),
        contract.MASK_INPUT: np.stack(masks)[:, None],
        contract.HAS_MASK_INPUT: np.array([c.mask is not None for c in cases], np.float32),
    }


def make_cases(
    model: Any, features: Features, size: tuple[int, int], constants: Sam2Constants, seed: int
) -> list[list[PromptCase]]:
    """Groups of prompts (equal numbers of points within a group) that use every input of the decoder.

    Clicks, several clicks of both labels, boxes, boxes with a click, a mask prompt beside a prompt without one, and
    a mask prompt alone. The mask prompt is what the model itself answers to the first click.
    """
    rng = np.random.default_rng(seed)
    height, width = size

    def points(count: int) -> FloatArray:
        return (rng.uniform(0.05, 0.95, (count, 2)) * (width, height)).astype(np.float32)

    def box() -> FloatArray:
        x, y = np.sort(rng.uniform(0.02, 0.98, (2, 2)), axis=1)
        return np.array([x[0] * width, y[0] * height, x[1] * width, y[1] * height], np.float32)

    def labels(*values: int) -> npt.NDArray[np.int32]:
        return np.array(values, np.int32)

    none = np.zeros((0, 2), np.float32)
    clicks = [PromptCase("click", points(1), labels(1)) for _ in range(3)]
    first = answer(model, features, clicks[0], size, constants)
    best = first.masks[0, 1 + int(first.iou_scores[0, 1:].argmax())]
    mask = np.clip(best, -LOGIT_LIMIT, LOGIT_LIMIT)
    return [
        clicks,
        [PromptCase("clicks", points(3), labels(*values)) for values in ((1, 0, 1), (1, 1, 0))],
        [PromptCase("box", none, labels(), box()) for _ in range(2)],
        [PromptCase("box and click", points(1), labels(value), box()) for value in (0, 1)],
        [PromptCase("mask and clicks", points(2), labels(1, 0), mask=m) for m in (mask, None)],
        [PromptCase("mask", none, labels(), mask=mask)],
    ]
