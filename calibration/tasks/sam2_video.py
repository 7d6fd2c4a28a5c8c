"""SAM 2 on clips: objects followed from a click on the first frame, judged by J against fp32's masks.

Memories are made of the model's own answers, so what a frame loses the next one starts from: a variant that is near
fp32 on pictures may drift on a clip. J here is the IoU with fp32's mask, averaged over the frames after the first one.

Where graphs of pictures may change too, the first frame is asked about like a picture, and the lower of both figures is
the clip's: otherwise nobody would look at what the mask decoder answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.engine.models.images import Rgb
from pixano_edge.engine.models.rle import decode_rle, encode_rle
from pixano_edge.engine.models.sam2.cache import EmbeddingCache
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import VIDEO_GRAPHS, Sam2VideoModel
from pixano_edge.engine.runtime.base import Session

from ..data import Clip
from ..result import WorstSample
from .base import Task, TaskOptions
from .sam2 import CACHE_BYTES, Answered, Asked, Rle, agreement, answer_objects, picture, plan_objects, rle_iou

OBJECTS = 2
"""Most objects of a clip."""


@dataclass(frozen=True, eq=False)
class Followed:
    """What is followed: a prompt on the first frame for each object; and what is asked about that frame, or None."""

    prompts: tuple[Prompt, ...]
    asked: Asked | None = None


@dataclass(frozen=True, eq=False)
class Tracks:
    """Masks of each object in each frame, as run lengths; and the answers about the first frame, or None."""

    masks: tuple[tuple[Rle, ...], ...]
    answered: Answered | None = None

    def j(self, other: Tracks) -> float:
        """Mean overlap over the frames after the first one."""
        return float(np.mean([rle_iou(*pair) for own in zip(self.masks, other.masks) for pair in list(zip(*own))[1:]]))


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
        asked = plan_objects(model.predictor, self._first(sample), (), self.options.seed, OBJECTS)
        if asked is None:
            return None
        return Followed(tuple(asked.prompts[i] for i in asked.multimask), asked if self.options.pictures else None)

    def answer(self, model: Sam2VideoModel, sample: Clip, plan: Followed) -> Tracks:
        answered = answer_objects(model.predictor, self._first(sample), plan.asked) if plan.asked else None
        found: list[list[Rle]] = [[] for _ in plan.prompts]
        with model.track(sample.frames(), history=False) as tracker:
            for number, prompt in enumerate(plan.prompts):
                tracker.add_prompt(number, 0, prompt)
            for result in tracker.propagate(0, sample.length - 1):
                for item in result.objects:
                    found[item.object_id].append(encode_rle(item.mask))
        return Tracks(tuple(map(tuple, found)), answered)

    def compare(self, want: Tracks, got: Tracks, plan: Followed) -> float:
        j = want.j(got)
        if want.answered is None or got.answered is None:
            return j
        return min(j, agreement(want.answered, got.answered))

    def draw(self, sample: Clip, plan: Followed, want: Tracks, got: Tracks, value: float) -> WorstSample:
        places = [(i, t) for i in range(len(want.masks)) for t in range(1, len(want.masks[0]))]
        item, frame = min(places, key=lambda at: rle_iou(want.masks[at[0]][at[1]], got.masks[at[0]][at[1]]))
        frames = sample.frames()
        try:
            image = frames[frame]
        finally:
            frames.close()
        return WorstSample(
            sample.name,
            value,
            f"click on frame 0, shown in frame {frame}",
            picture(image, [decode_rle(want.masks[item][frame])], []),
            picture(image, [decode_rle(got.masks[item][frame])], []),
        )

    def _first(self, sample: Clip) -> Rgb:
        """The first frame."""
        frames = sample.frames()
        try:
            return frames[0]
        finally:
            frames.close()
