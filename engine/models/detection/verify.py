"""Checks a detector's bundle on this box against PyTorch's answers stored in it (golden samples); needs no PyTorch.

Each sample holds a picture, the classes and thresholds asked with, sampled values of the tensors on the way, and the
final detections of PyTorch's model and processor. The format is documented in
``pixano_edge/export/detection/golden.py``, which writes it. The whole pipeline runs as for a user.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle, GoldenSample
from ...bundle.manifest import CalibrationEntry
from ...errors import BundleError, ImageError, PromptError
from ...runtime.base import Array, Device, DeviceInfo
from ..calibrated import calibrations_of, golden_bar
from ..images import decode_image
from ..opening import combination_key, locate
from ..sam2.diagnosis import FP32_MAX_REL, PREPROCESSING, REDUCED_MAX_REL, ROOM, Suspect, name_suspect
from ..sam2.verify import TensorError
from ..verdicts import VerdictKey
from .base import Detections, Detector
from .matching import MAX_SCORE, Agreement
from .opening import open_detector

MIN_IOU = {"fp16": 0.9, "bf16": 0.9, "int8": 0.8, "int4": 0.7}
"""Bar of reduced precisions: mean IoU of the boxes with PyTorch's of the same class. Full precision must give the same
boxes, within `MAX_BOX` and `MAX_SCORE`, and tensors within `FP32_MAX_REL`."""
REDUCED_MARGIN = 0.05
"""A box whose score is so near to the threshold may be missing at a reduced precision."""

_DAMAGED = "Copy or download the bundle again, or export it again."


class Traceable(Detector, Protocol):
    """What the check needs of a detector besides `Detector`."""

    @property
    def traced(self) -> Mapping[str, str]:
        """Tensors of `trace` in pipeline order, and the graph that makes each, or `PREPROCESSING`."""

    def trace(self, image: npt.NDArray[np.uint8], classes: Sequence[str]) -> dict[str, Array]:
        """Tensors between an image, class names and detections, by name."""

    @property
    def device(self) -> Device: ...


@dataclass
class DetectionReport:
    """What `verify_bundle` measured; see `pixano_edge.engine.models.verify.Report`.

    Attributes:
        bundle: Name in the manifest.
        device: Name of the device, such as ``cuda:0``.
        backend: Back end that ran.
        precision: Variant that ran.
        samples: Golden samples compared.
        tensors: Errors in pipeline order.
        boxes: PyTorch's detections.
        unmatched: Boxes of either side without a partner of the same class.
        max_box: Largest distance of a corner of a pair, in pixels of the picture.
        max_score: Largest difference of the scores of a pair.
        mean_iou: Of pairs and unmatched boxes, which count as 0.
        min_iou: Of the worst.
        seconds: Opening and running.
        problems: Every figure that misses the bar, in words; empty when passed.
        product: Name of the product that the device is.
        compute_capability: Of the device; None where there is none.
        driver: Version of its driver; None where there is none.
        suspect: Where to look, when a figure misses the bar.
        warnings: What did not run as meant.
        key: What a verdict on this run is stored under.
    """

    bundle: str
    device: str
    backend: str
    precision: str
    samples: int
    tensors: list[TensorError]
    boxes: int
    unmatched: int
    max_box: float
    max_score: float
    mean_iou: float
    min_iou: float
    seconds: float
    problems: list[str] = field(default_factory=list)
    product: str = ""
    compute_capability: str | None = None
    driver: str | None = None
    suspect: Suspect | None = None
    warnings: list[str] = field(default_factory=list)
    key: VerdictKey | None = None

    @property
    def passed(self) -> bool:
        return not self.problems

    def figures(self) -> list[str]:
        """How far detections are from PyTorch's."""
        return [
            f"detections: {self.boxes} boxes, {self.unmatched} without a partner, corners within {self.max_box:.2f} "
            f"pixels, scores within {self.max_score:.1e}, mean IoU {self.mean_iou:.4f} "
            f"({self.samples} samples, {self.seconds:.1f} s)"
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        key = self.key.model_dump() if self.key is not None else None
        return {**asdict(replace(self, key=None)), "key": key, "passed": self.passed}


def verify_bundle(
    bundle: Bundle | Path | str,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DetectionReport:
    """Runs the golden samples of a bundle on a device. Stored verdicts are neither asked nor written.

    Args:
        bundle: An open bundle or its folder.
        device: See `open_detector`, as the next three.
        backend: Back end.
        precision: Variant.
        threads: Threads of one call.
        progress: Called with (samples done, samples in all).

    Raises:
        BundleError: No golden samples, or damaged ones; or as `open_detector`.
        DeviceError, ContractError: As `open_detector`.
    """
    start = time.perf_counter()
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    golden = bundle.golden()
    if not golden:
        raise BundleError(f"Bundle '{bundle.manifest.name}' has no golden samples.", "Export it again.")
    model: Any = open_detector(
        bundle, device=device, backend=backend, precision=precision, threads=threads, prove=False, warm_up=False
    )
    try:
        info = model.info()
        errors = {name: TensorError(name, graph=graph) for name, graph in model.traced.items()}
        agreement = Agreement()
        for index, sample in enumerate(golden):
            _run_sample(bundle, model, sample, errors, agreement, info["precision"])
            if progress is not None:
                progress(index + 1, len(golden))
        on: DeviceInfo = model.device.info()
        info = model.info()
    finally:
        model.close()
    for error in errors.values():
        error.tolerance = tolerance(bundle, error, info["precision"])
    report = DetectionReport(
        bundle=bundle.manifest.name,
        device=info["device"],
        backend=info["backend"],
        precision=info["precision"],
        samples=len(golden),
        tensors=list(errors.values()),
        boxes=agreement.boxes,
        unmatched=agreement.unmatched,
        max_box=agreement.max_box,
        max_score=agreement.max_score,
        mean_iou=agreement.mean_iou,
        min_iou=agreement.min_iou,
        seconds=time.perf_counter() - start,
        product=on.name,
        compute_capability=on.compute_capability,
        driver=on.driver,
        warnings=list(info["warnings"]),
        key=_key(bundle, info, on),
    )
    report.problems = judge(report, agreement, calibrations_of(bundle.manifest, report.precision))
    if report.problems:
        report.suspect = name_suspect(
            [(t, t.tolerance or FP32_MAX_REL, t.graph) for t in report.tensors],
            bundle,
            report.precision,
            report.backend,
            info,
        )
    return report


def judge(report: DetectionReport, agreement: Agreement, calibrations: Sequence[CalibrationEntry] = ()) -> list[str]:
    """Every figure that misses its bar, in words: that of the precision, or for a calibrated variant the one that
    follows from its budget."""
    found = []
    full = report.precision == "fp32"
    for tensor in report.tensors:
        # Pre-processing runs in float32 whatever the variant.
        if (full or tensor.graph == PREPROCESSING) and not tensor.max_rel <= FP32_MAX_REL:
            found.append(f"{tensor.name}: relative error {tensor.max_rel:.2e} > {FP32_MAX_REL:.0e}")
        elif not np.isfinite(tensor.max_rel):
            found.append(f"{tensor.name}: not finite")
    if full:
        return found + [f"detections: {problem}" for problem in agreement.problems()]
    own = golden_bar(calibrations)
    bar = own if own is not None else MIN_IOU.get(report.precision, MIN_IOU["fp16"])
    if not agreement.mean_iou >= bar:
        found.append(f"detections: mean IoU {agreement.mean_iou:.4f} < {bar:.4g}")
    return found


def tolerance(bundle: Bundle, error: TensorError, precision: str) -> float:
    """Largest relative error that is expected of a tensor: the exporter's figure with room for other kernels."""
    if precision == "fp32" or error.graph == PREPROCESSING:
        return FP32_MAX_REL
    parity = bundle.manifest.parity
    measured = [
        entry.max_rel
        for entry in (parity.tensors if parity else ())
        if (entry.variant, entry.graph, entry.tensor) == (precision, error.graph, error.name)
        and math.isfinite(entry.max_rel)
    ]
    return max(ROOM * max(measured), FP32_MAX_REL) if measured else REDUCED_MAX_REL.get(precision, FP32_MAX_REL)


def _key(bundle: Bundle, info: dict[str, Any], on: DeviceInfo) -> VerdictKey:
    found = locate(bundle, info["backend"], info["precision"], on, tuple(bundle.manifest.graphs))
    return combination_key(bundle, found, on)


def _run_sample(
    bundle: Bundle,
    model: Traceable,
    sample: GoldenSample,
    errors: Mapping[str, TensorError],
    agreement: Agreement,
    precision: str,
) -> None:
    """Compares one sample: tensors on the way, and the final detections."""
    stored = bundle.load_npz(sample.tensors)
    image = decode_image(bundle.file(sample.image))
    try:
        if tuple(stored["original_size"]) != image.shape[:2]:
            raise ValueError(f"the picture has {image.shape[:2]}, the sample {stored['original_size'].tolist()}")
        classes = tuple(str(name) for name in stored["classes"])
        for name, tensor in model.trace(image, classes).items():
            if f"{name}_index" in stored:
                errors[name].add(tensor.reshape(-1)[stored[f"{name}_index"]], stored[f"{name}_values"])
        want = Detections(
            _array(stored["boxes"], np.float32, 2),
            _array(stored["scores"], np.float32, 1),
            _array(stored["labels"], np.int64, 1),
            classes,
        )
        box_threshold, text_threshold = float(stored["box_threshold"]), float(stored["text_threshold"])
        got = model.detect(image, classes, box_threshold=box_threshold, text_threshold=text_threshold)
        margin = MAX_SCORE if precision == "fp32" else REDUCED_MARGIN
        agreement.add(got, want, box_threshold, margin)
    except (KeyError, IndexError, ValueError) as error:
        raise BundleError(f"Golden sample '{sample.name}' is malformed: {error}.", _DAMAGED) from error
    except (ImageError, PromptError) as error:
        raise BundleError(f"Golden sample '{sample.name}' cannot run: {error.message}", error.action) from error


def _array(values: npt.NDArray[Any], dtype: Any, rank: int) -> npt.NDArray[Any]:
    if values.dtype != dtype or values.ndim != rank:
        raise ValueError(f"an array of {values.dtype}{list(values.shape)} where {np.dtype(dtype)} was expected")
    return values
