"""A photo and a clip that are not square, with what is on them: crops of the packaged demo's."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

ASSETS = Path(__file__).resolve().parents[2] / "engine" / "assets" / "demo"
HEIGHT = 397
CLIP_HEIGHT = 201


@dataclass(frozen=True)
class Photo:
    """An encoded picture and one object on it: click (x, y), box (xyxy), true mask (H, W) bool, words."""

    png: bytes
    click: list[int]
    box: list[int]
    truth: Any
    words: str

    @property
    def uri(self) -> str:
        return data_uri(self.png)


@dataclass(frozen=True)
class Clip:
    """Encoded frames and one object: click (x, y) on the first, true masks (T, H, W) bool."""

    frames: list[bytes]
    click: list[int]
    truth: Any

    @property
    def uris(self) -> list[str]:
        return [data_uri(frame) for frame in self.frames]


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def read_photo() -> Photo:
    """The first object of a demo picture that lies within the crop."""
    content = json.loads((ASSETS / "demo.json").read_text())
    picture = content["pictures"][0]
    found = next(o for o in picture["objects"] if o["box"][3] < HEIGHT - 20)
    image = cv2.imread(str(ASSETS / picture["file"]))[:HEIGHT]
    return Photo(_png(image), found["click"], found["box"], _mask(found["truth"])[:HEIGHT], found["name"])


def read_clip(count: int = 6) -> Clip:
    """The first frames of the demo's clip and its first object that is clicked within the crop."""
    content = json.loads((ASSETS / "clip.json").read_text())
    found = next(o for o in content["objects"] if o["click"][1] < CLIP_HEIGHT - 20)
    video = cv2.VideoCapture(str(ASSETS / content["file"]))
    frames = [_png(video.read()[1][:CLIP_HEIGHT]) for _ in range(count)]
    truth = [_mask({"size": content["size"], "counts": counts})[:CLIP_HEIGHT] for counts in found["truth"][:count]]
    return Clip(frames, found["click"], np.stack(truth))


def _png(image: Any) -> bytes:
    return bytes(cv2.imencode(".png", image)[1].tobytes())


def _mask(rle: Any) -> Any:
    from pycocotools import mask

    return mask.decode({"size": rle["size"], "counts": rle["counts"].encode()}).astype(bool)


def iou(rle: Any, truth: Any) -> float:
    """Of run lengths (a dict, or an object with `size` and `counts`) and a mask of the same size."""
    found = rle if isinstance(rle, dict) else {"size": list(rle.size), "counts": rle.counts}
    counts = found["counts"]
    mask = _mask({"size": found["size"], "counts": counts if isinstance(counts, str) else counts.decode()})
    assert mask.shape == truth.shape
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0
