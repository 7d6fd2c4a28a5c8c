"""`pixano-edge track`: objects followed through a video, as overlay, run-length masks, COCO and YouTube-VIS JSON."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cv2
import numpy as np
import typer

from ..errors import PromptError
from ..models.rle import decode_rle
from ..models.sam2_video.frames import Frames, Image, open_frames
from .draw import overlay
from .options import BackendOption, DeviceOption, ForceOption, PrecisionOption, ThreadsOption, open_bundle
from .output import JsonOption, make_folder, note, print_json, print_table, progress
from .track_files import COCO_NAME, MASKS_NAME, VIS_NAME, MaskLog, OverlayWriter, frame_record, remove_earlier
from .track_prompts import BOX_HELP, MASK_HELP, POINT_HELP, ObjectPrompt, parse_track_prompts, read_mask

if TYPE_CHECKING:
    from ..models.sam2_video.tracker import FrameResult, VideoTracker

app = typer.Typer(rich_markup_mode="markdown")

OVERLAYS = ("video", "jpg", "png", "none")
DEFAULT_FPS = 25.0


@dataclass(frozen=True)
class Span:
    """Frames to track, both ends included.

    Attributes:
        passes: (first, last) of each pass; backwards where last is smaller.
    """

    passes: list[tuple[int, int]]

    @property
    def frames(self) -> int:
        return sum(abs(last - first) + 1 for first, last in self.passes)

    @property
    def in_order(self) -> bool:
        """Whether frames come in the order of the clip."""
        return all(last >= first for first, last in self.passes)


def plan_passes(prompts: Sequence[ObjectPrompt], length: int, start: int, end: int | None, direction: str) -> Span:
    """Which frames are tracked in which order.

    Args:
        prompts: At least one.
        length: Frames of the clip.
        start: Frames before it are left out.
        end: Frames after it are left out; None for the last one.
        direction: ``forward`` from the first prompt on, ``backward`` from the last one, ``both`` from the first one.

    Raises:
        typer.BadParameter: `start`, `end` or a prompt lies outside the clip, or a prompt outside the range.
    """
    last = length - 1 if end is None else end
    if not 0 <= start <= last < length:
        raise typer.BadParameter(
            f"--start {start} and --end {last} are no range of the clip's {length} frames (0 to {length - 1})."
        )
    frames = sorted({p.frame for p in prompts})
    outside = [f for f in frames if not start <= f <= last]
    if outside:
        where = f"--start and --end leave frames {start} to {last}"
        if outside[-1] >= length:
            where = f"the clip has {length} frames"
        raise typer.BadParameter(f"There is a prompt on frame {outside[-1]}, but {where}.")
    passes = []
    if direction != "backward":
        passes.append((frames[0], last))
        if direction == "both" and frames[0] > start:
            passes.append((frames[0] - 1, start))
    else:
        passes.append((frames[-1], start))
    return Span(passes)


@dataclass
class TrackSummary:
    """What was found of one object."""

    id: int
    frames: int = 0
    first: int | None = None
    last: int | None = None
    mean_iou_estimate: float = 0.0

    def add(self, record: dict[str, Any], frame: int) -> None:
        if record["area"]:
            self.mean_iou_estimate += (record["iou"] - self.mean_iou_estimate) / (self.frames + 1)
            self.frames += 1
            self.first = frame if self.first is None else min(self.first, frame)
            self.last = frame if self.last is None else max(self.last, frame)


@dataclass
class Followed:
    """How far tracking came.

    Attributes:
        objects: By number.
        seconds: Of tracking, without drawing and writing.
    """

    objects: dict[int, TrackSummary] = field(default_factory=dict)
    frames: int = 0
    seconds: float = 0.0

    @property
    def fps(self) -> float:
        return self.frames / self.seconds if self.seconds else 0.0


class LastFrame(Frames):
    """A clip whose last frame stays decoded: tracking and drawing use each frame one after the other."""

    def __init__(self, frames: Frames) -> None:
        self.size = frames.size
        self.fps = getattr(frames, "fps", DEFAULT_FPS)
        self._frames = frames
        self._last: tuple[int, Image] | None = None

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> Image:
        if self._last is None or self._last[0] != index:
            self._last = (index, self._frames[index])
        return self._last[1]

    def _read(self, index: int) -> Image:
        return self._frames[index]

    def name(self, index: int) -> str:
        return self._frames.name(index)

    def close(self) -> None:
        self._frames.close()


class Painter:
    """Draws the masks, marks and numbers of one frame."""

    def __init__(self, prompts: Sequence[ObjectPrompt]) -> None:
        self._marks: dict[int, list[ObjectPrompt]] = {}
        for prompt in prompts:
            self._marks.setdefault(prompt.frame, []).append(prompt)
        self._order = sorted({p.object_id for p in prompts})

    def paint(self, frame: int, image: Image, masks: dict[int, Any]) -> Image:
        """The picture for a frame; `masks` are (H, W) bool by object."""
        blank = np.zeros(image.shape[:2], np.bool_)
        shown = [masks.get(i, blank) for i in self._order]
        marks = [p.marks.to_prompt() for p in self._marks.get(frame, []) if p.mask is None]
        picture = overlay(image, shown, marks)
        if len(self._order) > 1:
            for object_id, mask in zip(self._order, shown):
                _label(picture, mask, str(object_id))
        return picture


def _label(picture: Image, mask: Any, text: str) -> None:
    """An object's number in the middle of its mask: white with a dark border, to be read on any colour."""
    rows, columns = np.nonzero(mask)
    if not rows.size:
        return
    scale = max(0.5, max(picture.shape[:2]) / 1000)
    font, thick, border = cv2.FONT_HERSHEY_SIMPLEX, max(1, round(2 * scale)), max(1, round(2 * scale))
    (width, height), _ = cv2.getTextSize(text, font, scale, thick)
    x, y = int(columns.mean()) - width // 2, int(rows.mean()) + height // 2
    # Not by a thicker pen below: how wide a pen draws differs between versions of OpenCV.
    for dx, dy in itertools.product((-border, 0, border), repeat=2):
        cv2.putText(picture, text, (x + dx, y + dy), font, scale, (0, 0, 0), thick, cv2.LINE_AA)
    cv2.putText(picture, text, (x, y), font, scale, (255, 255, 255), thick, cv2.LINE_AA)


