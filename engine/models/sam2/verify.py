"""Checks a bundle on this box against PyTorch's answers stored in it (golden samples); needs no PyTorch.

Each sample holds a picture, prompts, sampled values of the model input and of the features, and all four masks per
prompt. The format is documented in ``pixano_edge/export/sam2/golden.py``, which writes it. The whole pipeline runs
as for a user: pre-processing, encoder, decoder, resizing. A bundle that tracks has a golden clip as well, see
`pixano_edge.engine.models.sam2_video.check`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle, GoldenSample
from ...bundle.manifest import CalibrationEntry
from ...contracts import sam2
from ...errors import BundleError, DeviceError, ImageError, PromptError
from ...runtime.base import DeviceInfo
from ..calibrated import calibrations_of, golden_bar
from ..images import decode_image
from ..masks import mask_iou
from ..opening import TENSORRT, combination_key, locate
from ..verdicts import VerdictKey
from .diagnosis import FP32_MAX_REL, GRAPH_OF, Suspect, find_suspect, graph_of, tolerances
from .opening import IMAGE_GRAPHS
from .postprocess import write_mask
from .predictor import Embedding, Sam2ImagePredictor
from .preprocess import Scratch, preprocess
from .prompts import Prompt, build_prompts

if TYPE_CHECKING:
    from ..sam2_video.check import ClipCheck

Arrays = dict[str, npt.NDArray[Any]]

MIN_IOU = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.99, "int8": 0.98, "int4": 0.98}
"""Bar per precision: for fp32 of the worst mask, for the others of the mean. Tensors must meet `FP32_MAX_REL` at full
precision; reduced precisions are judged by their masks."""

_DAMAGED = "Copy or download the bundle again, or export it again."


@dataclass
class TensorError:
    """Worst difference of one tensor over all samples.

    Attributes:
        name: Tensor name in the contract.
        max_abs: Largest |difference|; infinite when a value is not finite.
        max_rel: The largest, over the samples, of max |difference| / max |reference|.
        graph: Graph that made it, or ``pre-processing``.
        tolerance: Relative error that is expected at most; what it means is said in `diagnosis`.
    """

    name: str
    max_abs: float = 0.0
    max_rel: float = 0.0
    graph: str = ""
    tolerance: float | None = None

    def add(self, got: npt.NDArray[Any], want: npt.NDArray[Any]) -> None:
        if got.shape != want.shape:
            raise ValueError(f"'{self.name}' is {list(want.shape)} in the sample, {list(got.shape)} here")
        difference = float(np.abs(got.astype(np.float64) - want).max())
        # NaN compares as no difference at all; it must count as the largest.
        difference = difference if np.isfinite(difference) else float("inf")
        self.max_abs = max(self.max_abs, difference)
        self.max_rel = max(self.max_rel, difference / (float(np.abs(want).max()) + 1e-12))


@dataclass
class VerifyReport:
    """What `verify_bundle` measured.

    Attributes:
        bundle: Name in the manifest.
        device: Name of the device, such as ``cuda:0``.
        backend: Back end that ran.
        precision: Variant that ran.
        samples: Golden samples compared.
        tensors: Errors in pipeline order; `pixel_values` is the pre-processing alone, the rest accumulates.
        mean_iou: Over all masks at the size of the picture.
        min_iou: Of the worst mask. Pixels whose reference logit is nearer to the threshold than the tensors'
            tolerance (1e-4 of the mask's largest logit) count as equal.
        seconds: Opening and running.
        clip: The tracked golden clip; None where the bundle does not track, or its graphs could not run.
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
    mean_iou: float
    min_iou: float
    seconds: float
    clip: ClipCheck | None = None
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
        """How far masks are from PyTorch's, a line for pictures and one for the clip."""
        lines = [
            f"mask IoU with PyTorch: mean {self.mean_iou:.4f}, lowest {self.min_iou:.4f} "
            f"({self.samples} samples, {self.seconds:.1f} s)"
        ]
        if self.clip is not None:
            lines.append(
                f"tracked clip: mean {self.clip.mean_iou:.4f}, lowest {self.clip.min_iou:.4f} "
                f"({self.clip.objects} objects, {self.clip.frames} frames, {self.clip.shown} masks not empty)"
            )
        return lines

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
) -> VerifyReport:
    """Runs the golden samples of a bundle on a device. Stored verdicts are neither asked nor written.

    Args:
        bundle: An open bundle or its folder.
        device: See `Sam2ImagePredictor.open`, as the next three.
        backend: Back end.
        precision: Variant.
        threads: Threads of one call.
        progress: Called with (samples done, samples in all).

    Raises:
        BundleError: No golden samples, or damaged ones; or as `Sam2ImagePredictor.open`.
        DeviceError, ContractError: As `Sam2ImagePredictor.open`.
    """
    start = time.perf_counter()
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    golden = bundle.golden()
    if not golden:
        raise BundleError(f"Bundle '{bundle.manifest.name}' has no golden samples.", "Export it again.")
    clip = bundle.manifest.golden_clip
    steps = len(golden) + (clip is not None)
    errors = {name: TensorError(name, graph=GRAPH_OF[name]) for name in _TENSORS}
    ious: list[float] = []
    on: DeviceInfo | None = None
    tracked: ClipCheck | None = None
    warnings: list[str] = []
    with Sam2ImagePredictor.open(
        bundle, device=device, backend=backend, precision=precision, threads=threads, prove=False
    ) as predictor:
        for index, sample in enumerate(golden):
            more, on = _run_sample(bundle, predictor, sample, errors)
            ious += more
            if progress is not None:
                progress(index + 1, steps)
        info = predictor.info()
        if clip is not None:
            try:
                tracked = _track(bundle, predictor, info, errors, threads)
            except DeviceError as error:
                if info["backend"] != TENSORRT:
                    raise
                warnings.append(f"Tracking was not checked: {error.message}")  # its engines are built apart
            if progress is not None:
                progress(steps, steps)
    assert on is not None  # there is a sample
    for name, tolerance in tolerances(bundle, info["precision"]).items():
        if name in errors:
            errors[name].tolerance = tolerance
    report = VerifyReport(
        bundle=bundle.manifest.name,
        device=info["device"],
        backend=info["backend"],
        precision=info["precision"],
        samples=len(golden),
        tensors=list(errors.values()),
        mean_iou=float(np.mean(ious)),
        min_iou=float(np.min(ious)),
        seconds=time.perf_counter() - start,
        product=on.name,
        compute_capability=on.compute_capability,
        driver=on.driver,
        clip=tracked,
        warnings=[*info["warnings"], *warnings],
        key=_key(bundle, info, on),
    )
    report.problems = judge(report, calibrations_of(bundle.manifest, report.precision))
    if report.problems:
        report.suspect = find_suspect(report.tensors, bundle, report.precision, report.backend, info)
    return report


