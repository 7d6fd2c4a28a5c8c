"""Automatic mask generation written down plainly: every mask a full array, every rule a loop, PyTorch throughout.

Shares nothing with the engine but the names of the options. It follows the description of upstream's
``SAM2AutomaticMaskGenerator``; `Mistake` leaves out or turns round one rule, for the negative controls.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import interpolate

from tests.support.make_preprocess_reference import torch_reference

Mistake = Literal[
    "",
    "crops pasted at the corner",
    "crops pasted a pixel off",
    "edge filter off",
    "larger crops preferred",
    "no suppression between crops",
    "no suppression within crops",
    "stability of the low-resolution mask",
    "stability filter off",
    "changed masks preferred",
    "small regions left",
    "no second pass",
]


@dataclass
class Reference:
    """One mask: `logits` (H, W) at its place in the image (-inf outside its crop), `mask` (H, W) bool."""

    logits: torch.Tensor
    mask: torch.Tensor
    score: float
    stability: float
    point: tuple[float, float]
    crop: tuple[int, int, int, int]

    @property
    def box(self) -> tuple[int, int, int, int]:
        ys, xs = torch.nonzero(self.mask, as_tuple=True)
        return int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max())


@torch.no_grad()
def reference_masks(model: Any, image: Any, options: Any, mistake: Mistake = "") -> list[Reference]:
    """What the generator should find on an (H, W, 3) uint8 image with transformers' `Sam2Model`."""
    height, width = image.shape[:2]
    everything: list[Reference] = []
    layers = crop_layers(height, width, options)
    for layer, crops in enumerate(layers):
        side = int(options.points_per_side / options.crop_n_points_downscale_factor**layer)
        for crop in crops:
            everything += one_crop(model, image, crop, side, options, mistake)
    if sum(len(crops) for crops in layers) > 1 and mistake != "no suppression between crops":
        sizes = [(c[2] - c[0]) * (c[3] - c[1]) for c in (r.crop for r in everything)]
        sign = 1 if mistake == "larger crops preferred" else -1
        everything = suppress(everything, [sign * s for s in sizes], options.crop_nms_thresh)
    if options.min_mask_region_area and mistake != "small regions left":
        worth = []
        for found in everything:
            before = found.mask
            found.mask = tidy(before, options.min_mask_region_area)
            worth.append(float(torch.equal(before, found.mask)))
        if mistake == "changed masks preferred":
            worth = [1 - w for w in worth]
        everything = suppress(everything, worth, max(options.box_nms_thresh, options.crop_nms_thresh))
    return everything


def crop_layers(height: int, width: int, options: Any) -> list[list[tuple[int, int, int, int]]]:
    layers = [[(0, 0, width, height)]]
    for layer in range(options.crop_n_layers):
        n = 2 ** (layer + 1)
        shared = int(options.crop_overlap_ratio * min(height, width) * 2 / n)
        w, h = math.ceil((width + shared * (n - 1)) / n), math.ceil((height + shared * (n - 1)) / n)
        corners = [(i * (w - shared), j * (h - shared)) for i in range(n) for j in range(n)]
        layers.append([(x, y, min(width, x + w), min(height, y + h)) for x, y in corners])
    return layers


