"""SAM 2 on pictures: clicks, boxes and corrections, judged by the overlap of the masks with fp32's.

What is asked: of annotated objects the clicks and boxes; otherwise clicks on a grid, of whose answers by fp32 the
surest ones that differ are taken as objects. Each object is asked for by a click, by a box, and by a second click that
refines the first answer, since that alone runs the mask prompt's part of the decoder.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.draw import overlay
from pixano_edge.engine.cli.draw_text import NamedBox
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.models.images import Rgb
from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.rle import decode_rle, encode_rle
from pixano_edge.engine.models.sam2.cache import EmbeddingCache
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.runtime.base import Session

from ..data import Picture, Truth
from ..result import TruthScore, WorstSample
from .base import Files, Task, TaskOptions

Mask = npt.NDArray[np.bool_]
Rle = dict[str, Any]
"""A mask as `engine.models.rle` encodes it."""

GRID = 4
"""Clicks per side of the grid."""
OBJECTS = 4
"""Most objects of a picture."""
SAME = 0.7
"""IoU from which two answers are one object."""
MIN_AREA, MAX_AREA = 0.001, 0.9
"""Of the picture: smaller and larger answers are no objects."""
TIE = 0.02
"""Predicted IoU by which another of the three masks may be below the best and count as equal: fp32 itself hardly
prefers one, so the variant may choose either, and is compared with fp32's mask of that number."""
CACHE_BYTES = 768 << 20
PICTURE_SIDE = 360
"""Longest side of the report's pictures."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked about a picture.

    Attributes:
        prompts: Three of each object: click, box, and both clicks with fp32's first answer as mask prompt.
        truths: Of each object its annotated mask, or None.
    """

    prompts: tuple[Prompt, ...]
    truths: tuple[Rle | None, ...]

    @property
    def multimask(self) -> tuple[int, ...]:
        """Which prompts are answered with three masks: the clicks."""
        return tuple(range(0, len(self.prompts), 3))

    @property
    def single(self) -> tuple[int, ...]:
        """Which ones are answered with one mask."""
        return tuple(i for i in range(len(self.prompts)) if i % 3)


@dataclass(frozen=True, eq=False)
class Answered:
    """Answers to one picture's prompts.

    Attributes:
        masks: M for each prompt as run lengths, which take little whatever the picture's size; M is 3 for a click.
        scores: (M,) predicted IoU for each prompt.
    """

    masks: tuple[tuple[Rle, ...], ...]
    scores: tuple[npt.NDArray[np.float32], ...]


class Sam2Task(Task[Picture, Sam2ImagePredictor, Asked, Answered]):
    """See the module."""

    metric = "mask_iou"
    about = "mean overlap (IoU) of the masks with fp32's, over clicks, boxes and corrections"
    usual = 0.97
    hint = "Give pictures that show objects, or a COCO JSON with boxes."

    def __init__(self, bundle: Bundle, options: TaskOptions) -> None:
        super().__init__(bundle, options)
        self.constants = Sam2Constants.from_dict(bundle.manifest.constants)
        self._cache = EmbeddingCache(CACHE_BYTES)

    @property
    def graphs(self) -> tuple[str, ...]:
        return (sam2.IMAGE_ENCODER, sam2.MASK_DECODER)

    def spec(self, graph: str) -> Any:
        return sam2.graphs(self.constants)[graph]

    def make(self, sessions: Mapping[str, Session], digests: Mapping[str, str]) -> Sam2ImagePredictor:
        # The encoder's file stands for the bundle: features of unchanged encoders are found again in the cache.
        return Sam2ImagePredictor(
            sessions[sam2.IMAGE_ENCODER],
            sessions[sam2.MASK_DECODER],
            self.constants,
            bundle_hash=digests[sam2.IMAGE_ENCODER],
            variant="calibration",
            cache=self._cache,
        )

    def close(self, model: Sam2ImagePredictor) -> None:
        """Nothing: its own `close` would empty the cache, and on a CPU it holds nothing else."""

    def plan(self, model: Sam2ImagePredictor, sample: Picture) -> Asked | None:
        return plan_objects(model, sample.load(), sample.truths, self.options.seed)

    def answer(self, model: Sam2ImagePredictor, sample: Picture, plan: Asked) -> Answered:
        return answer_objects(model, sample.load(), plan)

    def compare(self, want: Answered, got: Answered, plan: Asked) -> float:
        return agreement(want, got)

    def truth(self, files: Files, samples: Sequence[Picture]) -> TruthScore | None:
        known = [s for s in samples if any(self.plan_of(s).truths)]
        if not known:
            return None
        full = [with_truth(self.reference(s), self.plan_of(s)) for s in known]
        with self.open(files) as model:
            own = [with_truth(self.answer(model, s, self.plan_of(s)), self.plan_of(s)) for s in known]
        return TruthScore("IoU, mean over pictures", float(np.mean(full)), float(np.mean(own)), len(known))

    def draw(self, sample: Picture, plan: Asked, want: Answered, got: Answered, value: float) -> WorstSample:
        index = min(range(len(plan.prompts)), key=lambda i: _overlap(want, got, i))
        best, own = _picks(want, got, index)
        image, prompt = sample.load(), plan.prompts[index]
        return WorstSample(
            sample.name,
            value,
            ("click", "box", "click that refines")[index % 3],
            picture(image, [decode_rle(want.masks[index][best])], [prompt]),
            picture(image, [decode_rle(got.masks[index][own])], [prompt]),
        )


