"""Mean J of the small SAM 2 on held-out clips, through the path that training unrolls."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Sam2VideoModel

from pixano_edge.export.demo.clips import LENGTH, first_prompts, generate_clip
from pixano_edge.export.demo.memory_path import MemoryPath, of_objects, track
from pixano_edge.export.demo.sam2_eval import iou
from pixano_edge.export.demo.sam2_model import IMAGE_SIZE, Features, encode, normalise


@torch.no_grad()
def encode_frames(model: Sam2VideoModel, images: torch.Tensor, chunk: int = 8) -> list[Features]:
    """Features of each of T frames (T, S, S, 3) uint8, as one-image batches."""
    features = []
    for part in images.split(chunk):
        many = encode(model, normalise(part))
        features += [
            Features(many.top[i : i + 1], many.s0[i : i + 1], many.s1[i : i + 1], many.position)
            for i in range(len(part))
        ]
    return features


@torch.no_grad()
def held_out_j(model: Sam2VideoModel, clips: int, first: int = 0, length: int = LENGTH) -> dict[str, float]:
    """Mean IoU of all objects over the frames after the first, from one click on it.

    An object that is hidden scores 1 where no mask is given and 0 otherwise. ``first`` is the IoU on the first frame,
    ``J`` what the bars are set on, ``last`` its mean over the last ten frames, ``shown`` over frames where
    at least 100 pixels show, ``hidden`` over those where none does.
    """
    model.eval()
    path = MemoryPath(model)
    found: dict[str, list[float]] = {"first": [], "J": [], "last": [], "shown": [], "hidden": []}
    for seed in range(first, first + clips):
        clip = generate_clip(seed, "heldout", length, IMAGE_SIZE)
        prompts = first_prompts(clip)
        if not prompts:
            continue
        features = encode_frames(model, torch.from_numpy(clip.images))
        owner = torch.zeros(len(prompts), dtype=torch.long)
        clicks = torch.tensor([p.click for p in prompts], dtype=torch.float32)[:, None]
        asked = path.prompted(of_objects(features[0], owner), clicks, torch.ones(len(prompts), 1, dtype=torch.long))
        for frame, answer in enumerate(track(path, features, owner, asked)):
            full = F.interpolate(answer.logits[None], size=clip.images.shape[1:3], mode="bilinear", align_corners=False)
            for mask, prompt in zip((full[0] > 0).numpy(), prompts, strict=True):
                truth = clip.labels[frame] == prompt.index
                value, area = iou(mask, truth), int(truth.sum())
                if frame == 0:
                    found["first"].append(value)
                    continue
                found["J"].append(value)
                if frame >= length - 10:
                    found["last"].append(value)
                if area >= 100:
                    found["shown"].append(value)
                elif not area:
                    found["hidden"].append(value)
    return {name: round(float(np.mean(values)), 4) if values else float("nan") for name, values in found.items()}
