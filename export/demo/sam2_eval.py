"""IoU of the small SAM 2 on held-out scenes, through the stock ``Sam2Model`` computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Sam2VideoModel

from pixano_edge.export.demo.sam2_model import IMAGE_SIZE, decode, encode, normalise
from pixano_edge.export.demo.scenes import generate_scene, held_out_prompts


def iou(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Intersection over union of two bool masks of one shape; 1 for two empty ones."""
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


@torch.no_grad()
def held_out_iou(model: Sam2VideoModel, scenes: int, first: int = 0) -> dict[str, float]:
    """Mean IoU over all evaluated objects of ``scenes`` held-out scenes, by one click and by the box.

    A click takes the candidate of highest predicted IoU among 1 to 3, a box takes candidate 0; logits are
    resized bilinearly to the scene and cut at 0.
    """
    model.eval()
    found: dict[str, list[float]] = {"click": [], "box": []}
    for seed in range(first, first + scenes):
        scene = generate_scene(seed, "heldout", IMAGE_SIZE)
        prompts = held_out_prompts(scene)
        if not prompts:
            continue
        features = encode(model, normalise(torch.from_numpy(scene.image)[None]))
        clicks = torch.tensor([p.click for p in prompts], dtype=torch.float32)[None, :, None]
        corners = torch.tensor([p.box for p in prompts], dtype=torch.float32).reshape(1, -1, 2, 2)
        by_click = decode(model, features, clicks, torch.ones(clicks.shape[:3], dtype=torch.long))
        by_box = decode(model, features, corners, torch.tensor([2, 3]).expand(1, len(prompts), 2))
        best = by_click.iou[0, :, 1:].argmax(-1) + 1
        rows = torch.arange(len(prompts))
        for kind, logits in (("click", by_click.logits[0, rows, best]), ("box", by_box.logits[0, :, 0])):
            full = F.interpolate(logits[None], size=scene.image.shape[:2], mode="bilinear", align_corners=False)[0]
            masks = (full > 0).numpy()
            found[kind] += [iou(m, scene.objects[p.index].visible) for m, p in zip(masks, prompts, strict=True)]
    return {kind: round(float(np.mean(values)), 4) for kind, values in found.items()}
