"""Parity of exported graphs with PyTorch: every output tensor, and every mask at the size of the picture.

Tensors: each graph gets PyTorch's own inputs (the decoder PyTorch's features), so its error is its own. Masks: the
whole pipeline, exported encoder into exported decoder, resized to the picture and thresholded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pixano_edge.engine.bundle.manifest import ClipParity, MaskParity, ParityReport, TensorParity
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.export.differences import Arrays, Worst
from pixano_edge.export.parity import FP16, FP16_CPU, FP32_MAX_REL, ParityError, Runner, onnx_runner, require_passed
from pixano_edge.export.photos import Photo
from pixano_edge.export.sam2 import reference

__all__ = [
    "FP16",
    "FP16_CPU",
    "FP32_MAX_REL",
    "Arrays",
    "ParityError",
    "Runner",
    "Suite",
    "VariantParity",
    "build_suite",
    "click_runner",
    "compare",
    "onnx_runner",
    "report",
    "require",
]

FP32_MIN_IOU = 0.999
FP16_MEAN_IOU = 0.99
TOLERANCE = {"fp32_max_rel": FP32_MAX_REL, "fp32_min_iou": FP32_MIN_IOU, "fp16_mean_iou": FP16_MEAN_IOU}


@dataclass(frozen=True)
class Case:
    """PyTorch's answers for one group of prompts on one picture."""

    photo: Photo
    features: reference.Features
    prompts: list[reference.PromptCase]
    answers: list[reference.Answer]


@dataclass
class Suite:
    """Everything PyTorch answered, computed once and compared with every variant.

    Attributes:
        constants: Of the checkpoint.
        cases: Groups of prompts, all pictures.
        reference: What made the answers, for the report.
        photos: Names of the pictures.
    """

    constants: Sam2Constants
    cases: list[Case]
    reference: str
    photos: list[str]


@dataclass
class VariantParity:
    """Result of one variant."""

    tensors: list[TensorParity] = field(default_factory=list)
    masks: MaskParity | None = None
    clip: ClipParity | None = None

    def problems(self) -> list[str]:
        """Every figure that misses the bar, in words."""
        found = []
        for t in self.tensors:
            if t.variant.startswith("fp32") and not t.max_rel <= FP32_MAX_REL:
                name = "" if t.variant == "fp32" else f"{t.variant} "
                found.append(f"{name}{t.graph}.{t.tensor}: relative error {t.max_rel:.2e} > {FP32_MAX_REL:.0e}")
            elif not np.isfinite(t.max_rel):
                found.append(f"{t.variant} {t.graph}.{t.tensor}: not finite, or of another shape")
        if self.masks and self.masks.variant.startswith("fp32") and not self.masks.min_iou >= FP32_MIN_IOU:
            found.append(f"{self.masks.variant} masks: lowest IoU {self.masks.min_iou:.4f} < {FP32_MIN_IOU}")
        if self.masks and self.masks.variant.startswith("fp16") and not self.masks.mean_iou >= FP16_MEAN_IOU:
            found.append(f"{self.masks.variant} masks: mean IoU {self.masks.mean_iou:.4f} < {FP16_MEAN_IOU}")
        if self.clip and self.clip.variant.startswith("fp32") and not self.clip.min_iou >= FP32_MIN_IOU:
            found.append(f"{self.clip.variant} clip: lowest IoU {self.clip.min_iou:.4f} < {FP32_MIN_IOU}")
        if self.clip and self.clip.variant.startswith("fp16") and not self.clip.mean_iou >= FP16_MEAN_IOU:
            found.append(f"{self.clip.variant} clip: mean IoU {self.clip.mean_iou:.4f} < {FP16_MEAN_IOU}")
        return found


def build_suite(model: Any, photos: Sequence[Photo], constants: Sam2Constants) -> Suite:
    """Asks the stock model about every picture. Takes one encoder run per picture and two decoder runs per prompt."""
    import transformers

    cases = []
    for index, photo in enumerate(photos):
        features = reference.encode(model, photo, constants)
        for prompts in reference.make_cases(model, features, photo.size, constants, seed=index):
            answers = [reference.answer(model, features, p, photo.size, constants) for p in prompts]
            cases.append(Case(photo, features, prompts, answers))
    made_by = f"transformers {transformers.__version__} Sam2Model, torch {torch.__version__}, fp32, cpu"
    return Suite(constants, cases, made_by, [p.name for p in photos])


