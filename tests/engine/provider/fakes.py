"""A predictor, an opener and a store without graphs: the provider's own behaviour in milliseconds."""

from __future__ import annotations

import base64
import io
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixano_edge.engine.bundle import MANIFEST_NAME, BundleStore, parse_manifest
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.errors import PromptError
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.provider import EdgeProvider
from pixano_edge.engine.provider.families import LoadedModel, check_task
from pixano_edge.engine.provider.settings import LoadOptions
from pixano_edge.engine.provider.worker import Job

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


class FakeOpener:
    """Opens the bundles made by `add_bundle`. `gate` holds loads back."""

    def __init__(self, device: str = "cpu") -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.opened: list[FakePredictor] = []
        self.device = device
        self.error: Exception | None = None

    def __call__(self, path: Path, task: str, options: LoadOptions, job: Job) -> LoadedModel:
        self.entered.set()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        manifest = parse_manifest((path / MANIFEST_NAME).read_bytes())
        family = check_task(manifest.family, task, manifest.name)
        predictor = FakePredictor()
        self.opened.append(predictor)
        return LoadedModel(
            predictor,
            family.task,
            family.model_class,
            manifest.source.checkpoint,
            self.device,
            options,
            warnings=("fp16 was asked for, fp32 runs",) if options.precision == "fp16" else (),
        )


def add_bundle(root: Path, name: str, family: str = "sam2", weights: int = 0) -> Path:
    """A folder whose manifest is valid and whose graphs do not exist. It says that they have `weights` bytes."""
    from datetime import datetime, timezone

    from pixano_edge.engine.bundle import Manifest

    manifest = Manifest(
        schema_version=1,
        name=name,
        family=family,
        created=datetime(2026, 1, 1, tzinfo=timezone.utc),
        source={"checkpoint": f"test/{name}", "format": "transformers", "sha256": "0" * 64, "architecture": "tiny"},
        licence={"spdx": "Apache-2.0"},
        tools={},
        constants=CONSTANTS.to_dict(),
        preprocess={"image_size": 128, "mean": CONSTANTS.mean, "std": CONSTANTS.std},
        postprocess={},
        graphs=_graphs() if weights else {},
        parity=None,
        golden=[],
        files={f"{g}.onnx": {"sha256": "0" * 64, "size": weights // 2} for g in _graphs()} if weights else {},
    )
    folder = root / name
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(), encoding="utf-8")
    return folder


def _graphs() -> dict[str, Any]:
    variant = {"precision": "fp32", "opset": 18, "nodes": 1, "parameters": 1}
    return {g: {"variants": {"fp32": {"file": f"{g}.onnx", **variant}}} for g in ("image_encoder", "mask_decoder")}


class FolderStore(BundleStore):
    """The local store without the demo bundle of the package."""

    def list(self) -> list[str]:
        return [name for name in super().list() if name != "sam2-demo"]


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
