"""Encoder, decoder and whole-click times of the engine, interleaved with PyTorch, plain ONNX Runtime and OpenVINO.

All contenders get the same weights, the same input and the same number of threads, in one process. They take turns
call by call, in an order that rotates, so that a slow minute of the machine hits all of them alike, with a pause
between turns: idle threads of a contender that spins would otherwise take their time from whoever comes next.
Accuracy against PyTorch in fp32 stands beside each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.host import read_host
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.models.masks import mask_iou

from .contenders import CLICK_CASE, ENCODER_CASE, MASK_CASE, EngineContender, FileContender, OrtGraph, TorchContender
from .metrics import Latency, latency, relative_error
from .openvino_contender import PRECISIONS, OpenVinoGraph, left_out
from .torch_options import FAILURES, Beside, first_line, use_best_threads

ORIGINAL_SIZE = (540, 960)
"""Height and width of the picture that the whole click returns masks for."""

REFERENCE = "PyTorch fp32"

SETTLE_SECONDS = 0.06
"""Pause before a turn. ONNX Runtime's threads were seen to spin for more than 10 and less than 30 ms."""


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Attributes:
        case: What was timed.
        contender: Who.
        seconds: Percentiles.
        ratio: Reference's p50 over this p50 (above 1: faster than PyTorch in fp32); None without torch.
        relative_error: Worst output tensor against PyTorch fp32, max |difference| / max |reference|; None for masks.
        mask_iou: Worst mask against PyTorch fp32; None for the encoder.
    """

    case: str
    contender: str
    seconds: Latency
    ratio: float | None
    relative_error: float | None
    mask_iou: float | None


@dataclass(frozen=True)
class Inputs:
    """What every contender gets.

    Attributes:
        picture: (H, W, 3) uint8 RGB, the size of `ORIGINAL_SIZE`.
        pixels: (1, 3, S, S) float32, normalised.
        point: (x, y) in model pixels.
        mask: (m, m) float32 logits for the mask input.
    """

    picture: npt.NDArray[np.uint8]
    pixels: npt.NDArray[np.float32]
    point: tuple[float, float]
    mask: npt.NDArray[np.float32]


def make_inputs(c: Sam2Constants, seed: int = 0) -> Inputs:
    """A picture of soft coloured blobs, a click near its middle and a disc as mask logits; equal for equal seeds."""
    import cv2

    from pixano_edge.engine.models.sam2.preprocess import preprocess

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 16, 3), dtype=np.uint8)
    height, width = ORIGINAL_SIZE
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    pixels = np.empty((1, 3, c.image_size, c.image_size), np.float32)
    preprocess(picture, c, pixels)
    y, x = np.mgrid[: c.mask_size, : c.mask_size] / c.mask_size - 0.5
    mask = (20 * (0.3 - np.hypot(x, y))).astype(np.float32)
    return Inputs(picture, pixels, (0.53 * c.image_size, 0.46 * c.image_size), mask)


Contender = EngineContender | FileContender | TorchContender


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2, settle: float = SETTLE_SECONDS
) -> dict[str, list[float]]:
    """Times every call `rounds` times, taking turns; the order rotates from round to round.

    Args:
        calls: What to time, by name.
        rounds: Timed calls of each.
        warmup: Calls of each before that.
        settle: Seconds to wait before each call, not timed.

    Returns:
        Seconds per call by name, without the warm-up.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            time.sleep(settle)
            start = time.perf_counter()
            calls[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(
    case: str, outputs: Mapping[str, npt.NDArray[np.float32]], reference: Mapping[str, npt.NDArray[np.float32]]
) -> tuple[float | None, float | None]:
    """Worst relative error over the tensors, and worst IoU over the masks; None for what the case does not have.

    Raises:
        ValueError: The contenders return other tensors or shapes.
    """
    worst = None if case == CLICK_CASE else max(relative_error(outputs[name], reference[name]) for name in reference)
    if case == ENCODER_CASE:
        return worst, None
    side = reference[sam2.MASKS].shape[-2:]
    pairs = zip(outputs[sam2.MASKS].reshape(-1, *side), reference[sam2.MASKS].reshape(-1, *side), strict=True)
    return worst, min(mask_iou(a > 0, b > 0) for a, b in pairs)


def measure(
    bundle: Bundle,
    checkpoint: Path | None,
    *,
    rounds: int,
    threads: int,
    beside: Beside | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Times and compares every contender.

    Args:
        bundle: Exported from `checkpoint`.
        checkpoint: Folder in transformers' format; None leaves PyTorch and the accuracy out.
        rounds: Encoder calls per contender; the decoder and the whole click are called five times as often.
        threads: CPU threads of each contender; PyTorch takes fewer where that is faster.
        beside: Who else takes part; filled with who does not, and why.
        step: Told what is about to be timed.
    """
    beside = beside or Beside()
    constants = Sam2Constants.from_dict(dict(bundle.manifest.constants))
    inputs = make_inputs(constants)
    step("loading")
    contenders: dict[str, Contender] = {"pixano-edge fp32": EngineContender(bundle, constants, inputs, threads)}
    contenders["ONNX Runtime, plain"] = FileContender(bundle, inputs, lambda path: OrtGraph(path, threads))
    beside.left_out |= left_out(read_host().cpu_flags)
    for name in sorted(PRECISIONS.keys() - beside.left_out.keys()):
        open_graph = partial(OpenVinoGraph, threads=threads, precision=PRECISIONS[name])
        _add(contenders, beside, name, partial(FileContender, bundle, inputs, open_graph))
    if checkpoint is not None:
        dtypes = {REFERENCE: "float32", "PyTorch bf16": "bfloat16"}
        for name, dtype in dtypes.items():
            contenders[name] = TorchContender(checkpoint, inputs, threads, dtype)
        beside.torch_threads = use_best_threads(contenders[REFERENCE].encode, threads)
        for name, dtype in dtypes.items() if beside.compiled else ():
            step(f"compiling {name}")
            _add(
                contenders, beside, f"{name}, compiled",
                lambda d=dtype: TorchContender(checkpoint, inputs, beside.torch_threads or threads, d, True),  # type: ignore[misc]
            )  # fmt: skip
    cases: list[tuple[str, int, Callable[[Contender], Callable[[], object] | None]]] = [
        (ENCODER_CASE, rounds, lambda c: c.encode),
        ("decoder, one click", 5 * rounds, lambda c: c.decode),
        (MASK_CASE, 5 * rounds, lambda c: c.decode_with_mask),
        (CLICK_CASE, 5 * rounds, lambda c: c.click),
    ]
    rows: list[Row] = []
    for case, count, pick in cases:
        step(case)
        calls = {name: call for name, c in contenders.items() if (call := pick(c)) is not None}
        seconds = {name: latency(values) for name, values in interleave(calls, count).items()}
        outputs = {name: contenders[name].outputs(case) for name in calls}
        reference = seconds.get(REFERENCE)
        for name in calls:
            error, agreement = compare(case, outputs[name], outputs[REFERENCE]) if reference else (None, None)
            ratio = reference.p50 / seconds[name].p50 if reference else None
            rows.append(Row(case, name, seconds[name], ratio, error, agreement))
    return rows


def _add(contenders: dict[str, Contender], beside: Beside, name: str, make: Callable[[], Contender]) -> None:
    """Adds who can be made and runs; tells why of others."""
    try:
        one = make()
        one.decode()
        one.decode_with_mask()
    except FAILURES as error:
        beside.left_out[name] = first_line(error)
    else:
        contenders[name] = one


COLUMNS = ("case", "contender", "p50 ms", "p90 ms", "p99 ms", "vs torch fp32", "rel. error", "mask IoU")


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of the table; the ratio is above 1 where the contender is faster than PyTorch fp32."""
    return [
        (
            row.case,
            row.contender,
            *(f"{1000 * s:.2f}" for s in (row.seconds.p50, row.seconds.p90, row.seconds.p99)),
            "n/a" if row.ratio is None else f"{row.ratio:.2f}x",
            "n/a" if row.relative_error is None else f"{row.relative_error:.1e}",
            "n/a" if row.mask_iou is None else f"{row.mask_iou:.4f}",
        )
        for row in rows
    ]


def to_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON-ready values, times in seconds."""
    return [asdict(row) for row in rows]
