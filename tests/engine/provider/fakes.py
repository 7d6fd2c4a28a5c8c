"""A predictor, an opener and a store without graphs: the provider's own behaviour in milliseconds."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixano_edge.engine.bundle import DEMO_NAMES, MANIFEST_NAME, BundleStore, parse_manifest
from pixano_edge.engine.contracts.sam2 import VIDEO, Sam2Constants, graphs
from pixano_edge.engine.contracts.sam2_video import Sam2VideoConstants
from pixano_edge.engine.contracts.sam2_video import graphs as video_graphs
from pixano_edge.engine.errors import PromptError
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.frames import Frames
from pixano_edge.engine.provider import EdgeProvider
from pixano_edge.engine.provider.families import DETECTION, TEXT, VIDEOS, LoadedModel, check_task, tracks
from pixano_edge.engine.provider.settings import LoadOptions
from pixano_edge.engine.provider.types import InferenceTask
from pixano_edge.engine.provider.worker import Job
from tests.support.fake_detector import FakeDetector
from tests.support.fake_vlm import FakeVlm

CONSTANTS = Sam2Constants(image_size=128, hidden_dim=32)
SIDE = CONSTANTS.mask_size
SCORES = (0.2, 0.9, 0.5)


@dataclass
class FakeEmbedding:
    image_embed: np.ndarray
    high_res: tuple[np.ndarray, np.ndarray]
    original_size: tuple[int, int]


@dataclass
class FakePrediction:
    masks: np.ndarray
    scores: np.ndarray
    low_res_logits: np.ndarray | None


@dataclass
class FakePredictor:
    """Answers each prompt with a mask that shows it: its box, or the pixel of its first point, or a shared mask input.

    `gate` holds every prediction back until it is set; `entered` tells that one has begun.
    """

    constants: Sam2Constants = CONSTANTS
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    encoded: int = 0
    predicted: list[list[Prompt]] = field(default_factory=list)
    closed: bool = False
    threads: set[str] = field(default_factory=set)
    on_predict: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.gate.set()

    def encode(self, image: np.ndarray) -> FakeEmbedding:
        assert not self.closed
        self.encoded += 1
        mean = float(image.mean())
        embed = np.full((1, 32, 8, 8), mean, np.float32)
        return FakeEmbedding(
            embed, (np.full((1, 4, 32, 32), 1, np.float32), np.full((1, 8, 16, 16), 2, np.float32)), image.shape[:2]
        )

    def recall(self, digest: bytes, size: tuple[int, int]) -> None:
        return None  # has no cache

    def embedding_from_arrays(self, image_embed: Any, high_res: Any, original_size: Any) -> FakeEmbedding:
        if image_embed.shape != (32, 8, 8) or [h.shape for h in high_res] != [(4, 32, 32), (8, 16, 16)]:
            raise PromptError("wrong embedding shape", "send it as received")
        return FakeEmbedding(image_embed[None], tuple(h[None] for h in high_res), original_size)

    def predict(
        self, source: FakeEmbedding, prompts: list[Prompt], *, multimask: bool = True, return_logits: bool = False
    ) -> FakePrediction:
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(20)
        assert not self.closed, "used after close"
        self.on_predict()
        self.predicted.append(prompts)
        height, width = source.original_size
        count = 3 if multimask else 1
        masks = np.zeros((len(prompts), count, height, width), np.bool_)
        logits = np.zeros((len(prompts), count, SIDE, SIDE), np.float32)
        for p, prompt in enumerate(prompts):
            if prompt.box is not None:
                x1, y1, x2, y2 = (int(v) for v in np.asarray(prompt.box))
                masks[p, :, y1:y2, x1:x2] = True
            elif prompt.points is not None and len(np.asarray(prompt.points)):
                x, y = (int(v) for v in np.asarray(prompt.points)[0])
                masks[p, :, y, x] = True
            logits[p] = np.arange(count)[:, None, None] + 10 * p + float(source.image_embed.flat[0])
        scores = np.tile(np.array(SCORES[:count], np.float32), (len(prompts), 1))
        return FakePrediction(masks, scores, logits if return_logits else None)

    def info(self) -> dict[str, Any]:
        return {"device": "cpu"}

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeFound:
    object_id: int
    mask: np.ndarray
    score: float = 5.0
    iou: float = 1.0


@dataclass
class FakeFrame:
    frame: int
    objects: list[FakeFound]


class FakeTracker:
    """Answers each prompt with its box, first point or mask, and moves that one pixel to the right with each frame that
    it is away from the prompt; beyond the right border the object is absent. Reads every frame it answers."""

    def __init__(self, model: FakeVideoModel, frames: Frames) -> None:
        self.model = model
        self.frames = frames
        self.prompts: dict[int, dict[int, np.ndarray]] = {}
        self.closed = False
        self.maps = 0

    def _mark(self, object_id: int, frame: int, mask: np.ndarray) -> FakeFound:
        self.model.step(self, ("prompt", object_id, frame))
        self.frames[frame]
        self.prompts.setdefault(object_id, {})[frame] = mask
        self.maps += 1
        return FakeFound(object_id, mask)

    def add_prompt(self, object_id: int, frame: int, prompt: Prompt) -> FakeFound:
        self.model.given.append((object_id, frame, prompt))
        mask = np.zeros(self.frames.size, np.bool_)
        if prompt.box is not None:
            x1, y1, x2, y2 = (int(v) for v in np.asarray(prompt.box))
            mask[y1:y2, x1:x2] = True
        if prompt.points is not None:
            x, y = (int(v) for v in np.asarray(prompt.points)[0])
            mask[y, x] = True
        return self._mark(object_id, frame, mask)

    def add_mask(self, object_id: int, frame: int, mask: np.ndarray) -> FakeFound:
        assert mask.shape == self.frames.size
        assert mask.dtype == np.bool_
        return self._mark(object_id, frame, mask)

    def propagate(self, start: int | None = None, end: int | None = None) -> Iterator[FakeFrame]:
        assert start is not None
        assert end is not None
        step = -1 if end < start else 1
        for frame in range(start, end + step, step):
            assert not self.closed, "used after close"
            self.model.step(self, ("frame", frame))
            self.frames[frame]
            yield FakeFrame(frame, [self._moved(i, frame) for i in self.prompts])

    def _moved(self, object_id: int, frame: int) -> FakeFound:
        given = self.prompts[object_id]
        nearest = min(given, key=lambda f: abs(f - frame))
        shift = abs(frame - nearest)
        mask = np.zeros_like(given[nearest])
        if shift < mask.shape[1]:
            mask[:, shift:] = given[nearest][:, : mask.shape[1] - shift]
        return FakeFound(object_id, mask, 5.0 if mask.any() else -5.0)

    def close(self) -> None:
        assert not self.model.predictor.closed, "the model was freed before its tracker"
        self.closed = True


class FakeVideoModel:
    """Makes `FakeTracker`s. `gate` holds every step back until it is set, or `hold_at` alone, which `reached` tells;
    `entered` tells that a step has begun.

    `error` is raised instead of frame `error_at`. `turns` tells the number of the tracker of each of `steps`.
    """

    def __init__(self, predictor: FakePredictor) -> None:
        self.predictor = predictor
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.steps: list[tuple[Any, ...]] = []
        self.turns: list[int] = []
        self.given: list[tuple[int, int, Prompt]] = []
        self.trackers: list[FakeTracker] = []
        self.threads: set[str] = set()
        self.seconds = 0.0
        self.hold_at: tuple[Any, ...] | None = None
        self.reached = threading.Event()
        self.error: Exception | None = None
        self.error_at = 0

    def track(self, source: Any, *, history: bool = True) -> FakeTracker:
        assert isinstance(source, Frames)
        tracker = FakeTracker(self, source)
        self.trackers.append(tracker)
        return tracker

    def step(self, tracker: FakeTracker, what: tuple[Any, ...]) -> None:
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        if self.hold_at in (None, what):
            self.reached.set()
            assert self.gate.wait(20)
        if self.seconds:
            time.sleep(self.seconds)
        if self.error is not None and what == ("frame", self.error_at):
            raise self.error
        self.steps.append(what)
        self.turns.append(self.trackers.index(tracker))

    def close(self) -> None:
        self.predictor.close()


class FakeOpener:
    """Opens the bundles made by `add_bundle`. `gate` holds loads back; `error` is raised, for `error_task` alone where
    that is set."""

    def __init__(self, device: str = "cpu") -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.opened: list[FakePredictor] = []
        self.videos: list[FakeVideoModel] = []
        self.detectors: list[FakeDetector] = []
        self.vlms: list[FakeVlm] = []
        self.tasks: list[str] = []
        self.device = device
        self.error: Exception | None = None
        self.error_task: str | None = None

    def __call__(self, path: Path, task: str, options: LoadOptions, job: Job) -> LoadedModel:
        self.entered.set()
        assert self.gate.wait(20)
        if self.error is not None and self.error_task in (None, task):
            raise self.error
        manifest = parse_manifest((path / MANIFEST_NAME).read_bytes())
        tracking = tracks(manifest.family, manifest.constants)
        kind = check_task(manifest.family, task, manifest.name, tracking)
        self.tasks.append(task)
        if task == DETECTION:
            detector = FakeDetector()
            self.detectors.append(detector)
            return LoadedModel(
                None, InferenceTask(task), kind, manifest.source.checkpoint, self.device, options,
                use=detector.memory, shrink=detector.shrink, detector=detector,
            )  # fmt: skip
        if task == TEXT:
            vlm = FakeVlm()
            self.vlms.append(vlm)
            return LoadedModel(
                None, InferenceTask(task), kind, manifest.source.checkpoint, self.device, options,
                use=vlm.memory, shrink=vlm.shrink, vlm=vlm,
            )  # fmt: skip
        predictor = FakePredictor()
        self.opened.append(predictor)
        video = FakeVideoModel(predictor) if task == VIDEOS else None
        if video is not None:
            self.videos.append(video)
        return LoadedModel(
            predictor,
            InferenceTask(task),
            kind,
            manifest.source.checkpoint,
            self.device,
            options,
            warnings=("fp16 was asked for, fp32 runs",) if options.precision == "fp16" else (),
            video=video,
            tracks=tracking,
        )


VIDEO_CONSTANTS = Sam2VideoConstants(
    memory_dim=16, num_memories=7, max_pointers=16, max_cond_frames=-1, multimask_min_points=0,
    multimask_max_points=1, multimask_in_sam=True, multimask_for_tracking=True, mask_kernel=(0.0,) * 17,
)  # fmt: skip


def add_bundle(root: Path, name: str, family: str = "sam2", weights: int = 0, tracks: bool = False) -> Path:
    """A folder whose manifest is valid and whose graphs do not exist. It says that they have `weights` bytes together,
    and with `tracks` that it has those of tracking, too."""
    from datetime import datetime, timezone

    from pixano_edge.engine.bundle import Manifest

    names = [*graphs(CONSTANTS), *(video_graphs(CONSTANTS, VIDEO_CONSTANTS) if tracks else ())]
    manifest = Manifest(
        schema_version=1,
        name=name,
        family=family,
        created=datetime(2026, 1, 1, tzinfo=timezone.utc),
        source={"checkpoint": f"test/{name}", "format": "transformers", "sha256": "0" * 64, "architecture": "tiny"},
        licence={"spdx": "Apache-2.0"},
        tools={},
        constants=CONSTANTS.to_dict() | ({VIDEO: VIDEO_CONSTANTS.to_dict()} if tracks else {}),
        preprocess={"image_size": 128, "mean": CONSTANTS.mean, "std": CONSTANTS.std},
        postprocess={},
        graphs=_graphs(names) if weights else {},
        parity=None,
        golden=[],
        files={f"{g}.onnx": {"sha256": "0" * 64, "size": weights // len(names)} for g in names} if weights else {},
    )
    folder = root / name
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(), encoding="utf-8")
    return folder


def _graphs(names: list[str]) -> dict[str, Any]:
    variant = {"precision": "fp32", "opset": 18, "nodes": 1, "parameters": 1}
    return {g: {"variants": {"fp32": {"file": f"{g}.onnx", **variant}}} for g in names}


class FolderStore(BundleStore):
    """The local store without the demo bundles of the package."""

    def list(self) -> list[str]:
        return [name for name in super().list() if name not in DEMO_NAMES]


def make_provider(root: Path, opener: FakeOpener, **settings: Any) -> EdgeProvider:
    return EdgeProvider(store=FolderStore(root), opener=opener, **settings)


def png(width: int = 40, height: int = 30, color: Any = (10, 20, 30), mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), color).save(buffer, kind)
    return buffer.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def until(condition: Any, seconds: float = 10.0) -> None:
    """Waits for another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)
