"""Parity of exported detectors with PyTorch: every output tensor, and the final detections.

Tensors: each graph gets PyTorch's own inputs, so its error is its own. Detections: the engine's whole pipeline on the
exported files, pre- and post-processing included, against PyTorch's model and processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle.manifest import DetectionParity, ParityReport, TensorParity
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.models.detection.matching import MAX_BOX, MAX_SCORE, Agreement
from pixano_edge.engine.models.detection.verify import MIN_IOU, REDUCED_MARGIN, Traceable
from pixano_edge.export.detection.family import Answer, DetectorFamily
from pixano_edge.export.differences import Arrays, Worst
from pixano_edge.export.parity import FP16, FP16_CPU, FP32_MAX_REL, Runner, onnx_runner, require_passed
from pixano_edge.export.photos import Photo
from pixano_edge.export.pipeline import rounded_files

CLASS_LISTS: tuple[tuple[str, ...], ...] = (
    ("cat",),
    ("a coffee cup", "spoon", "wooden table"),
    ("whisker", "cup", "a saucer on a table", "ear", "metal teaspoon", "nose", "a pair of green eyes", "dog", "foam"),
)
"""Asked for where the user names no classes: one, a few and several, names of one and of more words."""
FEWEST, MOST = 4, 48
"""Boxes of one answer that detections are compared on."""
TOLERANCE = {
    "fp32_max_rel": FP32_MAX_REL,
    "fp32_max_box": MAX_BOX,
    "fp32_max_score": MAX_SCORE,
    "fp16_mean_iou": MIN_IOU["fp16"],
}


@dataclass
class Suite:
    """Everything PyTorch answered, computed once and compared with every variant.

    Attributes:
        answers: Of all photos and lists of classes.
        thresholds: Box threshold of each, so chosen that no score is near it.
        reference: What made them, for the report.
        photos: Names of the pictures.
        specs: Contracts by graph.
    """

    answers: list[Answer]
    thresholds: list[float]
    reference: str
    photos: list[str]
    specs: dict[str, GraphSpec]


@dataclass
class VariantParity:
    """Result of one variant."""

    variant: str
    tensors: list[TensorParity]
    detections: DetectionParity
    agreement: Agreement = field(repr=False, default_factory=Agreement)

    def problems(self) -> list[str]:
        """Every figure that misses the bar, in words."""
        full = self.variant.startswith("fp32")
        found = []
        for t in self.tensors:
            if full and not t.max_rel <= FP32_MAX_REL:
                found.append(f"{t.variant} {t.graph}.{t.tensor}: relative error {t.max_rel:.2e} > {FP32_MAX_REL:.0e}")
            elif not np.isfinite(t.max_rel):
                found.append(f"{t.variant} {t.graph}.{t.tensor}: not finite, or of another shape")
        if full:
            found += [f"{self.variant} detections: {problem}" for problem in self.agreement.problems()]
        elif not self.agreement.mean_iou >= MIN_IOU["fp16"]:
            found.append(f"{self.variant} detections: mean IoU {self.agreement.mean_iou:.4f} < {MIN_IOU['fp16']}")
        return found


def build_suite(family: DetectorFamily, photos: Sequence[Photo], lists: Sequence[Sequence[str]] | None) -> Suite:
    """Asks the stock model about every picture and every list of classes."""
    answers = [answer for photo in photos for answer in family.ask(photo, lists or CLASS_LISTS)]
    thresholds = [choose_threshold(answer.scores) for answer in answers]
    return Suite(answers, thresholds, family.reference, [p.name for p in photos], dict(family.specs))


def choose_threshold(scores: npt.NDArray[np.float32], fewest: int = FEWEST, most: int = MOST) -> float:
    """A threshold in the widest gap between the scores of `fewest` to `most` boxes, on the logits' scale.

    A threshold beside a score would make it chance whether a box is found; and weights of any kind, trained or not,
    give some boxes to compare this way.
    """
    ordered = np.sort(np.clip(scores.astype(np.float64), 1e-9, 1 - 1e-9))[::-1][: most + 1]
    if len(ordered) < 2:
        return 0.0
    logits = np.log(ordered / (1 - ordered))
    gaps = (logits[:-1] - logits[1:])[min(fewest, len(ordered) - 1) - 1 :]
    at = int(gaps.argmax()) + min(fewest, len(ordered) - 1) - 1
    middle = (logits[at] + logits[at + 1]) / 2
    return float(1 / (1 + np.exp(-middle)))


def compare(family: DetectorFamily, run: Runner, detector: Traceable, suite: Suite, variant: str) -> VariantParity:
    """Measures one variant.

    Args:
        family: Of the suite.
        run: Runs a graph of the variant.
        detector: The engine's, on the same files.
        suite: PyTorch's answers.
        variant: Name that goes into the report.
    """
    worst = {(g.name, t.name): Worst() for g in suite.specs.values() for t in g.outputs}
    done: set[int] = set()
    agreement = Agreement()
    for answer, threshold in zip(suite.answers, suite.thresholds):
        for one in answer.runs:
            if id(one) not in done:
                done.add(id(one))
                got: Arrays = family.settle(one, run(one.graph, one.feeds))
                for name, want in one.want.items():
                    worst[one.graph, name].add(got[name], want)
        found = detector.detect(
            answer.photo.pixels, answer.classes, box_threshold=threshold, text_threshold=min(threshold, 0.5)
        )
        agreement.add(
            found, answer.detect(threshold), threshold, MAX_SCORE if variant.startswith("fp32") else REDUCED_MARGIN
        )
    tensors = [
        TensorParity(graph=g, tensor=t, variant=variant, max_abs=w.absolute, max_rel=w.relative)
        for (g, t), w in worst.items()
    ]
    detections = DetectionParity(
        variant=variant,
        images=len(suite.photos),
        classes=sum(len(answer.classes) for answer in suite.answers) // max(1, len(suite.photos)),
        boxes=agreement.boxes,
        unmatched=agreement.unmatched,
        max_box=agreement.max_box,
        max_score=agreement.max_score,
    )
    return VariantParity(variant, tensors, detections, agreement)


def measure(
    family: DetectorFamily, files: dict[str, Path], suite: Suite, variant: str, threads: int | None
) -> list[VariantParity]:
    """Figures of one variant; fp16 twice, since ONNX Runtime's CPU provider hides most of its error."""

    def once(files: dict[str, Path], name: str, optimise: bool = True) -> VariantParity:
        with family.open(files, threads, optimise) as detector:
            return compare(family, onnx_runner(files, threads, optimise), detector, suite, name)

    if variant.startswith("fp32"):
        return [once(files, variant)]
    with rounded_files(files) as copies:
        as_on_gpu = once(copies, variant, optimise=False)
    return [as_on_gpu] if variant != FP16 else [as_on_gpu, once(files, FP16_CPU)]


def report(suite: Suite, variants: Sequence[VariantParity]) -> ParityReport:
    """The figures of all variants as the manifest stores them."""
    return ParityReport(
        reference=suite.reference,
        inputs=suite.photos,
        tensors=[t for v in variants for t in v.tensors],
        masks=[],
        detections=[v.detections for v in variants],
        tolerance=TOLERANCE,
        passed=not any(v.problems() for v in variants),
    )


def require(suite: Suite, variants: Sequence[VariantParity]) -> ParityReport:
    """The report, or ParityError with every figure that misses the bar."""
    return require_passed(report(suite, variants), [p for v in variants for p in v.problems()])
