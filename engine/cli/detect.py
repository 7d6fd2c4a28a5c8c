"""`pixano-edge detect`: boxes of named classes on one image or a folder, and on request their masks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from ..errors import EdgeError
from ..models.detection.base import Detections, Detector, check_request
from ..models.images import decode_image
from ..models.masks import LazyMasks
from ..models.rle import decode_rle, encode_rle
from .coco import CocoWriter
from .draw import mask_index, overlay, write_masks, write_png
from .draw_text import NamedBox
from .options import BackendOption, DeviceOption, ForceOption, PrecisionOption, ThreadsOption, open_bundle
from .output import JsonOption, make_folder, milliseconds, note, print_json, print_table, progress
from .prompts import ParsedPrompt, as_box, numbers
from .segment import COCO_NAME, find_masks, list_images, output_stems

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..models.sam2.predictor import Sam2ImagePredictor

app = typer.Typer(rich_markup_mode="markdown")

Rgb = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

BY_NAME, BY_EXAMPLE = "grounding-dino-demo", "owlv2-demo"
"""Bundles where none is named: the one that finds more by name, and the one that knows examples."""
THRESHOLDS = {
    "grounding-dino": (0.35, 0.25),
    BY_EXAMPLE: (0.3, 0.3),
    BY_NAME: (0.5, 0.5),
}
"""Box and text threshold by family, or name, where the command takes other ones than `DEFAULT_THRESHOLDS`: those of the
examples in upstream's README (IDEA-Research/GroundingDINO), and the demo's own."""
DEFAULT_THRESHOLDS = (0.1, 0.1)
"""As in the examples of OWL-ViT and OWLv2 in transformers; its scores are lower than those of other detectors."""

SEGMENTER = "sam2-demo"
"""Bundle of ``--then-segment`` where none is named."""

_MASK_BYTES = 1 << 28
"""Full-size masks held at once: boxes are segmented in groups, so that many boxes on a large photo fit in memory."""


def usual_thresholds(manifest: Manifest) -> tuple[float, float]:
    """Box and text threshold of a bundle where none is asked for."""
    return THRESHOLDS.get(manifest.name) or THRESHOLDS.get(manifest.family, DEFAULT_THRESHOLDS)


@dataclass(frozen=True)
class Example:
    """What to look for in one-shot detection.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        box: Where it is on that image, x1, y1, x2, y2 in pixels; None lets the model choose.
    """

    image: Rgb
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Query:
    """What is looked for on every image.

    Attributes:
        classes: Their names; with an example the one name that its finds get.
        box_threshold, text_threshold, nms, limit: See `Detector.detect`; None takes the detector's own default.
        example: For one-shot detection.
    """

    classes: tuple[str, ...]
    box_threshold: float | None = None
    text_threshold: float | None = None
    nms: float | None = None
    limit: int | None = None
    example: Example | None = None


@dataclass(frozen=True)
class BoxMask:
    """The mask of a box as run lengths, its pixels, and the model's own estimate of its IoU."""

    rle: dict[str, Any]
    area: int
    score: float

    def decode(self) -> Mask:
        """(H, W) bool, the caller's."""
        return decode_rle(self.rle)


@dataclass
class ImageResult:
    """What was found and written for one image; times in seconds, `segment_seconds` None without masks."""

    file: str
    height: int
    width: int
    detect_seconds: float
    segment_seconds: float | None = None
    objects: list[dict[str, Any]] = field(default_factory=list)
    overlay: str = ""
    mask_files: list[str] = field(default_factory=list)


