"""Checks a vision-language bundle on this box against PyTorch's answers stored in it (golden samples), without PyTorch.

Each sample holds a picture, a question, sampled values of the features and PyTorch's greedy answer with sampled logits
of every step. The format is documented in ``pixano_edge/export/vlm/golden.py``, which writes it. The whole pipeline
runs as for a user: chat template, tokeniser, image processing, vision encoder and the decoder with its cache, fed with
PyTorch's tokens, so that every step can be compared even after a difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle, GoldenSample
from ...contracts import decoder as contract
from ...contracts import smolvlm
from ...errors import BundleError, ImageError, PromptError
from ...runtime.base import DeviceInfo
from ..calibrated import calibrations_of, golden_bar
from ..images import decode_image
from ..opening import combination_key, locate
from ..sam2.diagnosis import FP32_MAX_REL, ROOM, Suspect, name_suspect
from ..sam2.verify import TensorError
from ..text.messages import read_conversation
from ..verdicts import VerdictKey
from .model import DecoderModel, _result
from .opening import open_vlm

FEATURES = smolvlm.FEATURES
MAX_REL = 1e-3
"""Bar of features and logits at full precision: the whole pipeline's, image and all."""
REDUCED_MAX_REL = {"fp16": 5e-2, "bf16": 2e-1, "int8": 5e-1, "int4": 1.0}
"""What is expected of a reduced precision where the bundle has no figure of its own; it points, it does not judge."""
SHARE_ROOM = 0.1
"""At a reduced precision, the share of PyTorch's tokens that are chosen may be so much below the exporter's figure."""

_DAMAGED = "Copy or download the bundle again, or export it again."


@dataclass
class AnswerReport:
    """What `verify_bundle` measured; see `pixano_edge.engine.models.verify.Report`.

    Attributes:
        bundle: Name in the manifest.
        device: Name of the device, such as ``cuda:0``.
        backend: Back end that ran.
        precision: Variant that ran.
        samples: Golden samples compared.
        tensors: Errors in pipeline order.
        tokens: Of PyTorch's answers.
        equal: Of these, how many have the largest logit, each after PyTorch's tokens before it.
        ties: Of the others, where PyTorch's best two logits are closer than the bar.
        prompts: Samples whose prompt has PyTorch's tokens.
        mean_iou: Share of `equal` and `ties`; what verdicts keep of it.
        min_iou: Of the worst sample.
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
    tokens: int = 0
    equal: int = 0
    ties: int = 0
    prompts: int = 0
    mean_iou: float = 0.0
    min_iou: float = 0.0
    seconds: float = 0.0
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
        """How far answers are from PyTorch's."""
        return [
            f"answers: {self.equal} of {self.tokens} tokens are PyTorch's, {self.ties} more are ties; "
            f"{self.prompts} of {self.samples} prompts ({self.seconds:.1f} s)"
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
) -> AnswerReport:
    """Runs the golden samples of a bundle on a device. Stored verdicts are neither asked nor written.

    Args:
        bundle: An open bundle or its folder.
        device: See `open_vlm`, as the next three.
        backend: Back end.
        precision: Variant.
        threads: Threads of one call.
        progress: Called with (samples done, samples in all).

    Raises:
        BundleError: No golden samples, or damaged ones; or as `open_vlm`.
        DeviceError, ContractError: As `open_vlm`.
    """
    start = time.perf_counter()
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    golden = bundle.golden()
    if not golden:
        raise BundleError(f"Bundle '{bundle.manifest.name}' has no golden samples.", "Export it again.")
    model = open_vlm(
        bundle, device=device, backend=backend, precision=precision, threads=threads, prove=False, warm_up=False
    )
    try:
        info = model.info()
        features = TensorError(FEATURES, graph=smolvlm.VISION_ENCODER)
        logits = TensorError(contract.LOGITS, graph=contract.DECODER)
        report = AnswerReport(
            bundle=bundle.manifest.name,
            device=info["device"],
            backend=info["backend"],
            precision=info["precision"],
            samples=len(golden),
            tensors=[features, logits],
        )
        shares = []
        for index, sample in enumerate(golden):
            shares.append(_run_sample(bundle, model, sample, report))
            if progress is not None:
                progress(index + 1, len(golden))
        on: DeviceInfo = model.device.info()
        info = model.info()
    finally:
        model.close()
    report.mean_iou, report.min_iou = sum(shares) / len(shares), min(shares)
    report.product, report.compute_capability, report.driver = on.name, on.compute_capability, on.driver
    report.warnings = list(info["warnings"])
    found = locate(bundle, info["backend"], info["precision"], on, tuple(bundle.manifest.graphs))
    report.key = combination_key(bundle, found, on)
    for tensor in report.tensors:
        tensor.tolerance = tolerance(bundle, tensor, report.precision)
    report.problems = judge(bundle, report)
    report.seconds = time.perf_counter() - start
    if report.problems:
        tensors = [(t, t.tolerance or FP32_MAX_REL, t.graph) for t in report.tensors]
        report.suspect = name_suspect(tensors, bundle, report.precision, report.backend, info)
    return report