def _key(bundle: Bundle, info: dict[str, Any], on: DeviceInfo) -> VerdictKey:
    found = locate(bundle, info["backend"], info["precision"], on, IMAGE_GRAPHS)
    return combination_key(bundle, found, on)


def judge(report: VerifyReport, calibrations: Sequence[CalibrationEntry] = ()) -> list[str]:
    """Every figure of a report that misses its bar, in words: that of the precision, or for a calibrated variant the
    one that follows from its budget."""
    found = []
    full = report.precision == "fp32"
    for tensor in report.tensors:
        # Pre-processing runs in float32 whatever the variant.
        if (full or tensor.name == sam2.PIXEL_VALUES) and not tensor.max_rel <= FP32_MAX_REL:
            found.append(f"{tensor.name}: relative error {tensor.max_rel:.2e} > {FP32_MAX_REL:.0e}")
        elif not np.isfinite(tensor.max_rel):
            found.append(f"{tensor.name}: not finite")
    own = golden_bar(calibrations)
    bar = own if own is not None else MIN_IOU.get(report.precision, MIN_IOU["fp32"])
    iou, which = (report.min_iou, "lowest") if full else (report.mean_iou, "mean")
    if not iou >= bar:
        found.append(f"masks: {which} IoU {iou:.4f} < {bar:.4g}")
    if report.clip is not None:
        own = golden_bar(calibrations, clip=True)
        bar = own if own is not None else bar
        iou = report.clip.min_iou if full else report.clip.mean_iou
        if not iou >= bar:
            found.append(f"tracked clip: {which} IoU {iou:.4f} < {bar:.4g}")
    return found


