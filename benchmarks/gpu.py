"""Speed, start-up, memory and power on a GPU: eager, recorded graphs, TensorRT, ONNX Runtime and PyTorch, in turns.

Cases: the encoder, the decoder without and with a mask input, and the whole click from a prompt to masks at the
photo's size, its features being cached.

Accuracy beside each figure is against the same bundle's fp32 graphs on this machine's CPU, which the exporter proved
equal to PyTorch. A way that cannot run here is listed with its reason, never left out in silence.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.errors import DeviceError, EdgeError, MissingDependencyError
from pixano_edge.engine.provider.hardware import read_hardware
from pixano_edge.engine.runtime import DeviceInfo

from .contenders import CLICK_CASE, EngineContender, Outputs
from .gpu_contenders import CASES, ORT_TENSORRT, GpuContender, Start, TorchGpuContender, Way
from .metrics import Latency, latency
from .power import Power, device_power, measure_power
from .segment import Inputs, compare, interleave, make_inputs

SETTLE_SECONDS = 0.005
"""Pause before a turn; GPUs have no spinning threads, but a clock that drops in long pauses."""
POWER_SECONDS = 2.0
TORCH = "PyTorch CUDA"

Contender = GpuContender | TorchGpuContender


@dataclass(frozen=True)
class GpuRow:
    """One contender in one case.

    Attributes:
        case: What was timed.
        contender: Who.
        wall: Seconds of the whole call, the wait at its end included.
        device: Seconds between the events around upload and launches, on the GPU's clock; None for the whole click,
            most of which is the host's.
        ratio: p50 of PyTorch fp32 over this p50, wall clock; None without PyTorch.
        relative_error: Worst output tensor against the CPU's fp32; None for the whole click, whose answer is masks.
        mask_iou: Worst mask against the CPU's fp32; None for the encoder.
    """

    case: str
    contender: str
    wall: Latency
    device: Latency | None
    ratio: float | None
    relative_error: float | None
    mask_iou: float | None


@dataclass(frozen=True)
class GpuFigures:
    """One run of the benchmark.

    Attributes:
        device: The GPU.
        rows: Steady state.
        starts: First run by contender.
        powers: By contender, while the encoder runs back to back; None where it is not told.
        skipped: Why a way did not run, by its name.
        warnings: What contenders said, by name.
    """

    device: DeviceInfo
    rows: list[GpuRow]
    starts: dict[str, Start]
    powers: dict[str, Power | None]
    skipped: dict[str, str]
    warnings: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; times in seconds."""
        return asdict(self)


