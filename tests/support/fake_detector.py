"""A detector without graphs: answers that follow from image and classes, and a text cache that counts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pixano_edge.engine.models.detection.base import BOX_THRESHOLD, TEXT_THRESHOLD, Detections, check_request
from pixano_edge.engine.runtime.memory import MemoryUse


class FakeTextCache:
    """Keeps lists of classes; `texts` counts those that were computed."""

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self.texts = 0
        self.cleared = 0

    def get(self, classes: tuple[str, ...]) -> None:
        if classes not in self.entries:
            self.texts += 1
        self.entries[classes] = None

    def clear(self) -> None:
        self.entries.clear()
        self.cleared += 1

    def stats(self) -> int:
        return len(self.entries)


def answer(width: int, height: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and scores of `count` classes on an image: one box each, side by side, scores from 0.9 down by 0.1."""
    edges = np.linspace(0, width, count + 1, dtype=np.float32)
    y1, y2 = np.full(count, 0.25 * height, np.float32), np.full(count, 0.75 * height, np.float32)
    scores = 0.9 - 0.1 * np.arange(count, dtype=np.float32)
    return np.stack([edges[:-1], y1, edges[1:], y2], axis=1), scores


@dataclass
class FakeDetector:
    """Finds each class once, see `answer`, but those that start with "no ". `gate` holds every call back until it is
    set; `entered` tells that one has begun; `images` and `asked` are what came."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    images: list[np.ndarray] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    likes: list[tuple[np.ndarray, Any]] = field(default_factory=list)
    closed: bool = False
    threads: set[str] = field(default_factory=set)
    text_cache: FakeTextCache = field(default_factory=FakeTextCache)
    on_detect: Callable[[], None] = lambda: None
    use: MemoryUse = field(default_factory=MemoryUse)

    def __post_init__(self) -> None:
        self.gate.set()

    def detect(
        self,
        image: np.ndarray,
        classes: Sequence[str],
        *,
        box_threshold: float = BOX_THRESHOLD,
        text_threshold: float = TEXT_THRESHOLD,
        nms: float | None = None,
        limit: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> Detections:
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(20)
        assert not self.closed, "used after close"
        if check is not None:
            check()
        self.on_detect()
        wanted = check_request(classes, box_threshold, text_threshold, nms, limit)
        self.text_cache.get(wanted)
        self.images.append(image)
        self.asked.append({"classes": wanted, "box": box_threshold, "text": text_threshold, "nms": nms, "limit": limit})
        return self._found(image, wanted, [i for i, name in enumerate(wanted) if not name.startswith("no ")], limit)

    def _found(self, image: np.ndarray, classes: tuple[str, ...], labels: list[int], limit: int | None) -> Detections:
        height, width = image.shape[:2]
        boxes, scores = answer(width, height, len(labels))
        kept = slice(None, limit)
        return Detections(boxes[kept], scores[kept], np.array(labels, np.int64)[kept], classes)

    def info(self) -> dict[str, Any]:
        return {
            "bundle": "fake", "architecture": "fake", "device": "cpu", "backend": "onnxruntime", "precision": "fp32",
            "warnings": [], "warm_up": None,
        }  # fmt: skip

    def memory(self) -> MemoryUse:
        return self.use

    def shrink(self) -> None:
        self.text_cache.clear()

    def reset(self) -> None:
        self.text_cache.clear()

    def close(self) -> None:
        self.closed = True


class FakeOneShotDetector(FakeDetector):
    """Looks for what is on an example as well: one box."""

    def detect_like(
        self,
        image: np.ndarray,
        example: np.ndarray,
        box: Any = None,
        *,
        box_threshold: float = BOX_THRESHOLD,
        nms: float | None = None,
        limit: int | None = None,
    ) -> Detections:
        self.likes.append((example, box))
        return self._found(image, ("example",), [0], limit)