def _track(
    bundle: Bundle,
    predictor: Sam2ImagePredictor,
    info: dict[str, Any],
    errors: dict[str, TensorError],
    threads: int | None,
) -> ClipCheck:
    """Runs the golden clip in the combination that the predictor runs; adds the video graphs' tensors to `errors`."""
    from ..sam2_video.check import check_tracking, open_video_sessions

    graphs = graph_of(bundle)

    def add(name: str, got: npt.NDArray[Any], want: npt.NDArray[Any]) -> None:
        errors.setdefault(name, TensorError(name, graph=graphs[name])).add(got, want)

    sample = bundle.manifest.golden_clip
    assert sample is not None
    device = predictor.encode(decode_image(bundle.file(sample.image))).device
    with open_video_sessions(bundle, device, info["backend"], info["precision"], threads) as sessions:
        return check_tracking(bundle, predictor, sessions, add)


_FEATURES = (sam2.IMAGE_EMBED, sam2.HIGH_RES_0, sam2.HIGH_RES_1)
_ANSWERS = {
    sam2.MASKS: "low_res_logits",
    sam2.IOU_SCORES: "iou_scores",
    sam2.OBJECT_SCORE_LOGITS: "object_score_logits",
}
_TENSORS = (sam2.PIXEL_VALUES, *_FEATURES, *_ANSWERS)


def _run_sample(
    bundle: Bundle, predictor: Sam2ImagePredictor, sample: GoldenSample, errors: dict[str, TensorError]
) -> tuple[list[float], DeviceInfo]:
    """Compares one sample; returns the IoU of each of its masks, and the device that ran it."""
    stored = bundle.load_npz(sample.tensors)
    image = decode_image(bundle.file(sample.image))
    try:
        if tuple(stored["original_size"]) != image.shape[:2]:
            raise ValueError(f"the picture has {image.shape[:2]}, the sample {stored['original_size'].tolist()}")
        side = predictor.constants.image_size
        pixels = np.empty((1, 3, side, side), np.float32)
        preprocess(image, predictor.constants, pixels)
        embedding = predictor.encode(image)
        tensors = (pixels, embedding.image_embed, *embedding.high_res)
        for name, tensor in zip((sam2.PIXEL_VALUES, *_FEATURES), tensors):
            errors[name].add(tensor.reshape(-1)[stored[f"{name}_index"]], stored[f"{name}_values"])
        ious = []
        for row in range(len(stored["labels"])):
            ious += _run_prompt(predictor, embedding, stored, row, errors)
        return ious, embedding.device.info()
    except (KeyError, IndexError, ValueError) as error:
        raise BundleError(f"Golden sample '{sample.name}' is malformed: {error}.", _DAMAGED) from error
    except (ImageError, PromptError) as error:
        raise BundleError(f"Golden sample '{sample.name}' cannot run: {error.message}", error.action) from error


def _run_prompt(
    predictor: Sam2ImagePredictor, embedding: Embedding, stored: Arrays, row: int, errors: dict[str, TensorError]
) -> list[float]:
    """Compares the answer to one prompt, asked alone as the reference was."""
    (batch,) = build_prompts([_prompt(stored, row)], embedding.original_size, predictor.constants)
    with predictor.decode(embedding, batch) as raw:
        for name, got in zip(_ANSWERS, (raw.masks, raw.scores, raw.object_scores)):
            errors[name].add(got, stored[_ANSWERS[name]][row : row + 1])
        wanted = stored[_ANSWERS[sam2.MASKS]][row]
        threshold, scratch = predictor.constants.mask_threshold, Scratch()
        ious = []
        for got, want in zip(raw.masks[0], wanted, strict=True):
            want = np.ascontiguousarray(want)
            margin = FP32_MAX_REL * float(np.abs(want).max())
            masks = np.empty((4, *embedding.original_size), np.bool_)
            write_mask(got, threshold, masks[0], scratch)
            write_mask(want, threshold, masks[1], scratch)
            write_mask(want, threshold - margin, masks[2], scratch)
            write_mask(want, threshold + margin, masks[3], scratch)
            # Between the last two the sign is open within the tensors' own tolerance: no pixel there is a mistake.
            ious.append(mask_iou(np.where(masks[2] & ~masks[3], masks[1], masks[0]), masks[1]))
        return ious


def _prompt(stored: Arrays, row: int) -> Prompt:
    used = stored["labels"][row] >= 0
    box = stored["boxes"][row]
    return Prompt(
        points=stored["points"][row][used],
        labels=stored["labels"][row][used],
        box=None if np.isnan(box).any() else box,
        mask_input=stored["mask_input"][row] if stored["has_mask_input"][row] else None,
    )
