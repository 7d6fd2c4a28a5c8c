"""What a calibration found: the search fills it in, the report draws it, and both keep it as JSON.

Everything here is plain data. `CalibrationResult.to_dict` is ready for JSON (pictures as base64 of PNG, NaN and
infinity as None); `CalibrationResult.from_dict` reads it back, so a report can be drawn again without calibrating.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.errors import EdgeError

from .plain_data import build, plain

RESULT_VERSION = 1
HISTOGRAM_BINS = 64
"""Bins of a histogram in a result; finer ones are merged."""

_BUDGET = re.compile(r"\s*([a-z][a-z0-9_]*)\s*>=\s*([0-9]*\.?[0-9]+)\s*(%?)\s*")


@dataclass(frozen=True)
class Budget:
    """What a variant must reach on held-out data.

    Attributes:
        metric: For example ``mask_iou``; 1 is perfect for all of them.
        at_least: Lowest mean that passes, 0 to 1.
    """

    metric: str
    at_least: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads ``mask_iou>=0.98`` or ``mask_iou>=98%``.

        Raises:
            EdgeError: It is neither, or the bar lies outside 0 to 1.
        """
        found = _BUDGET.fullmatch(text)
        bar = float(found[2]) / (100 if found[3] else 1) if found else -1.0
        if found is None or not 0 < bar <= 1:
            raise EdgeError(
                f"'{text}' is no budget.", "Give a metric and its lowest mean, for example --budget 'mask_iou>=0.98'."
            )
        return cls(found[1], bar)

    def met(self, value: float | None) -> bool:
        """Whether a mean passes; none at all and NaN do not."""
        return value is not None and value >= self.at_least

    def __str__(self) -> str:
        return f"{self.metric}>={self.at_least:g}"


@dataclass(frozen=True)
class SkippedFile:
    """A file of the calibration data that was left out.

    Attributes:
        name: As the user knows it.
        reason: In words.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class DataSummary:
    """The data of a calibration.

    Attributes:
        source: Name of the folder or file (no full path).
        kind: ``images``, ``video``, ``coco`` or ``pixano``.
        calibration: Names of the samples that ranges were taken from.
        held_out: Names of the samples that the variants were judged on; none is in `calibration`.
        skipped: Files that could not be used.
        seed: Of the split.
        digest: SHA-256 over the used files' contents, hexadecimal.
        warnings: For example few samples.
    """

    source: str
    kind: str
    calibration: tuple[str, ...]
    held_out: tuple[str, ...]
    skipped: tuple[SkippedFile, ...] = ()
    seed: int = 0
    digest: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Speed:
    """Time of one graph, or of the whole pipeline, on this machine.

    Attributes:
        what: A graph's name, or ``pipeline``.
        backend: For example ``onnxruntime CPUExecutionProvider``.
        threads: Given to it; None for its default.
        runs: Calls that were timed.
        p50: Median in seconds.
        p90: 90th percentile in seconds.
        clock: ``wall``, or ``cpu`` for the process's own time where the machine was busy.
    """

    what: str
    backend: str
    threads: int | None
    runs: int
    p50: float
    p90: float
    clock: str = "wall"


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one graph while ONNX Runtime runs it on the CPU, in bytes.

    Attributes:
        graph: Its name in the contract.
        session: What the open graph takes, its weights above all.
        activations: What intermediate tensors take at their most.
        fp32_session: The same of fp32, as the bundle tells; None where it does not.
        fp32_activations: The same.
    """

    graph: str
    session: int
    activations: int
    fp32_session: int | None = None
    fp32_activations: int | None = None


@dataclass(frozen=True)
class GraphSize:
    """One graph's file of a variant.

    Attributes:
        graph: Its name in the contract.
        bytes: Size of the variant's file.
        fp32_bytes: What the same graph takes with its weights in fp32.
        layers: Quantised matrix products and convolutions.
        of_layers: All of them.
    """

    graph: str
    bytes: int
    fp32_bytes: int
    layers: int = 0
    of_layers: int = 0


@dataclass(frozen=True)
class SampleValue:
    """The metric on one sample."""

    name: str
    value: float


@dataclass(frozen=True)
class Score:
    """The metric of a variant against the answers of fp32, over samples.

    Attributes:
        mean: Over the samples.
        samples: Each value, in the order of the data.
    """

    mean: float
    samples: tuple[SampleValue, ...] = ()

    @classmethod
    def of(cls, samples: tuple[SampleValue, ...]) -> Score:
        """The score of some samples; NaN for none."""
        return cls(sum(s.value for s in samples) / len(samples) if samples else math.nan, samples)


@dataclass(frozen=True)
class TruthScore:
    """Accuracy against ground truth, where the data have some.

    Attributes:
        metric: For example ``AP50``.
        fp32: Of the full graphs.
        variant: Of this variant.
        samples: How many.
    """

    metric: str
    fp32: float
    variant: float
    samples: int


@dataclass(frozen=True)
class WorstSample:
    """One of the samples with the lowest value.

    Attributes:
        name: Of the sample.
        value: Of the metric.
        asked: The prompt in words; may be empty.
        fp32_png: The picture with fp32's answer on it, PNG; None where the answer is text alone.
        variant_png: The same with the variant's answer.
        fp32_text: Answer in words; may be empty.
        variant_text: The same of the variant.
    """

    name: str
    value: float
    asked: str = ""
    fp32_png: bytes | None = None
    variant_png: bytes | None = None
    fp32_text: str = ""
    variant_text: str = ""


