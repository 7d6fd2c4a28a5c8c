"""Time per frame of tracking, the engine and PyTorch's video predictor in turns, and what one more object costs.

A frame counts from the picture (uint8) to the masks at the picture's size, with a full memory bank: the prompted frame
and 6 earlier ones, and 16 object pointers. Filling it by tracking would take longer than the measurement, so the first
tracked frame's memory stands for all earlier ones, in every contender alike; the work does not depend on the values.
Frame for frame every contender gets the same pictures, and their masks are compared.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.demo_clip import read_clip
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.bank import Memory
from pixano_edge.engine.models.sam2_video.frames import Frames, open_frames
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel
from pixano_edge.engine.runtime.base import Device

from .metrics import Latency, latency, relative_error
from .segment import ORIGINAL_SIZE, REFERENCE, interleave
from .torch_options import FAILURES, Beside, compile_modules, first_line, use_best_threads

ENGINE, BF16 = "pixano-edge fp32", "PyTorch bf16"

DEMO = "sam2-demo"
"""Name of the packaged bundle."""

PICTURES = 8
"""Different frames of a clip."""

FILLED = 16
"""Frames that are there before the first timed one, the prompted one counted: the bank is full then."""

Float32 = npt.NDArray[np.float32]
Image = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Answer:
    """One frame: (n, m, m) float32 logits and (n, H, W) bool masks."""

    logits: Float32
    masks: npt.NDArray[np.bool_]


class Clip(Frames):
    """A few pictures over and over, there and back, so that nothing jumps: a clip of any length.

    Args:
        pictures: (H, W, 3) uint8 RGB, of one size.
        marks: (x, y) of clicks on the first one.
        length: Frames.
    """

    def __init__(self, pictures: Sequence[Image], marks: Sequence[tuple[float, float]], length: int) -> None:
        self.size = (pictures[0].shape[0], pictures[0].shape[1])
        self._pictures, self._marks, self._length = pictures, marks, length

    def clicks(self, objects: int) -> list[tuple[float, float]]:
        """A click (x, y) for each object; with more objects than marks, some share one."""
        return [self._marks[i % len(self._marks)] for i in range(objects)]

    def __len__(self) -> int:
        return self._length

    def _read(self, index: int) -> Image:
        last = len(self._pictures) - 1
        step = index % (2 * last)
        return self._pictures[min(step, 2 * last - step)]


def blobs(length: int, seed: int = 0) -> Clip:
    """Blobs of colour that move over each other, for models that know nothing."""
    import cv2

    rng = np.random.default_rng(seed)
    height, width = ORIGINAL_SIZE
    ground, over = (rng.integers(0, 256, (9, 16, 3), dtype=np.uint8) for _ in range(2))
    large = [cv2.resize(part, (width, height), interpolation=cv2.INTER_CUBIC) for part in (ground, over)]
    y, x = np.mgrid[:height, :width]
    pictures: list[Image] = []
    for step in range(PICTURES):
        inside = np.hypot(x - width * (0.35 + 0.04 * step), y - height * 0.5) < height / 3
        pictures.append(np.where(inside[..., None], large[1], large[0]).astype(np.uint8))
    # The middle first, the edges last.
    marks = [(width * (0.19 + 0.0875 * i), height * (0.3 + 0.2 * (i % 3))) for i in (4, 3, 5, 2, 6, 1, 7, 0)]
    return Clip(pictures, marks, length)


def demo_clip(length: int) -> Clip:
    """The start of the clip of `pixano-edge demo`, for the demo model: it sees no object in blobs."""
    found = read_clip(Path(str(importlib.resources.files("pixano_edge.engine.assets"))) / "demo")
    assert found is not None  # it is part of the package
    frames = open_frames(found[0])
    pictures = [frames[i] for i in range(PICTURES)]
    frames.close()
    return Clip(pictures, [one.click for one in found[2]], length)


class EngineTracking:
    """The engine on one clip with some objects."""

    def __init__(self, model: Sam2VideoModel, clip: Clip, objects: int) -> None:
        self._device: Device = model.predictor.chain.device
        self._tracker = model.track(clip, history=False)
        for number, point in enumerate(clip.clicks(objects), 1):
            self._tracker.add_prompt(number, 0, Prompt(points=[point], labels=[1]))
        list(self._tracker.propagate(0, 1))
        self._fill()
        self._results = self._tracker.propagate(FILLED)
        self.step()

    def _fill(self) -> None:
        for obj in self._tracker._objects.values():
            first = obj.bank.tracked[1].slot
            for frame in range(2, FILLED):
                (slot,) = self._tracker._pool.take(1)
                self._device.copy(slot.features, first.features)
                self._device.copy(slot.pointer, first.pointer)
                np.copyto(slot.logits, first.logits)
                obj.bank.store(Memory(frame, slot), False)

    def step(self) -> None:
        """Tracks the next frame."""
        self._result = next(self._results)

    def outputs(self) -> Answer:
        """Of the last frame."""
        frame = self._result.frame
        logits = [obj.bank.tracked[frame].slot.logits for obj in self._tracker._objects.values()]
        return Answer(np.stack(logits), np.stack([one.mask for one in self._result.objects]))


class TorchTracking:
    """transformers' ``Sam2VideoModel`` on the same clip, all objects in one session.

    Its frames are prepared when they come, as the engine's: the stock processor does it for the whole clip before.
    """

    def __init__(self, model: Any, dtype: Any, constants: Sam2Constants, clip: Clip, objects: int) -> None:
        import torch
        from transformers import Sam2VideoInferenceSession

        self._torch, self._model, self._constants, self._clip = torch, model, constants, clip
        height, width = clip.size
        self._session = Sam2VideoInferenceSession(video_height=height, video_width=width, dtype=dtype)
        self._session.processed_frames = _Prepared(clip, constants, dtype)
        scale = np.array([constants.image_size / width, constants.image_size / height])
        for number, point in enumerate(clip.clicks(objects), 1):
            index = self._session.obj_id_to_idx(number)
            marks = {
                "point_coords": torch.tensor(np.array(point) * scale, dtype=dtype)[None, None, None],
                "point_labels": torch.ones(1, 1, 1, dtype=torch.int32),
            }
            self._session.add_point_inputs(index, 0, marks)
        self._session.obj_with_new_inputs = list(range(1, objects + 1))
        self._frame = 0
        self.step()
        self.step()
        for outputs in self._session.output_dict_per_obj.values():
            for frame in range(2, FILLED):
                outputs["non_cond_frame_outputs"][frame] = outputs["non_cond_frame_outputs"][1]
        self._frame = FILLED
        self.step()

    def step(self) -> None:
        """Tracks the next frame; bilinear resize to the picture and threshold as the processor does."""
        torch = self._torch
        with torch.inference_mode():
            output = self._model(self._session, frame_idx=self._frame)
            self._logits = output.pred_masks[:, 0].float()
            resize = torch.nn.functional.interpolate
            large = resize(self._logits[:, None], self._clip.size, mode="bilinear", align_corners=False)
            self._masks = (large[:, 0] > self._constants.mask_threshold).numpy()
        self._frame += 1

    def outputs(self) -> Answer:
        """Of the last frame."""
        return Answer(self._logits.numpy(), self._masks)


class _Prepared(dict[int, Any]):
    """Frames of a clip as model input, made when they are asked for."""

    def __init__(self, clip: Clip, constants: Sam2Constants, dtype: Any) -> None:
        super().__init__()
        self._clip, self._constants, self._dtype = clip, constants, dtype

    def __len__(self) -> int:
        return len(self._clip)

    def __getitem__(self, index: int) -> Any:
        from pixano_edge.export.sam2.reference import preprocess

        return preprocess(self._clip[index], self._constants)[0].to(self._dtype)


Contender = EngineTracking | TorchTracking


@dataclass(frozen=True)
class Row:
    """One contender with some objects.

    Attributes:
        contender: Who.
        objects: How many.
        seconds: Percentiles of one frame.
        ratio: PyTorch fp32's p50 over this p50; None without torch.
        relative_error: Largest difference of a logit from PyTorch fp32 over its largest logit, on the last frame; None
            where no object is seen there.
        mask_iou: Worst mask against PyTorch fp32 there; likewise.
    """

    contender: str
    objects: int
    seconds: Latency
    ratio: float | None
    relative_error: float | None
    mask_iou: float | None


@dataclass(frozen=True)
class Cost:
    """Seconds of a frame as ``frame + each * objects``.

    Attributes:
        contender: Who.
        frame: What a frame costs without objects: mostly its encoding.
        each: What one object adds.
        residual: Largest distance of a measured p50 from the line, over that p50; None with fewer than three points.
    """

    contender: str
    frame: float
    each: float
    residual: float | None

    def text(self) -> str:
        """For people."""
        rest = "" if self.residual is None else f", off by {100 * self.residual:.1f} % at most"
        return f"{self.contender}: {1000 * self.frame:.1f} ms + {1000 * self.each:.1f} ms per object{rest}"


def fit_cost(contender: str, seconds: Mapping[int, float]) -> Cost:
    """Least squares over p50 by number of objects, each distance taken relative to its p50; at least two numbers."""
    counts, values = np.array(list(seconds)), np.array(list(seconds.values()))
    design = np.stack([1 / values, counts / values], axis=1)
    (frame, each), *_ = np.linalg.lstsq(design, np.ones(len(values)), rcond=None)
    off = np.abs(frame + each * counts - values) / values
    return Cost(contender, float(frame), float(each), float(off.max()) if len(values) > 2 else None)


def measure(
    bundle: Bundle,
    checkpoint: Path | None,
    *,
    objects: Sequence[int],
    rounds: int,
    warmup: int,
    threads: int,
    beside: Beside | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Times and compares every contender with every number of objects, all in turns.

    Args:
        bundle: Exported from `checkpoint`; it tracks.
        checkpoint: Folder in transformers' format with the memory modules; None leaves PyTorch and the accuracy out.
        objects: Numbers of objects.
        rounds: Timed frames of each.
        warmup: Frames of each before that.
        threads: CPU threads of each contender; PyTorch takes fewer where that is faster.
        beside: Who else takes part; filled with who does not, and why.
        step: Told what is about to be done.

    Raises:
        BundleError: The bundle does not track.
    """
    beside = beside or Beside()
    step("loading")
    constants = Sam2Constants.from_dict(bundle.manifest.constants)
    length = FILLED + warmup + rounds + 2
    clip = demo_clip(length) if bundle.manifest.name == DEMO else blobs(length)
    with Sam2VideoModel.open(bundle, "cpu", precision="fp32", threads=threads) as model:
        makers: dict[str, Callable[[int], Contender]] = {ENGINE: lambda n: EngineTracking(model, clip, n)}
        for name, torch_model, dtype in _torch_models(checkpoint, threads, beside.compiled):
            if name == REFERENCE and threads > 1:
                step("choosing PyTorch's threads")
                trial = TorchTracking(torch_model, dtype, constants, clip, 1)
                beside.torch_threads = use_best_threads(trial.step, threads, rounds=1)
            if name.endswith(COMPILED):
                step(f"compiling {name}")
                try:
                    TorchTracking(torch_model, dtype, constants, clip, 1)
                except FAILURES as failure:
                    beside.left_out[name] = first_line(failure)
                    continue
            makers[name] = lambda n, m=torch_model, d=dtype: TorchTracking(m, d, constants, clip, n)  # type: ignore[misc]
        contenders: dict[tuple[str, int], Contender] = {}
        for count in objects:
            step(f"prompting {count} object(s)")
            contenders |= {(name, count): make(count) for name, make in makers.items()}
        step("tracking")
        calls = {f"{name}, {count}": one.step for (name, count), one in contenders.items()}
        seconds = interleave(calls, rounds, warmup)
        times = {key: latency(seconds[f"{key[0]}, {key[1]}"]) for key in contenders}
        rows = []
        for (name, count), one in contenders.items():
            reference = contenders.get((REFERENCE, count))
            error = iou = ratio = None
            if reference is not None:
                ratio = times[REFERENCE, count].p50 / times[name, count].p50
                error, iou = compare(one.outputs(), reference.outputs())
            rows.append(Row(name, count, times[name, count], ratio, error, iou))
        return rows


