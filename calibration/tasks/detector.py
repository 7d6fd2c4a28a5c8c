"""Detectors: what fp32 finds on a picture is the truth, and the variant's ranked boxes are judged by AP.

AP here is COCO's for one picture: precision over recall, averaged over overlaps of 0.5 to 0.95 (Lin et al. 2014,
"Microsoft COCO", section on metrics; pycocotools has the same steps), with all classes in one ranking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.draw_text import NamedBox
from pixano_edge.engine.contracts import grounding_dino, owlv2
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.engine.models.detection.base import Detections
from pixano_edge.engine.models.detection.nms import box_iou
from pixano_edge.engine.runtime.base import Session

from ..data import Picture
from ..result import TruthScore, WorstSample
from .base import Files, Task, TaskOptions
from .sam2 import picture

OVERLAPS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
LOWEST = 0.2
"""Part of the threshold from which boxes of the variant are looked at: one that fp32 finds and the variant finds a
little less sure is lower in the ranking, not lost."""
MOST = 100
"""Boxes looked at, as in COCO."""
MAX_CLASSES = 40
"""Most classes that are asked for at once, the first ones given; a COCO file's most frequent ones."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Detections, best score first: (N, 4) boxes in pixels, (N,) scores and class numbers."""

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    @classmethod
    def of(cls, found: Detections) -> Boxes:
        """The first `MOST` of an answer, as copies."""
        return cls(found.boxes[:MOST].copy(), found.scores[:MOST].copy(), found.labels[:MOST].copy())

    def above(self, threshold: float) -> Boxes:
        """Those with at least this score."""
        keep = self.scores >= threshold
        return Boxes(self.boxes[keep], self.scores[keep], self.labels[keep])


class DetectorTask(Task[Picture, Any, tuple[str, ...], Boxes]):
    """See the module. What is asked are the classes."""

    metric = "ap"
    about = "AP (IoU 0.5 to 0.95) with fp32's detections as the truth"
    usual = 0.9
    hint = "Give --classes that are on the pictures, or a lower --threshold."

    def __init__(self, bundle: Bundle, options: TaskOptions) -> None:
        super().__init__(bundle, options)
        self._owl = bundle.manifest.family in owlv2.FAMILIES
        if self._owl:
            self.constants: Any = owlv2.OwlConstants.from_dict(bundle.manifest.constants)
        else:
            self.constants = grounding_dino.GroundingDinoConstants.from_dict(bundle.manifest.constants)
        if not 0 < options.threshold < 1:
            raise CalibrationError(f"A threshold of {options.threshold} is none.", "Give one between 0 and 1.")
        if not options.classes:
            raise CalibrationError(
                "A detector is calibrated on what it is asked for, and there are no classes.",
                "Give --classes 'cat, dog', or a COCO JSON with categories.",
            )
        self.classes = tuple(dict.fromkeys(options.classes))[:MAX_CLASSES]

    @property
    def graphs(self) -> tuple[str, ...]:
        if self._owl:
            return (owlv2.IMAGE_ENCODER, owlv2.TEXT_ENCODER)
        return (grounding_dino.TEXT_ENCODER, grounding_dino.DETECTOR)

    def make(self, sessions: Mapping[str, Session], digests: Mapping[str, str]) -> Any:
        told: dict[str, Any] = {"bundle_hash": "".join(digests.values()), "variant": "calibration"}
        if self._owl:
            from pixano_edge.engine.models.owlv2.detector import Owlv2Detector

            tokenizer = self.bundle.file(owlv2.TOKENIZER).read_bytes()
            return Owlv2Detector(
                sessions[owlv2.IMAGE_ENCODER], sessions[owlv2.TEXT_ENCODER], self.constants, tokenizer, **told
            )
        from pixano_edge.engine.models.grounding_dino.detector import GroundingDinoDetector

        tokenizer = self.bundle.file(grounding_dino.TOKENIZER).read_bytes()
        return GroundingDinoDetector(
            sessions[grounding_dino.TEXT_ENCODER], sessions[grounding_dino.DETECTOR], self.constants, tokenizer, **told
        )

    def close(self, model: Any) -> None:
        model.close()

    def plan(self, model: Any, sample: Picture) -> tuple[str, ...] | None:
        return (
            self.classes if len(self.answer(model, sample, self.classes).above(self.options.threshold).scores) else None
        )

    def answer(self, model: Any, sample: Picture, plan: tuple[str, ...]) -> Boxes:
        low = LOWEST * self.options.threshold
        return Boxes.of(model.detect(sample.load(), plan, box_threshold=low, text_threshold=low))

    def compare(self, want: Boxes, got: Boxes, plan: tuple[str, ...]) -> float:
        truth = want.above(self.options.threshold)
        return float(np.mean([average_precision(got, truth, overlap) for overlap in OVERLAPS]))

    def draw(self, sample: Picture, plan: tuple[str, ...], want: Boxes, got: Boxes, value: float) -> WorstSample:
        image = sample.load()
        drawn = [picture(image, [], [], _named(boxes.above(self.options.threshold), plan)) for boxes in (want, got)]
        return WorstSample(sample.name, value, f"{len(plan)} classes", drawn[0], drawn[1])

    def truth(self, files: Files, samples: Sequence[Picture]) -> TruthScore | None:
        known = [s for s in samples if any(t.name in self.classes for t in s.truths)]
        if not known:
            return None
        means = []
        for given in ({}, files):
            with self.open(given) as model:
                values = [average_precision(self.answer(model, s, self.classes), self._truth(s), 0.5) for s in known]
            means.append(float(np.mean(values)))
        return TruthScore("AP50, mean over pictures", means[0], means[1], len(known))

    def _truth(self, sample: Picture) -> Boxes:
        found = [t for t in sample.truths if t.name in self.classes]
        boxes = np.array([t.box for t in found], np.float32).reshape(-1, 4)
        labels = np.array([self.classes.index(t.name) for t in found], np.int64)
        return Boxes(boxes, np.ones(len(found), np.float32), labels)


def average_precision(got: Boxes, truth: Boxes, overlap: float) -> float:
    """AP at one overlap: the mean, over recall, of the best precision at that recall or above.

    Args:
        got: Ranked.
        truth: To find; without any, 1 where nothing was found and else 0.
        overlap: IoU from which a box of the same class is found.
    """
    if not len(truth.labels):
        return float(not len(got.labels))
    free = np.ones(len(truth.labels), bool)
    hits = np.zeros(len(got.labels))
    for index, (box, label) in enumerate(zip(got.boxes, got.labels)):
        ious = np.where(free & (truth.labels == label), box_iou(truth.boxes, box), -1.0)
        best = int(ious.argmax())
        if ious[best] >= overlap:
            free[best] = False
            hits[index] = 1
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    # From the back: a later, better precision counts for smaller recalls as well.
    best_after = np.maximum.accumulate(precision[::-1])[::-1] if len(precision) else precision
    return float(best_after[hits > 0].sum() / len(truth.labels))


def _named(found: Boxes, classes: Sequence[str]) -> list[NamedBox]:
    return [
        NamedBox((float(box[0]), float(box[1]), float(box[2]), float(box[3])), int(label), classes[label], float(score))
        for box, score, label in zip(found.boxes, found.scores, found.labels)
    ]
