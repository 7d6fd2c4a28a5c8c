"""The clip of `pixano-edge demo`: every object followed from one click, with frames per second and IoU."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..models.masks import mask_iou
from ..models.rle import decode_rle
from ..models.sam2.prompts import Prompt
from .draw import overlay, write_png
from .output import make_folder
from .track_files import OverlayWriter

if TYPE_CHECKING:
    from ..models.sam2_video.model import Sam2VideoModel

Image = npt.NDArray[np.uint8]
STRIP = 6  # frames in the strip


@dataclass(frozen=True)
class ClipObject:
    """One object of the clip: words, click (x, y) on the first frame, true masks (T, H, W) bool."""

    name: str
    click: tuple[float, float]
    truth: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ClipResult:
    """The clip tracked: frames per second from the second frame on, encoder included; mean IoU of the first frame and
    of the others, where an object that is hidden has IoU 1 without a mask and 0 with one; what was written."""

    clip: str
    frames: int
    objects: int
    fps: float
    first_iou: float
    mean_iou: float
    files: list[str]
    note: str


def read_clip(folder: Path) -> tuple[Path, int, list[ClipObject]] | None:
    """Video, frames per second and objects as ``pixano_edge.export.demo.demo_clip`` wrote them; None without them."""
    if not (folder / "clip.json").is_file():
        return None
    content: dict[str, Any] = json.loads((folder / "clip.json").read_text(encoding="utf-8"))
    objects = []
    for entry in content["objects"]:
        masks = [decode_rle({"size": content["size"], "counts": c.encode("ascii")}) for c in entry["truth"]]
        objects.append(ClipObject(entry["name"], tuple(entry["click"]), np.stack(masks)))
    return folder / content["file"], int(content["fps"]), objects


def run_clip(model: Sam2VideoModel, clip: Path, fps: int, objects: list[ClipObject], out: Path) -> ClipResult:
    """Clicks on every object of the first frame and tracks to the end; writes a video and a strip of frames.

    Raises:
        EdgeError: The video does not decode here, or a file cannot be written.
    """
    folder = out / clip.stem
    make_folder(folder)
    prompts = [Prompt(points=[o.click], labels=[1]) for o in objects]
    ious: list[list[float]] = []
    seconds: list[float] = []
    strip: list[Image] = []
    with model.track(clip, history=False) as tracker, OverlayWriter(folder, "video", fps) as writer:
        for number, prompt in enumerate(prompts):
            tracker.add_prompt(number, 0, prompt)
        count = len(tracker.frames)
        shown = {round(i * (count - 1) / (STRIP - 1)) for i in range(STRIP)}
        results = tracker.propagate(0, count - 1)
        while True:
            start = time.perf_counter()
            result = next(results, None)
            if result is None:
                break
            if result.frame:
                seconds.append(time.perf_counter() - start)
            masks = [one.mask for one in result.objects]
            ious.append([mask_iou(mask, o.truth[result.frame]) for mask, o in zip(masks, objects)])
            picture = overlay(tracker.frames[result.frame], masks, [] if result.frame else prompts)
            writer.add(result.frame, picture)
            if result.frame in shown:
                strip.append(picture)
        name, note = writer.name, writer.note
    write_png(out / f"{clip.stem}.strip.png", np.concatenate(strip, axis=1))
    return ClipResult(
        clip.name,
        count,
        len(objects),
        len(seconds) / sum(seconds) if seconds else 0.0,
        statistics.fmean(ious[0]),
        statistics.fmean(value for frame in ious[1:] for value in frame),
        [f"{clip.stem}/{name}", f"{clip.stem}.strip.png"],
        note,
    )
