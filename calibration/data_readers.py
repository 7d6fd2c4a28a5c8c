"""Finding samples: folders of pictures, videos, COCO files and Pixano datasets. What is found is checked in `data`."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pixano_edge.engine.bundle.files import os_errors
from pixano_edge.engine.errors import CalibrationError, EdgeError
from pixano_edge.engine.models.sam2_video.frames import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoFrames

from .data import Clip, Picture, Sample, Truth
from .result import SkippedFile

MAX_JSON_BYTES = 1 << 30


@dataclass
class Found:
    """Samples that were not looked at yet.

    Attributes:
        kind: ``images``, ``video``, ``coco`` or ``pixano``.
        samples: In the order of their names.
        skipped: Files that are no samples although they look like it.
        warnings: In words.
        classes: Names of the categories, the most frequent first.
    """

    kind: str
    samples: list[Sample]
    skipped: list[SkippedFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()


def find_pictures(root: Path, count: int, copies: Path | None = None) -> Found:
    """Pictures of a folder, a COCO file, a Pixano dataset or a video; of a video `count` evenly spaced frames.

    Args:
        root: One of these.
        count: Frames of one video, or of all that lie in a folder without pictures.
        copies: Folder for copies of such frames; None for the system's.

    Raises:
        CalibrationError: It is none of these.
        BundleError: The disk is full.
    """
    if root.is_dir():
        media, kind = _media(root)
        files = _files(media, IMAGE_SUFFIXES)
        found = Found(kind, [Picture(_name(path, media), path) for path in files])
        if not files and (videos := _files(media, VIDEO_SUFFIXES)):
            found.kind = "video"
            for path in videos:
                _add_frames(found, path, max(1, count // len(videos)), _name(path, media), copies)
        return found
    if root.suffix.lower() == ".json":
        return _read_coco(root)
    if root.suffix.lower() in VIDEO_SUFFIXES:
        found = Found("video", [])
        _add_frames(found, root, count, root.name, copies)
        found.warnings.append("All pictures come from one video: they look more alike than what the model will see.")
        return found
    raise CalibrationError(
        f"'{root}' is no folder, video or COCO JSON.",
        f"Videos end with {', '.join(sorted(VIDEO_SUFFIXES))}; put pictures into a folder.",
    )


def find_clips(root: Path, length: int) -> Found:
    """Clips of a video, or of a folder of videos, of folders of frames, or of frames.

    Raises:
        CalibrationError: It is none of these.
    """
    if root.is_file():
        if root.suffix.lower() not in VIDEO_SUFFIXES:
            raise CalibrationError(
                f"'{root}' is no video, and tracking is calibrated on clips.",
                "Give a video, or a folder of videos or of folders of frames.",
            )
        found = Found("video", [])
        _add_clips(found, root, root.name, length)
        return found
    media, kind = _media(root)
    found = Found("video" if kind == "images" else kind, [])
    for path in _files(media, VIDEO_SUFFIXES):
        _add_clips(found, path, _name(path, media), length)
    folders: dict[Path, list[Path]] = {}
    for path in _files(media, IMAGE_SUFFIXES):
        folders.setdefault(path.parent, []).append(path)
    for folder, files in folders.items():
        name = _name(folder, media) if folder != media else media.name
        if len(files) < 2:
            found.skipped.append(SkippedFile(name, "one frame is no clip"))
        found.samples += [Clip(_part(name, at, n), tuple(files), at, n) for at, n in _parts(len(files), length)]
    return found


def _media(root: Path) -> tuple[Path, str]:
    """Where a folder's pictures lie, and what it is: a Pixano dataset has tables in ``db`` and files in ``media``."""
    if not ((root / "info.json").is_file() and (root / "db").is_dir()):
        return root, "images"
    media = root / "media"
    if not media.is_dir():
        raise CalibrationError(
            f"The Pixano dataset '{root}' has no folder 'media': its pictures lie in its tables or elsewhere.",
            "Give the folder of its pictures to --data.",
        )
    return media, "pixano"