def add_prompt(tracker: VideoTracker, prompt: ObjectPrompt) -> None:
    """Gives a prompt to a tracker; a PromptError names the object and the frame."""
    try:
        if prompt.mask is not None:
            tracker.add_mask(prompt.object_id, prompt.frame, read_mask(prompt.mask, tracker.frames.size))
        else:
            tracker.add_prompt(prompt.object_id, prompt.frame, prompt.marks.to_prompt())
    except PromptError as error:
        where = f"Object {prompt.object_id}, frame {prompt.frame}"
        raise PromptError(f"{where}: {error.message}", error.action) from error


def _results(tracker: VideoTracker, span: Span) -> Iterator[FrameResult]:
    for first, last in span.passes:
        yield from tracker.propagate(first, last)


def _draw_from_log(log: MaskLog, frames: Frames, painter: Painter, target: OverlayWriter, as_json: bool) -> None:
    """The overlay of a clip that was not tracked in its order."""
    with progress("Drawing", len(log.frames), enabled=not as_json) as bar:
        for record in log.records():
            masks = {
                one["id"]: decode_rle({**one["segmentation"], "counts": one["segmentation"]["counts"].encode("ascii")})
                for one in record["objects"]
            }
            target.add(record["frame"], painter.paint(record["frame"], frames[record["frame"]], masks))
            bar.step()


def _open_clip(sources: Sequence[Path], out: Path) -> tuple[LastFrame, str]:
    """The clip and its name.

    Raises:
        typer.BadParameter: A file is not there, or the results would go beside the frames.
        ImageError: Nothing in it decodes.
    """
    for source in sources:
        if not source.exists():
            raise typer.BadParameter(f"There is no file or folder '{source}'.")
    first = sources[0]
    if len(sources) > 1 and any(s.is_dir() for s in sources):
        raise typer.BadParameter("Give one video, one folder of pictures, or several pictures.")
    if out.resolve() in {(first if first.is_dir() else s.parent).resolve() for s in sources}:
        raise typer.BadParameter(f"-o must not be the folder of the clip ('{out}').")
    return LastFrame(open_frames(first if len(sources) == 1 else list(sources))), first.name


def _follow(
    tracker: VideoTracker,
    span: Span,
    log: MaskLog,
    painter: Painter,
    pictures: OverlayWriter | None,
    as_json: bool,
) -> Followed:
    """Tracks, and writes each frame as it comes; after Ctrl-C says what there is."""
    done = Followed()
    try:
        with progress("Tracking", span.frames, enabled=not as_json) as bar:
            results = _results(tracker, span)
            while True:
                begin = time.perf_counter()
                result = next(results, None)
                if result is None:
                    return done
                done.seconds += time.perf_counter() - begin
                done.frames += 1
                record = frame_record(result, tracker.frames.name(result.frame))
                log.add(record)
                for one in record["objects"]:
                    done.objects.setdefault(one["id"], TrackSummary(one["id"])).add(one, result.frame)
                if pictures is not None:
                    masks = {o.object_id: o.mask for o in result.objects}
                    pictures.add(result.frame, painter.paint(result.frame, tracker.frames[result.frame], masks))
                bar.label(f"Tracking, {done.fps:.1f} frames/s")
                bar.step()
    except KeyboardInterrupt:
        note(f"Stopped after {done.frames} of {span.frames} frames; their masks are written.")
        raise