def require_gpu(device: str) -> DeviceInfo:
    """The GPU that a benchmark is to run on.

    Raises:
        DeviceError: Not the name of a CUDA device, or there is no such device here.
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise DeviceError(
            f"'{device}' is not a GPU.", "Name one, for example --device cuda:0; for CPUs: pixano-edge bench segment"
        )
    hardware, index = read_hardware(), int(match[1] or 0)
    if not hardware.gpus:
        raise DeviceError(
            f"There is no GPU to measure here: {hardware.reason}",
            "Run it on the GPU box; 'pixano-edge doctor' says what is missing. For CPUs: pixano-edge bench segment",
        )
    if index >= len(hardware.gpus):
        raise DeviceError(f"There is no '{device}' here.", f"GPUs: {len(hardware.gpus)}, counted from 0.")
    return hardware.gpus[index]


def ways(precisions: Sequence[str]) -> list[Way]:
    """Every way to run, in the order of the tables.

    ONNX Runtime's TensorRT provider is there launch by launch only: the engine records its CUDA provider, and no other.
    """
    kinds = [("onnxruntime", False), ("onnxruntime", True), (ORT_TENSORRT, False), ("tensorrt", False)]
    return [Way(backend, p, capture) for p in precisions for backend, capture in (*kinds, ("tensorrt", True))]


def measure_gpu(
    bundle: Bundle,
    device: str = "cuda:0",
    *,
    precisions: Sequence[str] = ("fp32", "fp16"),
    checkpoint: Path | None = None,
    rounds: int = 50,
    power_seconds: float = POWER_SECONDS,
    step: Callable[[str], None] = lambda _: None,
) -> GpuFigures:
    """Times every way that runs here.

    Args:
        bundle: SAM 2 bundle.
        device: ``cuda:N``.
        precisions: Variants to take; one that the bundle lacks is listed as skipped.
        checkpoint: Folder in transformers' format that the bundle was made from; None leaves PyTorch out.
        rounds: Timed calls per contender and case.
        power_seconds: Back-to-back encoder calls for the power of each contender; 0 leaves it out.
        step: Told what is about to be done.

    Raises:
        DeviceError: No such GPU, or no way runs on it.
    """
    gpu = require_gpu(device)
    name = f"cuda:{gpu.index}"
    constants = Sam2Constants.from_dict(dict(bundle.manifest.constants))
    inputs = make_inputs(constants)
    step("reference on the CPU")
    reference = _reference(bundle, constants, inputs)
    skipped: dict[str, str] = {}
    with _closing() as contenders:
        for way in ways(precisions):
            step(f"opening {way}")
            try:
                contenders[str(way)] = GpuContender(bundle, constants, inputs, way, name)
            except EdgeError as error:
                skipped[str(way)] = _why(error)
        for dtype in ("float32", "float16"):
            label = f"{TORCH} {'fp32' if dtype == 'float32' else 'fp16'}"
            why = _torch_missing(checkpoint)
            if why or checkpoint is None:
                skipped[label] = why
                continue
            step(f"opening {label}")
            try:
                contenders[label] = TorchGpuContender(checkpoint, inputs, dtype, name)
            except (RuntimeError, OSError, ValueError) as error:  # torch's own, out of memory included
                skipped[label] = f"PyTorch failed: {_why(error)}"
        if not contenders:
            raise DeviceError(
                f"No way to run '{bundle.manifest.name}' on {name} works. "
                + "; ".join(f"{way}: {why}" for way, why in skipped.items()),
                "'pixano-edge doctor' says what is missing.",
            )
        rows: list[GpuRow] = []
        for case in CASES:
            step(case)
            rows += _case(case, contenders, reference[case], rounds, skipped)
        powers: dict[str, Power | None] = {}
        for label, contender in contenders.items():
            step(f"power of {label}")
            powers[label] = (
                measure_power(contender.encode, lambda: device_power(gpu.index), power_seconds)
                if power_seconds
                else None
            )
        starts = {label: c.start for label, c in contenders.items()}
        warnings = {label: said for label, c in contenders.items() if (said := c.warnings())}
    return GpuFigures(gpu, rows, starts, powers, skipped, warnings)


def _case(
    case: str, contenders: Mapping[str, Contender], reference: Outputs, rounds: int, skipped: dict[str, str]
) -> list[GpuRow]:
    """Rows of one case; a contender that cannot run it goes into `skipped` and stops nobody else."""
    ready: dict[str, Contender] = {}
    for name, contender in contenders.items():
        why = _enter(contender, case)
        if why is None:
            ready[name] = contender
        else:
            skipped[f"{name}, {case}"] = why
    if not ready:
        return []
    wall = interleave({n: c.calls()[case] for n, c in ready.items()}, rounds, settle=SETTLE_SECONDS)
    base = latency(wall[f"{TORCH} fp32"]).p50 if f"{TORCH} fp32" in wall else None
    rows = []
    for name, contender in ready.items():
        # The warm-up turns are the first ones; only the last `rounds` were timed by the wall clock too.
        on_device = [ms / 1000 for ms in contender.milliseconds[case][-rounds:]]
        figures = latency(wall[name])
        worst, agreement = compare(case, contender.outputs(case), reference)
        ratio = None if base is None else base / figures.p50
        clock = None if case == CLICK_CASE else latency(on_device)
        rows.append(GpuRow(case, name, figures, clock, ratio, worst, agreement))
    return rows


def _enter(contender: Contender, case: str) -> str | None:
    """Why a contender cannot run a case; None where it is ready to."""
    try:
        contender.enter(case)
    except (EdgeError, RuntimeError) as error:  # the latter is torch's, out of memory included
        return _why(error)
    return None


def _why(error: Exception) -> str:
    if isinstance(error, EdgeError):
        return f"{error.message} {error.action}".strip()
    return (str(error).splitlines() or [type(error).__name__])[0]


def _reference(bundle: Bundle, constants: Sam2Constants, inputs: Inputs) -> dict[str, Outputs]:
    cpu = EngineContender(bundle, constants, inputs, threads=None)
    try:
        return {case: cpu.outputs(case) for case in CASES}
    finally:
        cpu.close()


def _torch_missing(checkpoint: Path | None) -> str:
    """Why PyTorch does not race; empty when it can."""
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            return MissingDependencyError(module, "export", "The comparison with PyTorch").message
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} has no CUDA here."
    return "" if checkpoint is not None else "Without --checkpoint there are no weights for PyTorch."


@contextmanager
def _closing() -> Iterator[dict[str, Contender]]:
    """A dict of contenders that are closed at the end, the last one first."""
    contenders: dict[str, Contender] = {}
    try:
        yield contenders
    finally:
        for contender in reversed(contenders.values()):
            contender.close()


COLUMNS = ("case", "contender", "p50 ms", "p90 ms", "p99 ms", "GPU p50 ms", "vs torch fp32", "rel. error", "mask IoU")
START_COLUMNS = ("contender", "load s", "first run s", "settle s", "launches", "memory MB", "power W", "J per image")


def table_rows(figures: GpuFigures) -> list[tuple[str, ...]]:
    """Cells of the steady-state table."""
    return [
        (
            row.case,
            row.contender,
            *(f"{1000 * s:.2f}" for s in (row.wall.p50, row.wall.p90, row.wall.p99)),
            "n/a" if row.device is None else f"{1000 * row.device.p50:.2f}",
            "n/a" if row.ratio is None else f"{row.ratio:.2f}x",
            "n/a" if row.relative_error is None else f"{row.relative_error:.1e}",
            "n/a" if row.mask_iou is None else f"{row.mask_iou:.4f}",
        )
        for row in figures.rows
    ]


def start_rows(figures: GpuFigures) -> list[tuple[str, ...]]:
    """Cells of the table of first runs, memory and power."""
    rows = []
    for name, start in figures.starts.items():
        power = figures.powers.get(name)
        rows.append(
            (
                name,
                *(f"{s:.2f}" for s in (start.load, start.first, start.settle)),
                "replayed" if start.recorded else "one by one",
                "n/a" if start.memory is None else f"{start.memory / 1e6:.0f}",
                "n/a" if power is None else f"{power.watts:.0f}",
                "n/a" if power is None else f"{power.joules:.2f}",
            )
        )
    return rows
