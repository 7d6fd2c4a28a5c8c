"""`pixano-edge demo`: the bundled models on the bundled pictures and clip, with times and what was right; no torch."""

from __future__ import annotations

import importlib.resources
import json
import statistics
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from ..contracts import sam2_video
from ..errors import EdgeError, MissingDependencyError
from ..models.images import decode_image
from ..models.masks import mask_iou
from ..models.rle import decode_rle
from .demo_clip import ClipResult, read_clip, run_clip
from .demo_talk import TalkResult, read_questions, run_questions
from .demo_words import ABSENT, run_words
from .detect import usual_thresholds
from .draw import overlay, write_png
from .options import BackendOption, DeviceOption, PrecisionOption, ThreadsOption, open_bundle
from .output import JsonOption, make_folder, milliseconds, print_json, print_table
from .prompts import ParsedPrompt
from .segment import find_masks

if TYPE_CHECKING:
    from ..models.sam2.predictor import Sam2ImagePredictor

app = typer.Typer(rich_markup_mode="markdown")


@dataclass(frozen=True)
class DemoObject:
    """One object of a bundled picture: words, click (x, y), box (x0, y0, x1, y1), true mask (H, W) bool."""

    name: str
    click: tuple[float, float]
    box: tuple[float, float, float, float]
    truth: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DemoResult:
    """One picture: times in seconds (encoder once, click as median over the objects), mean IoU with the truth."""

    picture: str
    objects: int
    encode_seconds: float
    click_seconds: float
    click_iou: float
    box_iou: float
    files: list[str]


def demo_folder() -> Path:
    """Folder of the bundled pictures inside the package; raises EdgeError when it is not there."""
    folder = Path(str(importlib.resources.files("pixano_edge.engine.assets"))) / "demo"
    if not (folder / "demo.json").is_file():
        raise EdgeError(
            "The demo's pictures are not in this installation.",
            "Install again with: pip install --force-reinstall 'pixano-edge[cpu]'",
        )
    return folder


def read_pictures(folder: Path) -> list[tuple[Path, list[DemoObject]]]:
    """Pictures of a folder written by ``pixano_edge.export.demo.pictures`` and the objects on them."""
    content: dict[str, Any] = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    pictures = []
    for picture in content["pictures"]:
        objects = []
        for entry in picture["objects"]:
            counts = entry["truth"]["counts"].encode("ascii")
            truth = decode_rle({"size": entry["truth"]["size"], "counts": counts})
            objects.append(DemoObject(entry["name"], tuple(entry["click"]), tuple(entry["box"]), truth))
        pictures.append((folder / picture["file"], objects))
    return pictures


def run_picture(predictor: Sam2ImagePredictor, picture: Path, objects: list[DemoObject], out: Path) -> DemoResult:
    """Clicks on every object of a picture, then gives every box; writes one overlay for each way of asking."""
    image = decode_image(picture)
    start = time.perf_counter()
    embedding = predictor.encode(image, wait=True)
    encode_seconds = time.perf_counter() - start
    clicks = [ParsedPrompt(points=[o.click], labels=[1]) for o in objects]
    boxes = [ParsedPrompt(box=o.box) for o in objects]
    seconds: list[float] = []
    ious: dict[str, float] = {}
    files = []
    for name, prompts in (("clicks", clicks), ("boxes", boxes)):
        masks = []
        for prompt in prompts:  # one call each: what an annotator waits for
            start = time.perf_counter()
            masks.append(find_masks(predictor, embedding, [prompt])[0].mask)
            if name == "clicks":
                seconds.append(time.perf_counter() - start)
        ious[name] = statistics.fmean(mask_iou(m, o.truth) for m, o in zip(masks, objects))
        path = out / f"{picture.stem}.{name}.png"
        write_png(path, overlay(image, masks, [p.to_prompt() for p in prompts]))
        files.append(path.name)
    return DemoResult(
        picture.name,
        len(objects),
        encode_seconds,
        statistics.median(seconds),
        ious["clicks"],
        ious["boxes"],
        files,
    )