def compare(run: Runner, suite: Suite, variant: str) -> VariantParity:
    """Measures one variant against the suite.

    Args:
        run: Runs a graph of the variant.
        suite: PyTorch's answers.
        variant: Name that goes into the report.
    """
    worst: dict[tuple[str, str], Worst] = {
        (g.name, t.name): Worst() for g in contract.graphs(suite.constants).values() for t in g.outputs
    }
    ious: list[float] = []
    prompts = 0
    encoded: dict[int, Arrays] = {}
    for case in suite.cases:
        picture = id(case.features)
        if picture not in encoded:
            features = run(contract.IMAGE_ENCODER, {contract.PIXEL_VALUES: case.features.pixel_values})
            encoded[picture] = features
            for name, want in case.features.arrays.items():
                worst[contract.IMAGE_ENCODER, name].add(features[name], want)
        feeds = reference.decoder_feeds(case.prompts, case.photo.size, suite.constants)
        alone = run(contract.MASK_DECODER, {**case.features.arrays, **feeds})
        whole = run(contract.MASK_DECODER, {**encoded[picture], **feeds})
        for index, answer in enumerate(case.answers):
            for name in (contract.MASKS, contract.IOU_SCORES, contract.OBJECT_SCORE_LOGITS):
                worst[contract.MASK_DECODER, name].add(alone[name][index : index + 1], getattr(answer, name))
            ious += mask_ious(whole[contract.MASKS][index], answer.masks[0], case.photo.size, suite.constants)
        prompts += len(case.prompts)
    tensors = [
        TensorParity(graph=g, tensor=t, variant=variant, max_abs=w.absolute, max_rel=w.relative)
        for (g, t), w in worst.items()
    ]
    masks = MaskParity(
        variant=variant,
        prompts=prompts,
        images=len(encoded),
        mean_iou=float(np.mean(ious)),
        min_iou=float(np.min(ious)),
    )
    return VariantParity(tensors, masks)


def click_runner(run: Runner) -> Runner:
    """`run` with the graphs of clicks in place of the mask decoder, as `engine.models.sam2.clicks` calls them.

    A batch of prompts with masks is run prompt by prompt; the engine gives such batches to the mask decoder.
    """

    def call(graph: str, feeds: Arrays) -> Arrays:
        if graph != contract.MASK_DECODER or feeds[contract.POINT_LABELS].shape[1] > contract.MAX_CLICK_POINTS:
            return run(graph, feeds)
        features = {name: feeds[name] for name in (contract.IMAGE_EMBED, contract.HIGH_RES_0, contract.HIGH_RES_1)}
        prepared = run(contract.IMAGE_PREPARE, features)
        points = {name: feeds[name] for name in (contract.POINT_COORDS, contract.POINT_LABELS)}
        masked = feeds[contract.HAS_MASK_INPUT] > 0.5
        if not masked.any():
            return run(contract.CLICK_DECODER, {**prepared, **points})
        answers = []
        for row in range(len(masked)):
            one = {name: value[row : row + 1] for name, value in points.items()}
            if masked[row]:
                mask = {contract.MASK_INPUT: feeds[contract.MASK_INPUT][row : row + 1]}
                shared = {n: v for n, v in prepared.items() if n not in (contract.FINE_0, contract.FINE_1)}
                changed = run(contract.MASK_PREPARE, {**shared, **mask})
                one |= prepared | {n.removeprefix(contract.MASKED): v for n, v in changed.items()}
            else:
                one |= prepared
            answers.append(run(contract.CLICK_DECODER, one))
        return {name: np.concatenate([a[name] for a in answers]) for name in answers[0]}

    return call


def mask_ious(
    got: npt.NDArray[Any], want: npt.NDArray[Any], size: tuple[int, int], constants: Sam2Constants
) -> list[float]:
    """IoU per mask at the picture's size, for low-resolution logits (M, m, m); 1 where both are empty.

    Pixels whose reference logit is nearer to the threshold than the tensors' own tolerance (`FP32_MAX_REL` of the
    mask's largest logit) count as equal: their sign is open, and on a mask of a few hundred pixels one of them
    would weigh more than the whole IoU bar. `verify` on the box follows the same rule.
    """
    result = []
    for a, b in zip(got, want):
        reference = _full_size(b, size) - constants.mask_threshold
        second = reference > 0
        first = _full_size(a, size) > constants.mask_threshold
        first = torch.where(reference.abs() <= FP32_MAX_REL * float(np.abs(b).max()), second, first)
        union = int((first | second).sum())
        result.append(float((first & second).sum()) / union if union else 1.0)
    return result


def _full_size(logits: npt.NDArray[Any], size: tuple[int, int]) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(logits, dtype=np.float32))[None, None]
    return torch.nn.functional.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0, 0]


def report(suite: Suite, variants: Sequence[VariantParity]) -> ParityReport:
    """The figures of all variants as the manifest stores them."""
    return ParityReport(
        reference=suite.reference,
        inputs=suite.photos,
        tensors=[t for v in variants for t in v.tensors],
        masks=[v.masks for v in variants if v.masks],
        clips=[v.clip for v in variants if v.clip],
        tolerance=TOLERANCE,
        passed=not any(v.problems() for v in variants),
    )


def require(suite: Suite, variants: Sequence[VariantParity]) -> ParityReport:
    """The report, or ParityError with every figure that misses the bar."""
    return require_passed(report(suite, variants), [p for v in variants for p in v.problems()])