def answer_objects(model: Sam2ImagePredictor, image: Rgb, asked: Asked) -> Answered:
    """Answers to all prompts of a picture."""
    embedding = model.encode(image)
    masks: dict[int, tuple[Rle, ...]] = {}
    scores: dict[int, npt.NDArray[np.float32]] = {}
    for multimask, group in ((True, asked.multimask), (False, asked.single)):
        found = model.predict(embedding, [asked.prompts[i] for i in group], multimask=multimask)
        for row, index in enumerate(group):
            masks[index] = tuple(map(encode_rle, found.masks[row]))
            scores[index] = np.array(found.scores[row])
    order = range(len(asked.prompts))
    return Answered(tuple(masks[i] for i in order), tuple(scores[i] for i in order))


def agreement(want: Answered, got: Answered) -> float:
    """Mean overlap of the answers to a picture's prompts."""
    return float(np.mean([_overlap(want, got, index) for index in range(len(want.masks))]))


def with_truth(answered: Answered, asked: Asked) -> float:
    """Mean overlap of each prompt's best answer with the annotated mask, over the objects that have one."""
    return float(
        np.mean(
            [
                rle_iou(answered.masks[index][int(answered.scores[index].argmax())], truth)
                for index in range(len(asked.prompts))
                if (truth := asked.truths[index // 3]) is not None
            ]
        )
    )


def rle_iou(one: Rle, other: Rle) -> float:
    """Intersection over union of two masks of one size; two empty ones agree: 1."""
    from pycocotools import mask as coco

    if not coco.area(one) and not coco.area(other):
        return 1.0
    return float(coco.iou([one], [other], [0])[0, 0])


def _overlap(want: Answered, got: Answered, index: int) -> float:
    best, own = _picks(want, got, index)
    return rle_iou(want.masks[index][best], got.masks[index][own])


def _picks(want: Answered, got: Answered, index: int) -> tuple[int, int]:
    """Which masks of a prompt are compared: each side's own best, unless fp32 rates both alike, see `TIE`."""
    wanted, own = want.scores[index], int(got.scores[index].argmax())
    best = int(wanted.argmax())
    return (own, own) if wanted[own] >= wanted[best] - TIE else (best, own)


def plan_objects(
    model: Sam2ImagePredictor, image: Rgb, truths: Sequence[Truth], seed: int, most: int = OBJECTS
) -> Asked | None:
    """Prompts for the objects of a picture; None where fp32 finds none."""
    height, width = image.shape[:2]
    embedding = model.encode(image)
    marks = _annotated(truths, height, width, seed, most) or _found(model, embedding, height, width, seed, most)
    prompts: list[Prompt] = []
    for point, box, _ in marks:
        first = Prompt(points=[point], labels=[1])
        answer = model.predict(embedding, [first], return_logits=True)
        best = int(answer.scores[0].argmax())
        assert answer.low_res_logits is not None  # asked for
        mask = answer.masks[0, best]
        second = Prompt(
            points=[point, _correction(mask, box, width, height)],
            labels=[1, 1],
            mask_input=np.array(answer.low_res_logits[0, best]),
        )
        prompts += [first, Prompt(box=box), second]
    return Asked(tuple(prompts), tuple(truth for *_, truth in marks)) if prompts else None


Mark = tuple[tuple[float, float], tuple[float, float, float, float], Rle | None]
"""A click, a box, and the object's annotated mask where there is one."""


def _annotated(truths: Sequence[Truth], height: int, width: int, seed: int, most: int) -> list[Mark]:
    """Marks of annotated objects, a random choice of them; empty where there are none."""
    order = np.random.default_rng([85, seed, len(truths)]).permutation(len(truths))
    marks: list[Mark] = []
    for index in order[:most]:
        truth = truths[index]
        x1, y1, x2, y2 = np.clip(truth.box, 0, (width, height, width, height)).tolist()
        if x2 - x1 < 2 or y2 - y1 < 2:
            continue
        mask = truth.mask(height, width)
        point = ((x1 + x2) / 2, (y1 + y2) / 2) if mask is None or not mask.any() else _inside(mask)
        marks.append((point, (x1, y1, x2, y2), None if mask is None or not mask.any() else encode_rle(mask)))
    return marks


def _found(model: Sam2ImagePredictor, embedding: Any, height: int, width: int, seed: int, most: int) -> list[Mark]:
    """Marks of what fp32 is surest of, among its answers to clicks on a grid that is shifted at random."""
    shift = np.random.default_rng([87, seed]).uniform(0.25, 0.75, 2)
    xs, ys = ((np.arange(GRID) + s) / GRID for s in shift)
    points = [(float(x * width), float(y * height)) for y in ys for x in xs]
    answer = model.predict(embedding, [Prompt(points=[p], labels=[1]) for p in points])
    found: list[tuple[float, tuple[float, float], Mask]] = []
    for row, point in enumerate(points):
        best = int(answer.scores[row].argmax())
        mask = answer.masks[row, best]
        if MIN_AREA < float(mask.mean()) < MAX_AREA:
            found.append((float(answer.scores[row, best]), point, mask))
    kept: list[tuple[float, tuple[float, float], Mask]] = []
    for score, point, mask in sorted(found, key=lambda f: -f[0]):
        if len(kept) < most and all(mask_iou(mask, other) < SAME for _, _, other in kept):
            kept.append((score, point, mask))
    return [(point, _box(mask), None) for _, point, mask in kept]


def _box(mask: Mask) -> tuple[float, float, float, float]:
    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    return float(x), float(y), float(x + w), float(y + h)


def _inside(mask: Mask) -> tuple[float, float]:
    """The pixel of a mask that is farthest from its border."""
    padded = cv2.copyMakeBorder(np.ascontiguousarray(mask).view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(x), float(y)


def _correction(mask: Mask, box: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float]:
    """A second click, inside the answer to the first one; the box's centre where that is empty."""
    if mask.any():
        return _inside(mask)
    return min((box[0] + box[2]) / 2, width - 1.0), min((box[1] + box[3]) / 2, height - 1.0)


def picture(image: Rgb, masks: list[Mask], prompts: list[Prompt], boxes: Sequence[NamedBox] = ()) -> bytes:
    """PNG of masks and boxes on an image, small enough for a report."""
    drawn = overlay(image, masks, prompts, boxes)
    scale = PICTURE_SIDE / max(drawn.shape[:2])
    if scale < 1:
        size = (max(1, round(drawn.shape[1] * scale)), max(1, round(drawn.shape[0] * scale)))
        drawn = np.asarray(cv2.resize(drawn, size, interpolation=cv2.INTER_AREA), np.uint8)
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, format="PNG")
    return file.getvalue()
