"""Parity of the video graphs with PyTorch: every output tensor, and the masks of a short clip that is tracked.

Tensors: each graph gets what PyTorch's own modules got (`video_cases`). Clip: the engine's tracker on the exported
graphs against the stock predictor with its sessions, two objects, with a correction in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pixano_edge.engine.bundle.manifest import ClipParity, TensorParity
from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.contracts.sam2_video import Sam2VideoConstants
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2_video.clip import (
    TOLERANCE,
    Clip,
    bfloat16_distance,
    clip_iou,
    follow,
    moving_clip,
)
from pixano_edge.engine.models.sam2_video.frames import open_frames
from pixano_edge.engine.models.sam2_video.steps import Stepper
from pixano_edge.engine.models.sam2_video.tracker import VideoTracker
from pixano_edge.engine.runtime import open_device, open_session
from pixano_edge.export.differences import Worst
from pixano_edge.export.photos import Photo
from pixano_edge.export.sam2.parity import Runner
from pixano_edge.export.sam2.video_cases import GraphCase, Modules, make_cases
from pixano_edge.export.sam2.video_clip import find_clip
from pixano_edge.export.sam2.video_reference import Answer, VideoReference

Mask = npt.NDArray[np.bool_]
FRAMES = 8


@dataclass(frozen=True, eq=False)
class ClipAnswer:
    """PyTorch's mask of one object on one frame.

    Attributes:
        mask: (h, w) bool at the size of the frames.
        undecided: Pixels nearer to the threshold than `clip.TOLERANCE` allows for.
        score: Object score logit.
    """

    mask: Mask
    undecided: Mask
    score: float


@dataclass(frozen=True, eq=False)
class VideoSuite:
    """Everything PyTorch answered, computed once and compared with every variant.

    Attributes:
        constants: Of the checkpoint.
        video: Of the checkpoint.
        cases: Single calls.
        clip: The clip.
        frames: Its frames.
        answers: Masks by object, in `Clip.order`.
    """

    constants: Sam2Constants
    video: Sam2VideoConstants
    cases: list[GraphCase]
    clip: Clip
    frames: list[npt.NDArray[np.uint8]]
    answers: list[dict[int, ClipAnswer]]

    @property
    def shown(self) -> int:
        """Masks of the answers that are not empty."""
        return sum(bool(a.mask.any()) for answers in self.answers for a in answers.values())


def build_suite(model: Any, photos: Sequence[Photo], constants: Sam2Constants, video: Sam2VideoConstants) -> VideoSuite:
    """Asks the stock model about a clip of the first photo, and its modules about single calls."""
    photo = photos[0]
    frames = moving_clip(photo.size, FRAMES).frames(photo.pixels)
    reference = VideoReference(model, frames, constants)
    clip = find_clip(reference, photo.size, frames)
    answers = answer_clip(reference, clip, frames[0].shape[:2], constants)
    features = [reference.features(i) for i in range(0, FRAMES, 2)]
    modules = Modules(model, constants, video)
    cases = make_cases(modules, features, [reference.stored(i) for i in clip.objects], video, seed=0)
    return VideoSuite(constants, video, cases, clip, frames, answers)


def answer_clip(
    reference: VideoReference, clip: Clip, size: tuple[int, ...], constants: Sam2Constants
) -> list[dict[int, ClipAnswer]]:
    """The stock predictor's masks at the size of the frames."""
    return [
        {number: _at_size(answer, size, constants.mask_threshold) for number, answer in answers.items()}
        for answers in reference.follow(clip)
    ]


def _at_size(answer: Answer, size: tuple[int, ...], threshold: float) -> ClipAnswer:
    logits, score = answer
    tensor = torch.from_numpy(logits)[None, None]
    full = torch.nn.functional.interpolate(tensor, size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
    above = full.numpy() - np.float32(threshold)
    return ClipAnswer(above > 0, np.abs(above) <= TOLERANCE * float(np.abs(logits).max()), score)


def compare_tensors(run: Runner, suite: VideoSuite, variant: str) -> list[TensorParity]:
    """Worst error of every output of the video graphs."""
    specs = sam2_video.graphs(suite.constants, suite.video)
    worst = {(g.name, t.name): Worst() for g in specs.values() for t in g.outputs}
    for case in suite.cases:
        got = run(case.graph, case.feeds)
        for name, want in case.want.items():
            add_error(worst[case.graph, name], name, got[name], want)
    return [
        TensorParity(graph=g, tensor=t, variant=variant, max_abs=w.absolute, max_rel=w.relative)
        for (g, t), w in worst.items()
    ]


def add_error(worst: Worst, name: str, got: npt.NDArray[Any], want: npt.NDArray[Any]) -> None:
    """Takes one output into account; of memory maps how far the reference lies from what rounds to them."""
    if name == sam2_video.MEMORY_FEATURES and got.shape == want.shape:
        got = want + bfloat16_distance(got, want)
    worst.add(got, want)


def compare_clip(
    files: Mapping[str, Path], suite: VideoSuite, variant: str, threads: int | None = None, optimise: bool = True
) -> ClipParity:
    """Tracks the clip with the engine on exported files.

    Args:
        files: ONNX file of every graph.
        suite: PyTorch's answers.
        variant: Name that goes into the report.
        threads: Threads of a call; None for ONNX Runtime's choice.
        optimise: Whether ONNX Runtime may rewrite the graphs.
    """
    with ExitStack() as opened:
        device = open_device("cpu")
        opened.callback(device.close)
        specs = sam2.graphs(suite.constants) | sam2_video.graphs(suite.constants, suite.video)
        options = None if optimise else {"optimization": "none"}
        sessions = {}
        for name, spec in specs.items():
            sessions[name] = open_session(files[name], spec, device, threads=threads, options=options)
            opened.callback(sessions[name].close)
        predictor = Sam2ImagePredictor(
            sessions[sam2.IMAGE_ENCODER],
            sessions[sam2.MASK_DECODER],
            suite.constants,
            bundle_hash="parity",
            variant=variant,
        )
        stepper = Stepper(predictor, sessions, suite.video)
        with VideoTracker(stepper, open_frames(suite.frames)) as tracker:
            results = list(follow(tracker, suite.clip))
    return clip_parity([{o.object_id: o.mask for o in r.objects} for r in results], suite, variant)


def clip_parity(masks: Sequence[Mapping[int, Mask]], suite: VideoSuite, variant: str) -> ClipParity:
    """IoU of the masks of a tracked clip, given in `Clip.order`."""
    ious = [
        clip_iou(got[number], want.mask, want.undecided)
        for got, answers in zip(masks, suite.answers, strict=True)
        for number, want in answers.items()
    ]
    return ClipParity(
        variant=variant,
        frames=len(masks),
        objects=len(suite.clip.objects),
        shown=suite.shown,
        mean_iou=float(np.mean(ious)),
        min_iou=float(np.min(ious)),
    )