def find_boxes(detector: Detector, image: Rgb, query: Query) -> Detections:
    """Runs a detector; boxes that lie wholly outside the image, and so have no area after clipping, are left out.

    Raises:
        EdgeError: It cannot look for examples and was given one; or as `Detector.detect`.
    """
    asked = {"box_threshold": query.box_threshold, "nms": query.nms, "limit": query.limit}
    given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if query.example is not None:
        found = one_shot(detector)(image, query.example.image, query.example.box, **given)
    else:
        if query.text_threshold is not None:
            given["text_threshold"] = query.text_threshold
        found = detector.detect(image, query.classes, **given)
    kept = np.flatnonzero((found.boxes[:, 2:] > found.boxes[:, :2]).all(axis=1))
    return Detections(found.boxes[kept], found.scores[kept], found.labels[kept], query.classes)


def one_shot(detector: Detector) -> Any:
    """The method of a detector that looks for an example; raises EdgeError where it has none."""
    method = getattr(detector, "detect_like", None)
    if method is None:
        info = detector.info()
        raise EdgeError(
            f"Bundle '{info['bundle']}' ({info['architecture']}) cannot look for an example (--like).",
            "Take a bundle of OWLv2 or OWL-ViT, or name what to look for with --class.",
        )
    return method


def segment_boxes(predictor: Sam2ImagePredictor, image: Rgb, boxes: npt.NDArray[np.float32]) -> list[BoxMask]:
    """One mask for each box (N, 4), in their order."""
    embedding = predictor.encode(image, wait=True)
    prompts = [ParsedPrompt(box=(x1, y1, x2, y2)) for x1, y1, x2, y2 in boxes.tolist()]
    group = max(1, _MASK_BYTES // (image.shape[0] * image.shape[1]))
    masks: list[BoxMask] = []
    for start in range(0, len(prompts), group):
        found = find_masks(predictor, embedding, prompts[start : start + group])
        masks += [BoxMask(encode_rle(f.mask), int(np.count_nonzero(f.mask)), f.score) for f in found]
        del found  # before the next group's masks are made
    return masks


def detect_file(
    detector: Detector,
    file: Path,
    stem: str,
    out: Path,
    coco: CocoWriter,
    query: Query,
    predictor: Sam2ImagePredictor | None = None,
) -> ImageResult:
    """Looks for objects on one file and writes its pictures; they are added to `coco`.

    Args:
        detector: The model.
        file: Image to read.
        stem: Start of the names of the written files.
        out: Folder to write to; exists.
        coco: Collects the objects; its categories are the classes.
        query: What to look for.
        predictor: Turns the boxes into masks.

    Raises:
        EdgeError: The image cannot be read, or a model failed. Nothing is added to `coco` then.
    """
    image = decode_image(file)
    height, width = image.shape[:2]
    start = time.perf_counter()
    found = find_boxes(detector, image, query)
    result = ImageResult(file.name, height, width, time.perf_counter() - start)
    masks: list[BoxMask] = []
    if predictor is not None:
        start = time.perf_counter()
        masks = segment_boxes(predictor, image, found.boxes) if len(found) else []
        result.segment_seconds = time.perf_counter() - start
    lazy, areas = LazyMasks(masks, BoxMask.decode), [mask.area for mask in masks]
    index = mask_index(lazy, (height, width), areas)
    if predictor is not None:
        written = write_masks(out, stem, lazy, (height, width), index=index)
        result.mask_files = [path.name for path in written]
    labels = found.labels.tolist()
    picture = out / f"{stem}.overlay.png"
    drawn = overlay(image, lazy, boxes=named_boxes(found), kinds=labels, index=index, areas=areas)
    write_png(picture, drawn)
    result.overlay = picture.name
    image_id = coco.add_image(file.name, height, width)
    for number, (box, score, label) in enumerate(zip(found.boxes.tolist(), found.scores.tolist(), labels)):
        mask = masks[number] if masks else None
        told: dict[str, Any] = {"class": found.classes[label]}
        if mask is None:
            annotation = coco.add_box(image_id, box, score, label)
        else:
            annotation = coco.add_box(image_id, box, score, label, mask.rle, mask.area)
            annotation["mask_score"] = told["mask_score"] = round(mask.score, 6)
        result.objects.append({key: annotation[key] for key in ("id", "score", "area", "bbox")} | told)
    return result


def named_boxes(found: Detections) -> list[NamedBox]:
    """The boxes as `overlay` draws them."""
    rows: Iterator[Any] = zip(found.boxes.tolist(), found.labels.tolist(), found.names(), found.scores.tolist())
    return [NamedBox((x1, y1, x2, y2), label, name, score) for (x1, y1, x2, y2), label, name, score in rows]


def parse_classes(listed: str | None, named: Sequence[str]) -> tuple[str, ...]:
    """Class names of ``--classes`` (split at commas) and ``--class`` (as they are), each once, in the order given."""
    parts = [part.strip() for part in (listed or "").split(",")]
    return tuple(dict.fromkeys([part for part in parts if part] + [name.strip() for name in named]))


def _read_example(like: Path, like_box: str | None) -> Example:
    box = None if like_box is None else as_box(numbers(like_box, (4,), "--like-box"), "--like-box")
    return Example(decode_image(like), box)


def _found_words(result: ImageResult) -> str:
    """``cat 2, remote control 1``."""
    return ", ".join(f"{name} {count}" for name, count in Counter(o["class"] for o in result.objects).items())


def _print_results(results: Sequence[ImageResult], out: Path, masks: bool) -> None:
    columns = ["image", "size", "boxes", "best score", "detector", "found"]
    if masks:
        columns.insert(5, "masks in")
    rows = []
    for r in results:
        best = max((o["score"] for o in r.objects), default=0.0)
        row = [r.file, f"{r.width}x{r.height}", len(r.objects), f"{best:.3f}", milliseconds(r.detect_seconds)]
        rows.append(
            [*row, *([milliseconds(r.segment_seconds)] if r.segment_seconds is not None else ()), _found_words(r)]
        )
    print_table(columns, rows, right=columns[2:-1])
    written = ("*.overlay.png", *(["*.mask.png"] if masks else ()), COCO_NAME)
    typer.echo(f"\nWritten to {out}: {', '.join(written)}")


@app.command()
def detect(
    source: Annotated[Path, typer.Argument(metavar="IMAGE|FOLDER", help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results; made when it is not there.")],
    classes: Annotated[
        str | None, typer.Option(metavar="'A, B, ...'", help="What to look for, separated by commas.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME", help="One more class, as it is. Repeatable.")
    ] = None,
    bundle: Annotated[
        str | None,
        typer.Option(
            help=f"Bundle folder, or a name in the local store; default: {BY_NAME}, {BY_EXAMPLE} with --like."
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(metavar="EXAMPLE", help="Look for what is on this image (OWLv2, OWL-ViT); --class names it."),
    ] = None,
    like_box: Annotated[
        str | None, typer.Option(metavar="X0,Y0,X1,Y1", help="Where it is on the example; default: the model chooses.")
    ] = None,
    box_threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Least score of a box; default: 0.35 for Grounding DINO, 0.1 for OWLv2 and OWL-ViT, 0.5 for "
            f"{BY_NAME}, 0.3 for {BY_EXAMPLE}, 0 with --like.",
        ),
    ] = None,
    text_threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Grounding DINO: least probability of a class's words; default: 0.25."),
    ] = None,
    nms: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="IoU above which the lesser of two boxes of one class goes; default: all stay, 0.3 with --like.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most boxes per image, the best ones.")] = None,
    then_segment: Annotated[bool, typer.Option("--then-segment", help="Turn the boxes into masks, by SAM 2.")] = False,
    segment_bundle: Annotated[
        str | None, typer.Option(help="SAM 2 bundle of --then-segment; default: sam2-demo.")
    ] = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find objects by name, or by an example, on an image or a folder of images.

    Writes for every image an overlay picture, and one COCO JSON for all with a category for each class. With
    --then-segment each box becomes a mask, too (masks in the JSON and as *.mask.png). A file that cannot be read is
    named and skipped; the command then ends with 1.
    """
    wanted = parse_classes(classes, name or [])
    bundle = bundle or (BY_NAME if like is None else BY_EXAMPLE)
    if like is None:
        if like_box is not None:
            raise typer.BadParameter("--like-box says where something is on the image of --like.")
        if not wanted:
            raise typer.BadParameter("Say what to look for: --classes 'cat, remote control', --class NAME, or --like.")
    elif len(wanted) > 1:
        raise typer.BadParameter("--like looks for one thing: give at most one --class, its name.")
    elif text_threshold is not None:
        raise typer.BadParameter(
            "--like compares pictures: --text-threshold has no meaning there. Use --box-threshold."
        )
    if segment_bundle is not None and not then_segment:
        raise typer.BadParameter("--segment-bundle says what --then-segment uses: give both.")
    files = list_images(source)
    if out.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise typer.BadParameter(f"-o must not be the folder of the images ('{out}').")
    example = None if like is None else _read_example(like, like_box)
    opened = open_bundle(bundle)
    if like is None:
        usual = usual_thresholds(opened.manifest)
        box_threshold = usual[0] if box_threshold is None else box_threshold
        text_threshold = usual[1] if text_threshold is None else text_threshold
    else:
        wanted = wanted or (like.stem,)
    query = Query(wanted, box_threshold, text_threshold, nms, limit, example)
    check_request(wanted, box_threshold or 0.0, text_threshold or 0.0, nms, limit)
    segmenter = open_bundle(segment_bundle or SEGMENTER) if then_segment else None

    from ..models.detection.opening import open_detector
    from ..models.sam2.predictor import Sam2ImagePredictor

    results: list[ImageResult] = []
    failed: list[dict[str, str]] = []
    with ExitStack() as models:
        asked: dict[str, Any] = {"device": device, "backend": backend, "precision": precision}
        asked |= {"threads": threads, "force": force}
        detector = open_detector(opened, **asked)
        models.callback(detector.close)
        if example is not None:
            one_shot(detector)  # before any file: it is none of them that is wrong
        predictor = None
        if segmenter is not None:
            predictor = models.enter_context(Sam2ImagePredictor.open(segmenter, **asked))
        make_folder(out)
        coco = CocoWriter(f"pixano-edge detect, {opened.manifest.name}", query.classes)
        try:
            with progress("Detecting", len(files), enabled=not as_json and len(files) > 1) as bar:
                for file, stem in zip(files, output_stems(files)):
                    bar.label(file.name)
                    try:
                        results.append(detect_file(detector, file, stem, out, coco, query, predictor))
                    except EdgeError as error:
                        failed.append({"file": file.name, "error": error.message, "action": error.action})
                        note(f"Skipped {file.name}: {error}")
                    bar.step()
        finally:
            # Also after Ctrl-C: what is done can be used.
            coco.write(out / COCO_NAME)
        info = detector.info()
        segment_info = predictor.info() if predictor is not None else None
    for warning in (*info["warnings"], *(segment_info or {}).get("warnings", ())):
        note(f"Warning: {warning}")
    if as_json:
        print_json(
            {
                "bundle": opened.manifest.name,
                "engine": info,
                "segment_bundle": None if segmenter is None else segmenter.manifest.name,
                "segment_engine": segment_info,
                "out": str(out),
                "coco": COCO_NAME,
                "classes": list(query.classes),
                "like": None if like is None else str(like),
                "box_threshold": query.box_threshold,
                "text_threshold": query.text_threshold,
                "nms": nms,
                "limit": limit,
                "images": results,
                "failed": failed,
            }
        )
    else:
        _print_results(results, out, then_segment)
    if failed:
        note(f"{len(failed)} of {len(files)} file(s) could not be searched.")
        raise typer.Exit(1)