def _warm_up(predictor: Sam2ImagePredictor) -> float:
    """Runs both graphs once on a blank picture, so that the table shows the steady state; returns seconds."""
    start = time.perf_counter()
    embedding = predictor.encode(np.zeros((64, 64, 3), np.uint8))
    for prompt in (ParsedPrompt(points=[(32.0, 32.0)], labels=[1]), ParsedPrompt(box=(8.0, 8.0, 56.0, 56.0))):
        find_masks(predictor, embedding, [prompt])
    return time.perf_counter() - start


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the pictures.")] = Path("pixano-edge-demo"),
    bundle: Annotated[str, typer.Option(help="Bundle folder, or a name in the local store.")] = "sam2-demo",
    detector: Annotated[
        str, typer.Option(help="Bundle that finds objects by name; one taught the words.")
    ] = "grounding-dino-demo",
    language: Annotated[str, typer.Option(help="Bundle that answers questions about pictures.")] = "smolvlm-demo",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Segment, find by name, track and describe the bundled pictures and clip; writes pictures and times.

    The models are small and were trained on such pictures of shapes; they know nothing else. Export real checkpoints
    with 'pixano-edge export' for real photos.
    """
    begin = time.perf_counter()
    pictures = read_pictures(demo_folder())
    opened, named, talking = open_bundle(bundle), open_bundle(detector), open_bundle(language)

    from ..models.decoder.opening import open_vlm
    from ..models.detection.opening import open_detector
    from ..models.sam2.predictor import Sam2ImagePredictor
    from ..models.sam2_video.model import Sam2VideoModel

    tracks = sam2_video.constants_of(opened.manifest.constants) is not None
    model: Sam2VideoModel | Sam2ImagePredictor = (Sam2VideoModel if tracks else Sam2ImagePredictor).open(
        opened, device=device, backend=backend, precision=precision, threads=threads
    )
    predictor = model.predictor if isinstance(model, Sam2VideoModel) else model
    load_seconds = time.perf_counter() - begin
    warm_up_seconds = _warm_up(predictor)
    make_folder(out)
    results = [run_picture(predictor, picture, objects, out) for picture, objects in pictures]
    tracked: ClipResult | None = None
    clip = read_clip(demo_folder())
    skipped = ""
    if clip is None:
        skipped = "The demo's clip is not in this installation."
    elif not isinstance(model, Sam2VideoModel):
        skipped = f"Bundle '{opened.manifest.name}' holds no graphs for video, so the clip was not tracked."
    else:
        tracked = run_clip(model, *clip, out)
    info = model.info()
    model.close()
    words, words_skipped, named_info = [], "", None
    try:
        by_name = open_detector(named, device=device, backend=backend, precision=precision, threads=threads)
    except MissingDependencyError as error:
        words_skipped = str(error)
    else:
        with closing(by_name):
            asked = ((picture, [(o.name, o.box) for o in objects]) for picture, objects in pictures)
            threshold = usual_thresholds(named.manifest)[0]
            words = [run_words(by_name, picture, objects, out, threshold) for picture, objects in asked]
            named_info = by_name.info()
    answers: list[TalkResult] = []
    talk_skipped, talk_info = "", None
    try:
        talker = open_vlm(talking, device=device, backend=backend, precision=precision, threads=threads)
    except MissingDependencyError as error:
        talk_skipped = str(error)
    else:
        with closing(talker):
            answers = [r for asked in read_questions(demo_folder()) for r in run_questions(talker, *asked)]
            talk_info = talker.info()
    total = time.perf_counter() - begin
    if as_json:
        print_json(
            {
                "bundle": opened.manifest.name,
                "engine": info,
                "out": str(out),
                "load_seconds": load_seconds,
                "warm_up_seconds": warm_up_seconds,
                "total_seconds": total,
                "pictures": results,
                "clip": tracked,
                "clip_skipped": skipped,
                "detector": named.manifest.name,
                "detector_engine": named_info,
                "words": words,
                "words_skipped": words_skipped,
                "language": talking.manifest.name,
                "language_engine": talk_info,
                "answers": [{**asdict(r), "exact": r.exact} for r in answers],
                "answers_skipped": talk_skipped,
            }
        )
        return
    rows = [
        (
            r.picture,
            r.objects,
            milliseconds(r.encode_seconds),
            milliseconds(r.click_seconds),
            f"{r.click_iou:.3f}",
            f"{r.box_iou:.3f}",
        )
        for r in results
    ]
    columns = ("picture", "objects", "encoder (once)", "one click", "IoU clicks", "IoU boxes")
    print_table(columns, rows, right=columns[1:], title=f"{opened.manifest.name} on the bundled pictures")
    typer.echo()
    hits = [
        (
            w.picture,
            f"{w.found} of {w.objects}",
            w.wrong,
            milliseconds(w.first_seconds),
            milliseconds(w.again_seconds),
            ", ".join(w.words),
        )
        for w in words
    ]
    columns = ("picture", "found", "wrong boxes", "first call", "text kept", "asked for")
    title = f"{named.manifest.name} on the same pictures; '{ABSENT}' is on none"
    if words:
        print_table(columns, hits, right=columns[1:-1], title=title)
    else:
        typer.echo(words_skipped)
    typer.echo()
    if answers:
        _show_answers(talking.manifest.name, answers)
    else:
        typer.echo(talk_skipped)
    if tracked is None:
        typer.echo(f"\n{skipped}")
    else:
        typer.echo(
            f"\n{tracked.clip}: {tracked.objects} objects over {tracked.frames} frames, {tracked.fps:.1f} frames per "
            f"second, IoU {tracked.first_iou:.3f} on the clicked frame and {tracked.mean_iou:.3f} after it: "
            f"{', '.join(tracked.files)}"
        )
        if tracked.note:
            typer.echo(tracked.note)
    typer.echo(
        f"\nLoaded in {milliseconds(load_seconds)}, warmed up in {milliseconds(warm_up_seconds)}, "
        f"all done in {total:.1f} s.\nPictures: {out.resolve()}"
    )


def _show_answers(name: str, answers: list[TalkResult]) -> None:
    rows = [
        (
            r.picture,
            r.question,
            r.answer,
            "yes" if r.exact else f"no: {r.right}",
            milliseconds(r.first_seconds),
            milliseconds(r.seconds),
        )
        for r in answers
    ]
    columns = ("picture", "asked", "answered", "right", "first token", "all of it")
    right = sum(r.exact for r in answers)
    print_table(
        columns,
        rows,
        right=columns[-2:],
        title=f"{name}: {right} of {len(answers)} answers right, word for word",
    )
