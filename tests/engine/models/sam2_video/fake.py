"""Tracking graphs as numpy functions in which every input moves the masks.

So the tracker's own rules, its order of work and its memory are tested without any back end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.contracts.sam2_video import Sam2VideoConstants
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel
from pixano_edge.engine.runtime import StubDevice, StubSession
from tests.engine.models.sam2.fake import CONSTANTS, SPECS, decode, encode

VIDEO = Sam2VideoConstants(
    memory_dim=4,
    num_memories=7,
    max_pointers=16,
    max_cond_frames=-1,
    multimask_min_points=0,
    multimask_max_points=1,
    multimask_in_sam=True,
    multimask_for_tracking=True,
    mask_kernel=(0.0625,) * 16 + (0.0,),
)
VIDEO_SPECS = sam2_video.graphs(CONSTANTS, VIDEO)


def attend(inputs: dict[str, Any]) -> Mapping[str, Any]:
    """The frame, plus memories and pointers weighted by their times."""
    weights = 1 + inputs[sam2_video.MEMORY_TIME].astype(np.float32)
    maps = np.einsum("bm,bmcyx->byx", weights, inputs[sam2_video.MEMORY]) / 20
    pointers = np.einsum("bk,bkc->bc", 1 + inputs[sam2_video.POINTER_TIME], inputs[sam2_video.POINTERS]) / 20
    embed = inputs[sam2.IMAGE_EMBED] + maps[:, None] + pointers[:, :, None, None]
    return {sam2_video.TRACKED_EMBED: np.tanh(embed).astype(np.float32)}


def decode_tracked(inputs: dict[str, Any]) -> Mapping[str, Any]:
    """The image decoder's disc where there are points, else the embedding; tokens tell which mask they belong to."""
    plain = decode({**inputs, sam2.IMAGE_EMBED: inputs[sam2_video.TRACKED_EMBED]})
    embed = inputs[sam2_video.TRACKED_EMBED]
    large = embed.mean(axis=1).repeat(4, 1).repeat(4, 2)
    large = large + inputs[sam2.HIGH_RES_0][0, 0] / 10
    prompted = (inputs[sam2.POINT_LABELS] >= 0).any(axis=1)[:, None, None, None]
    spread = np.array([0.5, 1.0, 1.5, -1.0], np.float32)[None, :, None, None]
    tracked = (large - np.median(large, axis=(1, 2), keepdims=True))[:, None] * spread * 30
    masks = np.where(prompted, plain[sam2.MASKS], tracked).astype(np.float32)
    skip = inputs[sam2_video.SKIP_NO_MEMORY][:, None, None]
    tokens = embed.mean(axis=(2, 3))[:, None] * np.arange(1, 5, dtype=np.float32)[None, :, None] + skip
    return {
        sam2.MASKS: masks,
        sam2.IOU_SCORES: plain[sam2.IOU_SCORES],
        sam2.OBJECT_SCORE_LOGITS: (1 + embed[:, 0, 0, :1]).astype(np.float32),
        sam2_video.MASK_TOKENS: tokens.astype(np.float32),
    }


def remember(inputs: dict[str, Any]) -> Mapping[str, Any]:
    """The mask and the frame in the map, rounded to bfloat16 as the real graph's; the token in the pointer."""
    logits = np.where(inputs[sam2.OBJECT_SCORE_LOGITS][:, :, None, None] > 0, inputs[sam2_video.MASK_LOGITS], -1.0)
    count, step = len(logits), logits.shape[2] // 8
    small = logits[:, 0].reshape(count, 8, step, 8, step).mean(axis=(2, 4))
    binarize = inputs[sam2_video.BINARIZE][:, None, None]
    small = np.where(binarize > 0, np.sign(small), np.tanh(small)) + inputs[sam2.IMAGE_EMBED].mean() / 10
    maps = (small[:, None] * np.arange(1, 5)[None, :, None, None] / 4).astype(np.float32)
    maps = (maps.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    pointer = np.tanh(inputs[sam2_video.MASK_TOKEN] + inputs[sam2_video.POINTER_SCORE_LOGITS])
    return {sam2_video.MEMORY_FEATURES: maps, sam2_video.OBJECT_POINTER: pointer.astype(np.float32)}


FUNCTIONS: dict[str, Callable[[dict[str, Any]], Mapping[str, Any]]] = {
    sam2.IMAGE_ENCODER: lambda inputs: {k: v / 255 for k, v in encode(inputs).items()},
    sam2.MASK_DECODER: decode,
    sam2_video.MEMORY_ATTENTION: attend,
    sam2_video.TRACK_DECODER: decode_tracked,
    sam2_video.MEMORY_ENCODER: remember,
}


def fake_model(device: StubDevice | None = None, **changed: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Any:
    """A `Sam2VideoModel` on a stub device, with other functions for some graphs."""
    device = device or StubDevice()
    sessions: dict[str, Any] = {
        name: StubSession(spec, device, changed.get(name, FUNCTIONS[name]), capturable=True)
        for name, spec in {**SPECS, **VIDEO_SPECS}.items()
    }
    predictor = Sam2ImagePredictor(
        sessions[sam2.IMAGE_ENCODER], sessions[sam2.MASK_DECODER], CONSTANTS, bundle_hash="fake", variant="fp32"
    )
    return Sam2VideoModel(predictor, sessions, VIDEO)


def clip(count: int, height: int = 40, width: int = 60) -> list[np.ndarray]:
    """Frames of a bright block that moves over noise."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    frames = []
    for i in range(count):
        frame = ground.copy()
        x = i % (width - 15)
        frame[10:28, x : x + 14] = 200 + i % 50
        frames.append(frame)
    return frames