def compare(got: Answer, want: Answer) -> tuple[float | None, float | None]:
    """Relative error of the logits, and IoU of the worst mask, over the objects that either of the two sees; None and
    None where both see none: the logits of an absent object are a constant, which would agree whatever was computed."""
    seen = [row for row, (a, b) in enumerate(zip(got.masks, want.masks, strict=True)) if a.any() or b.any()]
    if not seen:
        return None, None
    ious = [mask_iou(got.masks[row], want.masks[row]) for row in seen]
    return relative_error(got.logits[seen], want.logits[seen]), min(ious)


def costs(rows: Sequence[Row]) -> list[Cost]:
    """The cost model of each contender; empty with one number of objects."""
    by: dict[str, dict[int, float]] = {}
    for row in rows:
        by.setdefault(row.contender, {})[row.objects] = row.seconds.p50
    return [fit_cost(name, seconds) for name, seconds in by.items() if len(seconds) > 1]


COMPILED = ", compiled"
_PARTS = ("vision_encoder", "memory_attention", "memory_encoder", "mask_decoder")


def _torch_models(checkpoint: Path | None, threads: int, compiled: bool) -> Iterator[tuple[str, Any, Any]]:
    if checkpoint is None:
        return
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    for ending in ("", COMPILED) if compiled else ("",):
        for name, dtype in ((REFERENCE, torch.float32), (BF16, torch.bfloat16)):
            model = transformers.Sam2VideoModel.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa")
            if ending:
                compile_modules(model, _PARTS)
            yield name + ending, model.eval(), dtype


COLUMNS = ("objects", "contender", "p50 ms", "p90 ms", "frames/s", "vs torch fp32", "rel. error", "mask IoU")


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of the table; the ratio is above 1 where the contender is faster than PyTorch fp32."""
    return [
        (
            str(row.objects),
            row.contender,
            f"{1000 * row.seconds.p50:.1f}",
            f"{1000 * row.seconds.p90:.1f}",
            f"{1 / row.seconds.p50:.2f}",
            "n/a" if row.ratio is None else f"{row.ratio:.2f}x",
            "n/a" if row.relative_error is None else f"{row.relative_error:.1e}",
            "n/a" if row.mask_iou is None else f"{row.mask_iou:.4f}",
        )
        for row in rows
    ]


def to_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON-ready values, times in seconds."""
    return [asdict(row) for row in rows]