@dataclass(frozen=True)
class BlockResult:
    """One block: a few matrix products or convolutions that are quantised together.

    Attributes:
        graph: Where it is.
        name: Its scope in the graph.
        kind: For example ``attention``, ``mlp``, ``conv``.
        macs: Multiplications of one run.
        weight_bytes: In fp32.
        quantised: Whether it is in the variant.
        why: Why it stayed in high precision; empty where it did not.
        alone: Mean of the metric with this block alone quantised, on calibration data; None when not measured.
        without: The same with all others quantised; None when not measured.
    """

    graph: str
    name: str
    kind: str
    macs: int
    weight_bytes: int
    quantised: bool
    why: str = ""
    alone: float | None = None
    without: float | None = None


@dataclass(frozen=True)
class TensorRange:
    """What one activation held over the calibration data, and the range that was chosen.

    Attributes:
        graph: Where it is.
        name: Of the tensor.
        limit: Upper edge of the last bin; the first starts at 0.
        counts: How many |values| fell into each bin; at most `HISTOGRAM_BINS`, all of one width.
        amax: Chosen: larger values are clipped.
        method: Which calibrator: ``minmax``, ``entropy``, ``percentile 99.99``, ``mse``.
        clipped: Fraction of the calibration values beyond `amax`.
        held_out_clipped: Fraction of the held-out values beyond `amax`; None when not measured.
        smoothed: Whether scales were migrated into the weights before.
    """

    graph: str
    name: str
    limit: float
    counts: tuple[int, ...]
    amax: float
    method: str
    clipped: float
    held_out_clipped: float | None = None
    smoothed: bool = False

    @staticmethod
    def merged(counts: npt.NDArray[Any]) -> tuple[int, ...]:
        """Counts of at most `HISTOGRAM_BINS` bins out of more of one width; their number must be a multiple."""
        step = -(-len(counts) // HISTOGRAM_BINS)
        if len(counts) % step:
            raise ValueError(f"{len(counts)} bins cannot be merged into groups of {step}")
        return tuple(int(n) for n in np.asarray(counts).reshape(-1, step).sum(axis=1))


@dataclass(frozen=True)
class VariantResult:
    """One variant that was made and judged.

    Attributes:
        name: Its key in the manifest, for example ``int8``.
        precision: As in the manifest.
        graphs: Files of the graphs that it changed.
        bytes: Weights and graphs of the whole variant.
        fp32_bytes: The same of fp32.
        budget: What it had to reach.
        held_out: On data that no range was taken from; None when it was refused before.
        on_calibration: On the calibration data; far above `held_out` means that they do not stand for the task.
        truth: Against ground truth; None where there is none.
        fp32_speed: Of the full graphs, taken in turns with `speed`.
        speed: Of the variant, entries as in `fp32_speed`.
        memory: Of the graphs that it changed; empty where it was not measured.
        passed: Whether it met the budget and every check.
        published: Whether it is in the bundle.
        problems: What failed, in words; empty when `passed`.
        notes: What a reader should know, for example where it is not faster and what to take instead.
        blocks: Every block of the changed graphs.
        ranges: Of the quantised activations.
        worst: The lowest samples first, at most ten.
    """

    name: str
    precision: str
    graphs: tuple[GraphSize, ...]
    bytes: int
    fp32_bytes: int
    budget: Budget
    held_out: Score | None
    passed: bool
    published: bool
    on_calibration: Score | None = None
    truth: TruthScore | None = None
    fp32_speed: tuple[Speed, ...] = ()
    speed: tuple[Speed, ...] = ()
    memory: tuple[MemoryUse, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    blocks: tuple[BlockResult, ...] = ()
    ranges: tuple[TensorRange, ...] = ()
    worst: tuple[WorstSample, ...] = ()

    @property
    def size_ratio(self) -> float:
        """Size relative to fp32."""
        return self.bytes / self.fp32_bytes if self.fp32_bytes else math.nan


@dataclass(frozen=True)
class CalibrationResult:
    """One run of `pixano-edge calibrate`.

    Attributes:
        bundle: Name of the bundle.
        bundle_hash: `Bundle.hash` of the bundle that was calibrated, before any variant was added.
        family: Of the bundle.
        architecture: For example ``sam2.1-hiera-tiny``.
        created: ISO 8601 in UTC.
        command: What was asked, without paths.
        hardware: The machine, a fact each, for example ``CPU: ...``, ``versions: ...``.
        data: What it was calibrated and judged on.
        variants: In the order in which they were made.
        seconds: What the run took, over all resumptions.
        notes: About the run as a whole.
        version: Of this layout.
    """

    bundle: str
    bundle_hash: str
    family: str
    architecture: str
    created: str
    command: str
    hardware: tuple[str, ...]
    data: DataSummary
    variants: tuple[VariantResult, ...]
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    version: int = field(default=RESULT_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        found = plain(self)
        assert isinstance(found, dict)
        return found

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CalibrationResult:
        """Reads what `to_dict` gave; unknown fields, missing ones and another `version` are refused.

        Raises:
            EdgeError: It is not such a result.
        """
        told = content.get("version") if isinstance(content, dict) else None
        if told != RESULT_VERSION:
            raise EdgeError(
                f"This is no result of a calibration that this version reads (layout {told}, known {RESULT_VERSION}).",
                "Calibrate again, or update pixano-edge.",
            )
        try:
            return build(cls, content)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise EdgeError(f"The result of the calibration is damaged: {error}.", "Calibrate again.") from error