@app.command()
def track(
    source: Annotated[
        list[Path], typer.Argument(metavar="VIDEO|FOLDER|PICTURES", help="A video, a folder of pictures, or pictures.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results; made when it is not there.")],
    bundle: Annotated[str, typer.Option(help="Bundle folder, or a name in the local store.")] = "sam2-demo",
    point: Annotated[list[str] | None, typer.Option(metavar="[ID=]FRAME:X,Y[,LABEL]", help=POINT_HELP)] = None,
    box: Annotated[list[str] | None, typer.Option(metavar="[ID=]FRAME:X0,Y0,X1,Y1", help=BOX_HELP)] = None,
    mask: Annotated[list[str] | None, typer.Option(metavar="[ID=]FRAME:FILE", help=MASK_HELP)] = None,
    backward: Annotated[bool, typer.Option("--backward", help="From the last prompt back to --start.")] = False,
    both: Annotated[
        bool, typer.Option("--both", help="From the first prompt to --end, then from it back to --start.")
    ] = False,
    start: Annotated[int, typer.Option(min=0, help="Leave out frames before this one.")] = 0,
    end: Annotated[int | None, typer.Option(min=0, help="Leave out frames after this one; default: the last.")] = None,
    max_cond_frames: Annotated[
        int | None,
        typer.Option(help="Most frames with prompts that a frame looks back to, the closest; -1: all.", min=-1),
    ] = None,
    overlay_kind: Annotated[
        str, typer.Option("--overlay", metavar="video|jpg|png|none", help="The overlay: an MP4 file, or pictures.")
    ] = "video",
    fps: Annotated[
        float | None, typer.Option(min=0.1, max=1000, help="Of the overlay video; default: the clip's, or 25.")
    ] = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Track objects through a video.

    Mark each object on any frame, by points, a box or a mask. Coordinates are pixels of the frames, x to the right, y
    down; frames and `--start`, `--end` count from 0, both ends included. Several objects, and more prompts for one on
    other frames:

    `pixano-edge track clip.mp4 --point 0:320,210 --point 2=0:80,90 --point 2=0:95,60,0 --box 3=12:40,60,300,280 -o out`

    Writes `masks.jsonl` (one line for each frame as it is tracked, with run-length masks), `coco-video.json`,
    `youtube-vis.json`, and the overlay. Ctrl-C keeps what was done. A frame that cannot be read ends the command with
    its number; the frames before it are kept.
    """
    prompts = parse_track_prompts(point or [], box or [], mask or [])
    if not prompts:
        raise typer.BadParameter("Say what to track: --point frame:x,y, --box frame:x0,y0,x1,y1 or --mask frame:file.")
    if overlay_kind not in OVERLAYS:
        raise typer.BadParameter(f"--overlay takes {', '.join(OVERLAYS)}, got '{overlay_kind}'.")
    if backward and both:
        raise typer.BadParameter("--backward and --both exclude each other.")
    clip, name = _open_clip(source, out)
    span = plan_passes(prompts, len(clip), start, end, "both" if both else "backward" if backward else "forward")
    for one in prompts:
        if one.mask is not None:  # before the model is loaded, which takes longer
            read_mask(one.mask, clip.size)
    opened = open_bundle(bundle)

    from ..models.sam2_video.model import Sam2VideoModel

    model = Sam2VideoModel.open(opened, device, backend, precision, threads=threads, force=force)
    make_folder(out)
    remove_earlier(out)
    painter = Painter(prompts)
    # Only tracking both ways comes back to frames that are far from where it was last.
    options: dict[str, Any] = {"history": both, "max_cond_frames": max_cond_frames}
    with model, model.track(clip, **options) as tracker, MaskLog(out) as log:
        with OverlayWriter(out, overlay_kind, fps or clip.fps) as pictures:
            for one in prompts:
                add_prompt(tracker, one)
            inline = overlay_kind != "none" and span.in_order
            try:
                done = _follow(tracker, span, log, painter, pictures if inline else None, as_json)
            finally:
                log.finish(name, len(clip), clip.size, f"pixano-edge track, {opened.manifest.name}")
            if overlay_kind != "none" and not inline:
                _draw_from_log(log, clip, painter, pictures, as_json)
        info = model.info()
    warnings = [*info["warnings"], *([pictures.note] if pictures.note else [])]
    for warning in warnings:
        note(f"Warning: {warning}")
    files = [MASKS_NAME, COCO_NAME, VIS_NAME, *([pictures.name] if pictures.name else [])]
    if as_json:
        print_json(
            {
                "bundle": opened.manifest.name,
                "engine": info,
                "out": str(out),
                "files": files,
                "clip": {"name": name, "frames": len(clip), "height": clip.size[0], "width": clip.size[1]},
                "prompts": [p.to_dict() for p in prompts],
                "passes": span.passes,
                "tracked_frames": done.frames,
                "seconds": done.seconds,
                "fps": done.fps,
                "objects": list(done.objects.values()),
            }
        )
        return
    columns = ("object", "frames", "first", "last", "IoU estimate")
    rows = [
        (o.id, o.frames, "-" if o.first is None else o.first, "-" if o.last is None else o.last,
         f"{o.mean_iou_estimate:.3f}")
        for o in done.objects.values()
    ]  # fmt: skip
    print_table(columns, rows, right=columns)
    typer.echo(f"\n{done.frames} frames at {done.fps:.1f} frames/s. Written to {out}: {', '.join(files)}")