def one_crop(model: Any, image: Any, crop: Any, side: int, options: Any, mistake: Mistake) -> list[Reference]:
    x0, y0, x1, y1 = crop
    full, size = image.shape[:2], (y1 - y0, x1 - x0)
    model_side = model.prompt_encoder.input_image_size
    pixels = torch.from_numpy(torch_reference(np.ascontiguousarray(image[y0:y1, x0:x1]), model_side))
    features = model(pixel_values=pixels).image_embeddings
    found: list[Reference] = []
    for row in range(side):
        for column in range(side):
            x, y = (column + 0.5) / side * size[1], (row + 0.5) / side * size[0]
            for low, score in answers(model, features, x / size[1], y / size[0], options, mistake):
                logits = interpolate(low[None, None], size, mode="bilinear", align_corners=False)[0, 0]
                judged = low if mistake == "stability of the low-resolution mask" else logits
                margin = options.stability_score_offset
                inner, outer = (judged > margin).sum().item(), (judged > -margin).sum().item()
                mask = logits > 0
                if score <= options.pred_iou_thresh or not mask.any():
                    continue
                stability = inner / outer
                if stability < options.stability_score_thresh and mistake != "stability filter off":
                    continue
                placed = torch.full(full, -torch.inf)
                dx, dy = {"crops pasted at the corner": (-x0, -y0), "crops pasted a pixel off": (1, 0)}.get(
                    mistake, (0, 0)
                )
                if crop == (0, 0, full[1], full[0]):
                    dx = dy = 0
                target = placed[y0 + dy : y1 + dy, x0 + dx : x1 + dx]
                target[:] = logits[: target.shape[0], : target.shape[1]]
                one = Reference(placed, placed > 0, score, stability, (x0 + x, y0 + y), crop)
                if mistake == "edge filter off" or not cut_off(one.box, crop, full):
                    found.append(one)
    if mistake == "no suppression within crops":
        return sorted(found, key=lambda f: -f.score)
    return suppress(found, [f.score for f in found], options.box_nms_thresh)


def answers(
    model: Any, features: Any, x: float, y: float, options: Any, mistake: Mistake
) -> list[tuple[torch.Tensor, float]]:
    """Low-resolution logits and predicted IoU for one click at fractions of the crop."""
    point = torch.tensor([[[[x, y]]]], dtype=torch.float64).float() * model.prompt_encoder.input_image_size

    def ask(several: bool, mask: torch.Tensor | None = None) -> list[tuple[torch.Tensor, float]]:
        extra = {} if mask is None else {"input_masks": mask.clamp(-32, 32)[None, None]}
        out = model(image_embeddings=list(features), input_points=point, multimask_output=several, **extra)
        return [(low, float(score)) for low, score in zip(out.pred_masks[0, 0], out.iou_scores[0, 0])]

    first = ask(options.multimask_output)
    if not options.use_m2m or mistake == "no second pass":
        return first
    return [refined for low, _ in first for refined in ask(False, low)]


def cut_off(box: Any, crop: Any, full: tuple[int, int]) -> bool:
    """Whether the box reaches a side of the crop (20 px) that is no side of the image."""
    whole = (0, 0, full[1], full[0])
    for side in range(4):
        at_crop, at_image = abs(box[side] - crop[side]) <= 20, abs(box[side] - whole[side]) <= 20
        if at_crop and not at_image:
            return True
    return False


def suppress(found: list[Reference], worth: list[float], threshold: float) -> list[Reference]:
    kept: list[tuple[Reference, tuple[int, int, int, int]]] = []
    for index in sorted(range(len(found)), key=lambda i: (-worth[i], i)):
        box = found[index].box
        if all(box_iou(box, other) <= threshold for _, other in kept):
            kept.append((found[index], box))
    return [one for one, _ in kept]


def box_iou(a: Any, b: Any) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / total if total else 0.0


def tidy(mask: torch.Tensor, least: int) -> torch.Tensor:
    """Small holes filled, then small islands removed; the largest island stays."""
    filled = mask.clone()
    for region in regions(~mask):
        if len(region) < least:
            filled[tuple(zip(*region))] = True
    islands = regions(filled)
    largest = max(islands, key=len)
    for region in islands:
        if len(region) < least and region is not largest:
            filled[tuple(zip(*region))] = False
    # All islands small: only the largest one is left; ties go to the first.
    return filled


def regions(mask: torch.Tensor) -> list[list[tuple[int, int]]]:
    """Pixels of the 8-connected regions, by flooding."""
    left = {(int(y), int(x)) for y, x in torch.nonzero(mask)}
    found = []
    for start in sorted(left):
        if start not in left:
            continue
        left.remove(start)
        region, queue = [start], deque([start])
        while queue:
            y, x = queue.popleft()
            for near in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if near in left:
                    left.remove(near)
                    region.append(near)
                    queue.append(near)
        found.append(region)
    return found
