"""`pixano-edge segment`: masks of one image or a folder, as pictures and COCO JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from ..errors import EdgeError
from ..models.images import decode_image
from ..models.masks import LazyMasks
from . import auto_options
from .coco import AUTOMATIC_KEYS, CocoWriter
from .draw import mask_index, overlay, write_masks, write_png
from .options import BackendOption, DeviceOption, ForceOption, PrecisionOption, ThreadsOption, open_bundle
from .output import JsonOption, Steps, make_folder, milliseconds, note, print_json, print_table, progress
from .prompts import BOX_HELP, POINT_HELP, PROMPT_HELP, ParsedPrompt, parse_prompts

if TYPE_CHECKING:
    from ..models.sam2.automatic import AutomaticMask, AutomaticOptions
    from ..models.sam2.predictor import Sam2ImagePredictor

app = typer.Typer(rich_markup_mode="markdown")

Mask = npt.NDArray[np.bool_]

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jp2", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"))
COCO_NAME = "annotations.json"
JSON_KEYS: tuple[str, ...] = ("id", "score", "area", "bbox")
"""What ``--json`` tells of an annotation."""


@dataclass(frozen=True)
class Found:
    """One mask.

    Attributes:
        source: The mask (H, W) bool, or an automatic mask, which decodes it at each access.
        score: The model's own estimate of the mask's IoU.
        prompt: Number of the prompt it answers, None for an automatic one.
    """

    source: Mask | AutomaticMask
    score: float
    prompt: int | None

    @property
    def mask(self) -> Mask:
        return self.source if isinstance(self.source, np.ndarray) else self.source.mask

    @property
    def area(self) -> int:
        """Foreground pixels."""
        return int(np.count_nonzero(self.source)) if isinstance(self.source, np.ndarray) else self.source.area


@dataclass
class ImageResult:
    """What was found and written for one image; times in seconds."""

    file: str
    height: int
    width: int
    encode_seconds: float
    predict_seconds: float
    masks: list[dict[str, Any]] = field(default_factory=list)
    overlay: str = ""
    mask_files: list[str] = field(default_factory=list)


def find_masks(
    predictor: Sam2ImagePredictor, image: Any, prompts: Sequence[ParsedPrompt], multimask: bool = False
) -> list[Found]:
    """Masks for the prompts on one image or embedding.

    As upstream recommends, a single click gets the best of three masks by predicted IoU, every other prompt the
    single-mask output. With `multimask` every prompt gets all three, best first.

    Returns:
        Masks in the order of the prompts, owned by the caller.
    """
    found: list[Found] = []
    for several in (True, False):
        chosen = [i for i, p in enumerate(prompts) if (multimask or p.ambiguous) == several]
        if not chosen:
            continue
        answer = predictor.predict(image, [prompts[i].to_prompt() for i in chosen], multimask=several)
        for row, index in enumerate(chosen):
            order = np.argsort(-answer.scores[row], kind="stable")
            kept = order if multimask else order[:1]
            found += [Found(answer.masks[row, k], float(answer.scores[row, k]), index) for k in kept]
    return sorted(found, key=lambda f: -1 if f.prompt is None else f.prompt)


def list_images(source: Path) -> list[Path]:
    """The image itself, or the images right in a folder by name (other files are left out by their suffix).

    Raises:
        typer.BadParameter: Nothing is there.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise typer.BadParameter(f"There is no file or folder '{source}'.")
    files = sorted(p for p in source.iterdir() if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise typer.BadParameter(f"The folder '{source}' holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return files


def output_stems(files: Sequence[Path]) -> list[str]:
    """Names without suffix for the output files; with suffix where that is not unlike all other names."""
    names, stems = {f.name for f in files}, [f.stem for f in files]
    return [f.name if stems.count(f.stem) > 1 or f.stem in names else f.stem for f in files]


def segment_file(
    predictor: Sam2ImagePredictor,
    file: Path,
    stem: str,
    out: Path,
    coco: CocoWriter,
    prompts: Sequence[ParsedPrompt],
    *,
    multimask: bool = False,
    automatic: AutomaticOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageResult:
    """Segments one file and writes its pictures; its masks are added to `coco`.

    Args:
        predictor: The model.
        file: Image to read.
        stem: Start of the names of the written files.
        out: Folder to write to; exists.
        coco: Collects the masks.
        prompts: What to segment, in pixels of the image.
        multimask: All three masks of every prompt.
        automatic: Segment everything with these options, without prompts.
        progress: See `generate_masks`.

    Raises:
        EdgeError: The image cannot be read or a prompt does not fit it. Nothing is added to `coco` then.
    """
    image = decode_image(file)
    height, width = image.shape[:2]
    start = time.perf_counter()
    embedding = predictor.encode(image, wait=True)
    encoded = time.perf_counter()
    if automatic is not None:
        from ..models.sam2.automatic import generate_masks

        # The image itself, since crops are cut from it; its features come from the cache.
        masks = generate_masks(predictor, image, automatic, progress=progress)
        found = [Found(mask, mask.score, None) for mask in masks]
        if not found:
            note(f"{file.name}: no mask passed the filters; lower --stability or --pred-iou, or add --crop-layers 1.")
    else:
        found = find_masks(predictor, embedding, prompts, multimask)
    done = time.perf_counter()
    result = ImageResult(file.name, height, width, encoded - start, done - encoded)
    picture = out / f"{stem}.overlay.png"
    marks = [p.to_prompt() for p in prompts]
    # Candidates of one prompt cover each other: the picture shows the best one.
    shown = [f for i, f in enumerate(found) if not multimask or i == 0 or found[i - 1].prompt != f.prompt]
    lazy, areas = LazyMasks(shown, lambda f: f.mask), [f.area for f in shown]
    index = mask_index(lazy, (height, width), areas)
    write_png(picture, overlay(image, lazy, marks, index=index, areas=areas))
    result.overlay = picture.name
    every = LazyMasks(found, lambda f: f.mask)
    same = index if len(shown) == len(found) else None
    written = write_masks(out, stem, every, (height, width), separate=multimask, index=same)
    result.mask_files = [path.name for path in written]
    image_id = coco.add_image(file.name, height, width)
    for f in found:
        if isinstance(f.source, np.ndarray):
            annotation, keys = coco.add_mask(image_id, f.source, f.score), JSON_KEYS
        else:
            annotation, keys = coco.add_automatic(image_id, f.source), (*JSON_KEYS, *AUTOMATIC_KEYS)
        result.masks.append({key: annotation[key] for key in keys} | {"prompt": f.prompt})
    return result


class _ImageSteps:
    """Moves a bar by the steps of one image, whatever number of them it turns out to have."""

    def __init__(self, bar: Steps, each: int) -> None:
        self._bar = bar
        self._each = each
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        now = self._each * done // total
        self._bar.step(now - self._shown)
        self._shown = now

    def finish(self) -> None:
        self(1, 1)


def _print_results(results: Sequence[ImageResult], out: Path) -> None:
    rows = [
        (
            r.file,
            f"{r.width}x{r.height}",
            len(r.masks),
            f"{max((m['score'] for m in r.masks), default=0.0):.3f}",
            milliseconds(r.encode_seconds),
            milliseconds(r.predict_seconds),
        )
        for r in results
    ]
    columns = ("image", "size", "masks", "best score", "encoder", "masks in")
    print_table(columns, rows, right=columns[2:])
    typer.echo(f"\nWritten to {out}: *.overlay.png, *.mask*.png, {COCO_NAME}")


@app.command()
def segment(
    source: Annotated[Path, typer.Argument(metavar="IMAGE|FOLDER", help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results; made when it is not there.")],
    bundle: Annotated[str, typer.Option(help="Bundle folder, or a name in the local store.")] = "sam2-demo",
    point: Annotated[list[str] | None, typer.Option(metavar="X,Y[,LABEL]", help=POINT_HELP)] = None,
    box: Annotated[list[str] | None, typer.Option(metavar="X0,Y0,X1,Y1", help=BOX_HELP)] = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="'...'", help=PROMPT_HELP)] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Segment everything, without prompts.")] = False,
    multimask: Annotated[bool, typer.Option("--multimask", help="All three masks of every prompt.")] = False,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    points_per_side: auto_options.PointsPerSide = None,
    points_per_batch: auto_options.PointsPerBatch = None,
    pred_iou: auto_options.PredIou = None,
    stability: auto_options.Stability = None,
    stability_offset: auto_options.StabilityOffset = None,
    mask_threshold: auto_options.MaskThreshold = None,
    box_nms: auto_options.BoxNms = None,
    crop_layers: auto_options.CropLayers = None,
    crop_nms: auto_options.CropNms = None,
    crop_overlap: auto_options.CropOverlap = None,
    crop_points_downscale: auto_options.CropPointsDownscale = None,
    min_region: auto_options.MinRegion = None,
    min_area: auto_options.MinArea = None,
    refine: auto_options.Refine = False,
    single_mask: auto_options.SingleMask = False,
) -> None:
    """Segment an image or a folder of images.

    Writes for every image an overlay picture and mask files (0 and 255 for one object, object numbers with a palette
    for several), and one COCO JSON for all. Coordinates are pixels of the image, x to the right, y down; with a
    folder the same prompts go to every image. A file that cannot be read is named and skipped; the command then ends
    with 1.
    """
    prompts = parse_prompts(point or [], box or [], prompt or [])
    if auto and (prompts or multimask):
        raise typer.BadParameter("--auto takes no --point, --box, --prompt or --multimask.")
    if not auto and not prompts:
        raise typer.BadParameter("Say what to segment: --point x,y, --box x0,y0,x1,y1, --prompt '...', or --auto.")
    automatic = auto_options.automatic_options(
        auto,
        {
            "points_per_side": points_per_side,
            "points_per_batch": points_per_batch,
            "pred_iou_thresh": pred_iou,
            "stability_score_thresh": stability,
            "stability_score_offset": stability_offset,
            "mask_threshold": mask_threshold,
            "box_nms_thresh": box_nms,
            "crop_n_layers": crop_layers,
            "crop_nms_thresh": crop_nms,
            "crop_overlap_ratio": crop_overlap,
            "crop_n_points_downscale_factor": crop_points_downscale,
            "min_mask_region_area": min_region,
            "min_area": min_area,
            "use_m2m": True if refine else None,
            "multimask_output": False if single_mask else None,
        },
    )
    files = list_images(source)
    if out.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise typer.BadParameter(f"-o must not be the folder of the images ('{out}').")
    opened = open_bundle(bundle)

    from ..models.sam2.predictor import Sam2ImagePredictor

    predictor = Sam2ImagePredictor.open(
        opened, device=device, backend=backend, precision=precision, threads=threads, force=force
    )
    make_folder(out)
    coco = CocoWriter(f"pixano-edge segment, {opened.manifest.name}")
    results: list[ImageResult] = []
    failed: list[dict[str, str]] = []
    try:
        # An image counts as many steps as it has clicks.
        each = automatic.clicks() if automatic is not None else 1
        bar_shown = not as_json and (len(files) > 1 or auto)
        with progress("Segmenting", len(files) * each, enabled=bar_shown) as bar:
            for file, stem in zip(files, output_stems(files)):
                bar.label(file.name)
                shown = _ImageSteps(bar, each)
                try:
                    results.append(
                        segment_file(
                            predictor,
                            file,
                            stem,
                            out,
                            coco,
                            prompts,
                            multimask=multimask,
                            automatic=automatic,
                            progress=shown,
                        )
                    )
                except EdgeError as error:
                    failed.append({"file": file.name, "error": error.message, "action": error.action})
                    note(f"Skipped {file.name}: {error}")
                shown.finish()
    finally:
        # Also after Ctrl-C: what is done can be used.
        coco.write(out / COCO_NAME)
    info = predictor.info()
    predictor.close()
    for warning in info["warnings"]:
        note(f"Warning: {warning}")
    if as_json:
        print_json(
            {
                "bundle": opened.manifest.name,
                "engine": info,
                "out": str(out),
                "coco": COCO_NAME,
                "prompts": [p.to_dict() for p in prompts],
                "images": results,
                "failed": failed,
            }
        )
    else:
        _print_results(results, out)
    if failed:
        note(f"{len(failed)} of {len(files)} file(s) could not be segmented.")
        raise typer.Exit(1)
