"""SAM 2 on clips: objects followed from a click on the first frame, judged by J against fp32's masks.

Memories are made of the model's own answers, so what a frame loses the next one starts from: a variant that is near
fp32 on pictures may drift on a clip. J here is the IoU with fp32's mask, averaged over the frames after the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.sam2.cache import EmbeddingCache
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import VIDEO_GRAPHS, Sam2VideoModel
from pixano_edge.engine.runtime.base import Session

from ..data import Clip
from ..result import WorstSample
from .base import Task, TaskOptions
from .sam2 import CACHE_BYTES, Mask, picture, plan_objects

OBJECTS = 2
"""Most objects of a clip."""


@dataclass(frozen=True, eq=False)
class Followed:
    """What is followed: a prompt on the first frame for each object, and the frames' (height, width)."""

    prompts: tuple[Prompt, ...]
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Tracks:
    """Masks of each object in each frame: bits of (O, F, H, W), packed along the last axis."""

    masks: npt.NDArray[np.uint8]

    def mask(self, item: int, frame: int, width: int) -> Mask:
        """(H, W) of one object in one frame."""
        return np.unpackbits(self.masks[item, frame], axis=-1, count=width).view(np.bool_)


class Sam2VideoTask(Task[Clip, Sam2VideoModel, Followed, Tracks]):
    """See the module."""

    metric = "j"
    about = "mean overlap (IoU) of tracked masks with fp32's, over the frames after the first one"
    usual = 0.95
    clips = True
    hint = "Give clips whose first frame shows objects."

    def __init__(self, bundle: Bundle, options: TaskOptions) -> None:
        super().__init__(bundle, options)
        video = sam2_video.constants_of(bundle.manifest.constants)
        if video is None:
            raise CalibrationError(f"Bundle '{bundle.manifest.name}' does not track.", "Leave --video out.")
        self.video = video
        self.constants = Sam2Constants.from_dict(bundle.manifest.constants)
        self._cache = EmbeddingCache(CACHE_BYTES)

    @property
    def graphs(self) -> tuple[str, ...]:
        return (sam2.IMAGE_ENCODER, sam2.MASK_DECODER, *VIDEO_GRAPHS)

    def spec(self, graph: str) -> Any:
        return (sam2.graphs(self.constants) | sam2_video.graphs(self.constants, self.video))[graph]

    def make(self, sessions: Mapping[str, Session], digests: Mapping[str, str]) -> Sam2VideoModel:
        predictor = Sam2ImagePredictor(
            sessions[sam2.IMAGE_ENCODER],
            sessions[sam2.MASK_DECODER],
            self.constants,
            bundle_hash=digests[sam2.IMAGE_ENCODER],
            variant="calibration",
            cache=self._cache,
        )
        return Sam2VideoModel(predictor, dict(sessions), self.video)

    def close(self, model: Sam2VideoModel) -> None:
        """Nothing, as of `Sam2Task`."""

    def plan(self, model: Sam2VideoModel, sample: Clip) -> Followed | None:
        frames = sample.frames()
        try:
            image = frames[0]
        finally:
            frames.close()
        asked = plan_objects(model.predictor, image, (), self.options.seed, OBJECTS)
        if asked is None:
            return None
        return Followed(tuple(asked.prompts[i] for i in asked.multimask), asked.size)

    def answer(self, model: Sam2VideoModel, sample: Clip, plan: Followed) -> Tracks:
        found: list[list[npt.NDArray[np.uint8]]] = [[] for _ in plan.prompts]
        with model.track(sample.frames(), history=False) as tracker:
            for number, prompt in enumerate(plan.prompts):
                tracker.add_prompt(number, 0, prompt)
            for result in tracker.propagate(0, sample.length - 1):
                for item in result.objects:
                    found[item.object_id].append(np.packbits(item.mask, axis=-1))
        return Tracks(np.stack([np.stack(masks) for masks in found]))

    def compare(self, want: Tracks, got: Tracks, plan: Followed) -> float:
        items, frames = want.masks.shape[:2]
        return float(np.mean([self._overlap(want, got, i, t, plan) for i in range(items) for t in range(1, frames)]))

    def draw(self, sample: Clip, plan: Followed, want: Tracks, got: Tracks, value: float) -> WorstSample:
        items, length = want.masks.shape[:2]
        places = [(i, t) for i in range(items) for t in range(1, length)]
        item, frame = min(places, key=lambda at: self._overlap(want, got, at[0], at[1], plan))
        frames = sample.frames()
        try:
            image = frames[frame]
        finally:
            frames.close()
        width = plan.size[1]
        return WorstSample(
            sample.name,
            value,
            f"click on frame 0, shown in frame {frame}",
            picture(image, [want.mask(item, frame, width)], []),
            picture(image, [got.mask(item, frame, width)], []),
        )

    def _overlap(self, want: Tracks, got: Tracks, item: int, frame: int, plan: Followed) -> float:
        width = plan.size[1]
        return mask_iou(want.mask(item, frame, width), got.mask(item, frame, width))
