"""What `pixano-edge track` writes: masks frame by frame, COCO and YouTube-VIS files of the whole, and the overlay.

``masks.jsonl`` grows by one line for each frame as it is tracked; the other two files are made from it at the end, one
frame in memory at a time, so that the length of a clip does not matter and what was tracked before a failure or Ctrl-C
is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from ..errors import EdgeError
from ..models.rle import encode_rle
from .coco import CATEGORY, mask_bbox
from .output import make_folder, replacing

if TYPE_CHECKING:
    from ..models.sam2_video.tracker import FrameResult

Image = npt.NDArray[np.uint8]

MASKS_NAME, COCO_NAME, VIS_NAME, VIDEO_NAME, PICTURES_NAME = (
    "masks.jsonl", "coco-video.json", "youtube-vis.json", "overlay.mp4", "overlay",
)  # fmt: skip


def frame_record(result: FrameResult, name: str) -> dict[str, Any]:
    """One line of ``masks.jsonl``: every object with its run-length mask; an absent object has an empty one."""
    objects = []
    for one in result.objects:
        rle = encode_rle(one.mask)
        objects.append(
            {
                "id": one.object_id,
                "score": round(one.score, 4),
                "iou": round(one.iou, 4),
                "area": int(np.count_nonzero(one.mask)),
                "bbox": mask_bbox(one.mask),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
        )
    return {"frame": result.frame, "file_name": name, "objects": objects}


class MaskLog:
    """``masks.jsonl``, written line by line, and the files made of it. Use it with ``with``.

    Args:
        folder: Where to write.

    Raises:
        EdgeError: The file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / MASKS_NAME
        try:
            self._file: IO[bytes] = self._path.open("w+b")
        except OSError as error:
            raise EdgeError(f"'{self._path}' cannot be written: {error}.", "Check rights and free space.") from error
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0

    def add(self, record: dict[str, Any]) -> None:
        """Adds a frame; raises EdgeError on a full disk, frames before it are whole."""
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            self._file.seek(self._end)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise EdgeError(f"'{self._path}' cannot be written: {error}.", "Free disk space.") from error
        self._places[record["frame"]] = (self._end, len(line))
        self._end += len(line)

    @property
    def frames(self) -> list[int]:
        """Frames so far, in order of the clip."""
        return sorted(self._places)

    def records(self) -> Iterator[dict[str, Any]]:
        """What was added, in order of the clip."""
        for frame in self.frames:
            start, size = self._places[frame]
            self._file.seek(start)
            yield json.loads(self._file.read(size))

    def finish(self, clip: str, length: int, size: tuple[int, int], description: str) -> None:
        """Writes the COCO and YouTube-VIS files.

        Args:
            clip: Name of the clip.
            length: Frames of the clip.
            size: (height, width) of its frames.
            description: Of the data set.
        """
        self._file.truncate(self._end)  # an interrupted line
        height, width = size
        video = {"id": 1, "width": width, "height": height, "length": length}
        with replacing(self._folder / COCO_NAME) as partial, partial.open("w", encoding="utf-8") as target:
            self._write_coco(target, {**video, "name": clip}, description)
        with replacing(self._folder / VIS_NAME) as partial, partial.open("w", encoding="utf-8") as target:
            self._write_vis(target, video, length, description)

    def _write_coco(self, target: IO[str], video: dict[str, Any], description: str) -> None:
        """Images and annotations as of single pictures, tied together by ``video_id``, ``frame_id``, ``track_id``."""
        size = {key: video[key] for key in ("width", "height")}
        _head(target, {"info": {"description": description}, "videos": [video], "categories": [CATEGORY]})
        images = (
            {"id": r["frame"] + 1, "file_name": r["file_name"], "video_id": 1, "frame_id": r["frame"], **size}
            for r in self.records()
        )
        _list(target, "images", images)
        target.write(",\n")
        _list(target, "annotations", self._coco_annotations())
        target.write("\n}\n")

    def _coco_annotations(self) -> Iterator[dict[str, Any]]:
        number = 0
        for record in self.records():
            for one in record["objects"]:
                if one["area"]:
                    number += 1
                    ids = {"id": number, "image_id": record["frame"] + 1, "video_id": 1, "track_id": one["id"]}
                    facts = {key: one[key] for key in ("segmentation", "bbox", "area")}
                    yield {**ids, "category_id": CATEGORY["id"], **facts, "score": one["iou"], "iscrowd": 0}

    def _write_vis(self, target: IO[str], video: dict[str, Any], length: int, description: str) -> None:
        """One annotation for each object, with a mask or null for each frame of the clip."""
        names = {r["frame"]: r["file_name"] for r in self.records()}
        files = [names.get(frame, f"{frame:06d}") for frame in range(length)]
        head = {"info": {"description": description}, "videos": [{**video, "file_names": files}]}
        _head(target, {**head, "categories": [CATEGORY]})
        _list(target, "annotations", self._vis_annotations(video, length))
        target.write("\n}\n")

    def _vis_annotations(self, video: dict[str, Any], length: int) -> Iterator[dict[str, Any]]:
        ids = list(dict.fromkeys(one["id"] for record in self.records() for one in record["objects"]))
        for number, object_id in enumerate(ids, 1):
            columns: dict[str, list[Any]] = {name: [None] * length for name in ("segmentations", "bboxes", "areas")}
            ious = []
            for record in self.records():
                for one in record["objects"]:
                    if one["id"] == object_id and one["area"]:
                        for column, key in zip(columns.values(), ("segmentation", "bbox", "area")):
                            column[record["frame"]] = one[key]
                        ious.append(one["iou"])
            score = round(sum(ious) / len(ious), 4) if ious else 0.0
            size = {key: video[key] for key in ("width", "height")}
            ids_of = {"id": number, "video_id": 1, "track_id": object_id, "category_id": CATEGORY["id"], "iscrowd": 0}
            yield {**ids_of, **size, "score": score, **columns}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> MaskLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _head(target: IO[str], content: dict[str, Any]) -> None:
    """Opens an object with its short values; lists of any length follow."""
    target.write("{\n" + "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in content.items()))


def _list(target: IO[str], name: str, values: Iterator[dict[str, Any]]) -> None:
    """A named list, one value in memory at a time."""
    target.write(f"{json.dumps(name)}: [")
    for number, value in enumerate(values):
        target.write((",\n" if number else "\n") + json.dumps(value, separators=(",", ":"), allow_nan=False))
    target.write("\n]")


class OverlayWriter:
    """The overlay as a video, or as one picture for each frame. Use it with ``with``.

    Args:
        folder: Where to write.
        kind: ``video``, ``jpg`` or ``png``. Without a codec for video, pictures are written.
        fps: Frames per second of the video.

    Attributes:
        name: Of the file or folder written, empty before the first frame.
        note: What was done instead of what was asked for, or empty.
    """

    def __init__(self, folder: Path, kind: str, fps: float) -> None:
        self.name = self.note = ""
        self._folder = folder
        self._kind = kind
        self._fps = fps
        self._video: Any = None

    def add(self, frame: int, picture: Image) -> None:
        """Writes one picture, (H, W, 3) uint8 RGB; the frames of a video come in order.

        Raises:
            EdgeError: A picture cannot be written.
        """
        if not self.name:
            self._start(picture.shape[1], picture.shape[0])
        bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        if self._video is not None:
            self._video.write(bgr)
            return
        path = self._folder / PICTURES_NAME / f"{frame:06d}.{self._kind}"
        done, data = cv2.imencode(path.suffix, bgr)
        if not done:
            raise EdgeError(f"'{path.name}' cannot be encoded.", "Try another --overlay.")
        with replacing(path) as partial:
            partial.write_bytes(data.tobytes())

    def _start(self, width: int, height: int) -> None:
        if self._kind == "video":
            writer = cv2.VideoWriter(
                str(self._folder / VIDEO_NAME), cv2.VideoWriter.fourcc(*"mp4v"), self._fps, (width, height)
            )
            if writer.isOpened():
                self._video, self.name = writer, VIDEO_NAME
                return
            (self._folder / VIDEO_NAME).unlink(missing_ok=True)
            self._kind = "jpg"
            self.note = "This OpenCV cannot write MP4 files: the overlay is a folder of pictures."
        make_folder(self._folder / PICTURES_NAME)
        self.name = PICTURES_NAME

    def close(self) -> None:
        """Completes the video."""
        if self._video is not None:
            self._video.release()
            self._video = None

    def __enter__(self) -> OverlayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def remove_earlier(folder: Path) -> None:
    """Removes what an earlier run left in a folder, so that two runs are not mixed. Raises EdgeError."""
    pictures: Sequence[Path] = sorted((folder / PICTURES_NAME).glob("[0-9]*.[jp][pn]g"))
    try:
        for path in (*pictures, *(folder / name for name in (COCO_NAME, VIS_NAME, VIDEO_NAME))):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise EdgeError(f"An earlier result cannot be removed: {error}.", "Choose another folder.") from error