def _files(root: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files below a folder with one of the suffixes, sorted; hidden ones do not count."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith(".")
    )


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _parts(count: int, length: int) -> list[tuple[int, int]]:
    """(first, frames) of the clips in a row of frames: as many whole ones as there are, or one shorter one."""
    if count < 2:
        return []
    return [(start, length) for start in range(0, count - length + 1, length)] or [(0, count)]


def _part(name: str, first: int, length: int) -> str:
    return f"{name}#{first}-{first + length - 1}"


def _add_clips(found: Found, path: Path, name: str, length: int) -> None:
    try:
        frames = VideoFrames(path)
    except EdgeError as error:
        found.skipped.append(SkippedFile(name, error.message))
        return
    count = len(frames)
    frames.close()
    if count == 1:
        found.skipped.append(SkippedFile(name, "one frame is no clip"))
    found.samples += [Clip(_part(name, at, n), path, at, n) for at, n in _parts(count, length)]


def _add_frames(found: Found, path: Path, number: int, name: str, copies: Path | None) -> None:
    """Adds evenly spaced frames of a video, copied once: each would be a walk from the video's start otherwise."""
    try:
        frames = VideoFrames(path, stretch=1)
    except EdgeError as error:
        found.skipped.append(SkippedFile(name, error.message))
        return
    try:
        with os_errors(f"copying frames of '{path.name}'"):
            folder = _Copies(copies)
            for index in sorted({round(place) for place in np.linspace(0, len(frames) - 1, number)}):
                file = folder.path / f"{index:08d}.png"
                try:
                    image = cv2.cvtColor(frames[index], cv2.COLOR_RGB2BGR)
                except EdgeError as error:
                    found.skipped.append(SkippedFile(f"{name}#{index}", error.message))
                    break
                file.write_bytes(cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes())
                found.samples.append(Picture(f"{name}#{index}", file, (), path, index, folder))
    finally:
        frames.close()


class _Copies:
    """A new folder, removed when nothing refers to this object any more."""

    def __init__(self, parent: Path | None) -> None:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix="frames-", dir=parent))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _read_coco(path: Path) -> Found:
    """Pictures and objects of a COCO file; pictures lie beside it, or in ``images`` or a folder of its own name."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CalibrationError(f"'{path}' has more than {MAX_JSON_BYTES >> 20} MiB.", "Give a part of it.")
        content = json.loads(path.read_bytes())
        categories = {c["id"]: str(c["name"]) for c in content.get("categories", [])}
        truths: dict[Any, list[Truth]] = {}
        for note in content.get("annotations", []):
            x, y, w, h = (float(v) for v in note["bbox"])
            if not note.get("iscrowd") and w > 0 and h > 0:
                name = categories.get(note.get("category_id"), "object")
                truth = Truth(name, (x, y, x + w, y + h), note.get("segmentation"))
                truths.setdefault(note["image_id"], []).append(truth)
        images = [(str(i["file_name"]), i["id"]) for i in content["images"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CalibrationError(
            f"'{path}' is no COCO file of images and annotations: {type(error).__name__} {error}.",
            "Give the JSON that lists 'images' (file_name, id), 'annotations' and 'categories'.",
        ) from error
    often = Counter(truth.name for own in truths.values() for truth in own)
    names = sorted(dict.fromkeys(categories.values()), key=lambda name: -often[name])
    found = Found("coco", [], classes=tuple(names))
    roots = [path.parent, path.parent / "images", path.parent / path.stem]
    for file, number in images:
        places = [root / file for root in roots if ".." not in Path(file).parts and not Path(file).is_absolute()]
        place = next((p for p in places if p.is_file()), None)
        if place is None:
            found.skipped.append(SkippedFile(file, "listed, but not there"))
        else:
            found.samples.append(Picture(file, place, tuple(truths.get(number, ()))))
    return found