def judge(bundle: Bundle, report: AnswerReport) -> list[str]:
    """Every figure that misses its bar, in words: that of the precision, or for a calibrated variant the one that
    follows from its budget."""
    found = []
    if report.prompts < report.samples:
        found.append(f"prompts: {report.samples - report.prompts} of {report.samples} have other tokens than PyTorch's")
    full = report.precision == "fp32"
    for tensor in report.tensors:
        if full and not tensor.max_rel <= MAX_REL:
            found.append(f"{tensor.name}: relative error {tensor.max_rel:.2e} > {MAX_REL:.0e}")
        elif not np.isfinite(tensor.max_rel):
            found.append(f"{tensor.name}: not finite")
    own = golden_bar(calibrations_of(bundle.manifest, report.precision))
    bar = 1.0 if full else own if own is not None else expected_share(bundle, report.precision) - SHARE_ROOM
    if not report.mean_iou >= bar:
        found.append(f"answers: {report.mean_iou:.3f} of PyTorch's tokens are chosen, less than {bar:.3f}")
    return found


def expected_share(bundle: Bundle, precision: str) -> float:
    """Share of PyTorch's tokens that the exporter saw chosen at a precision; 1 where it says nothing."""
    parity = bundle.manifest.parity
    shares = [
        (g.equal + g.ties) / g.tokens
        for g in (parity.generations if parity else ())
        if g.variant.partition("-")[0] == precision and g.tokens
    ]
    return min(shares, default=1.0)


def tolerance(bundle: Bundle, error: TensorError, precision: str) -> float:
    """Largest relative error that is expected of a tensor: the exporter's figure with room for other kernels."""
    if precision == "fp32":
        return MAX_REL
    parity = bundle.manifest.parity
    measured = [
        entry.max_rel
        for entry in (parity.tensors if parity else ())
        if entry.variant.partition("-")[0] == precision
        and (entry.graph, entry.tensor) == (error.graph, error.name)
        and math.isfinite(entry.max_rel)
    ]
    return max(ROOM * max(measured), MAX_REL) if measured else REDUCED_MAX_REL.get(precision, MAX_REL)


def _run_sample(bundle: Bundle, model: DecoderModel, sample: GoldenSample, report: AnswerReport) -> float:
    """Compares one sample; returns the share of PyTorch's tokens that are chosen."""
    stored = bundle.load_npz(sample.tensors)
    image = decode_image(bundle.file(sample.image))
    features, logits = report.tensors
    try:
        if tuple(stored["original_size"]) != image.shape[:2]:
            raise ValueError(f"the picture has {image.shape[:2]}, the sample {stored['original_size'].tolist()}")
        tokens, index, want = (stored[k] for k in ("tokens", "logits_index", "logits_values"))
        if tokens.ndim != 1 or want.shape != (len(tokens), len(index)) or len(stored["margins"]) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens with logits {list(want.shape)}")
        conversation = read_conversation(str(stored["question"]), [image])
        prompt = model.prepare(conversation, [image])
        same = prompt.ids.tolist() == stored["input_ids"].tolist()
        report.prompts += same
        report.tokens += len(tokens)
        rows = [_result(part.encode()) for part in prompt.images]
        found = np.concatenate([row.reshape(-1) for row in rows]) if rows else np.empty(0, np.float32)
        at = stored["features_index"]
        if found.size > int(at.max()):
            features.add(found[at], stored["features_values"])
        else:  # fewer tiles
            features.max_abs = features.max_rel = float("inf")
        close = stored["margins"] <= 2 * MAX_REL * float(stored["logits_scale"])
        equal = ties = 0
        scale = np.float32(stored["logits_scale"])
        for step, row in enumerate(model.logits(conversation, [image], tokens[:-1].tolist())):
            # The scale is that of all logits, not of those that were kept.
            logits.add(np.append(row[index], scale), np.append(want[step], scale))
            right = int(row.argmax()) == int(tokens[step])
            equal += right
            ties += bool(not right and close[step])
        report.equal += equal
        report.ties += ties
        return (equal + ties) / max(1, len(tokens))
    except (KeyError, IndexError, ValueError) as error:
        raise BundleError(f"Golden sample '{sample.name}' is malformed: {error}.", _DAMAGED) from error
    except (ImageError, PromptError) as error:
        raise BundleError(f"Golden sample '{sample.name}' cannot run: {error.message}", error.action) from error
