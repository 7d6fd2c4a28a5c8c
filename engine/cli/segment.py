"""`pixano-edge segment`: masks of one image or a folder, as pictures and COCO JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

import numpy as np
import numpy.typing as npt
import typer

from ..errors import EdgeError
from ..models.images import decode_image
from .coco import CocoWriter
from .draw import overlay, write_masks, write_png
from .options import BackendOption, DeviceOption, ForceOption, PrecisionOption, ThreadsOption, open_bundle
from .output import JsonOption, make_folder, milliseconds, note, print_json, print_table, progress
from .prompts import BOX_HELP, POINT_HELP, PROMPT_HELP, ParsedPrompt, parse_prompts

if TYPE_CHECKING:
    from ..models.sam2.automatic import AutomaticMask
    from ..models.sam2.predictor import Sam2ImagePredictor

app = typer.Typer(rich_markup_mode="markdown")

Mask = npt.NDArray[np.bool_]

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jp2", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"))
COCO_NAME = "annotations.json"


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


class MaskList(Sequence[Mask]):
    """The masks of several `Found`, one in memory at a time: a hundred masks of a large photo would not fit."""

    def __init__(self, found: Sequence[Found]) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, index: int) -> Mask: ...
    @overload
    def __getitem__(self, index: slice) -> MaskList: ...
    def __getitem__(self, index: int | slice) -> Mask | MaskList:
        return MaskList(self._found[index]) if isinstance(index, slice) else self._found[index].mask


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
    """Names without suffix for the output files; with suffix where two files share the rest."""
    stems = [f.stem for f in files]
    return [f.name if stems.count(f.stem) > 1 else f.stem for f in files]


def segment_file(
    predictor: Sam2ImagePredictor,
    file: Path,
    stem: str,
    out: Path,
    coco: CocoWriter,
    prompts: Sequence[ParsedPrompt],
    *,
    multimask: bool = False,
    points_per_side: int = 0,
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
        points_per_side: Above 0: segment everything on a grid of this many points, without prompts.

    Raises:
        EdgeError: The image cannot be read or a prompt does not fit it. Nothing is added to `coco` then.
    """
    image = decode_image(file)
    height, width = image.shape[:2]
    start = time.perf_counter()
    embedding = predictor.encode(image, wait=True)
    encoded = time.perf_counter()
    if points_per_side:
        from ..models.sam2.automatic import generate_masks

        found = [Found(m, m.score, None) for m in generate_masks(predictor, embedding, points_per_side)]
    else:
        found = find_masks(predictor, embedding, prompts, multimask)
    done = time.perf_counter()
    result = ImageResult(file.name, height, width, encoded - start, done - encoded)
    picture = out / f"{stem}.overlay.png"
    marks = [p.to_prompt() for p in prompts]
    # Candidates of one prompt cover each other: the picture shows the best one.
    shown = [f for i, f in enumerate(found) if not multimask or i == 0 or found[i - 1].prompt != f.prompt]
    write_png(picture, overlay(image, MaskList(shown), marks))
    result.overlay = picture.name
    result.mask_files = [p.name for p in write_masks(out, stem, MaskList(found), (height, width), separate=multimask)]
    image_id = coco.add_image(file.name, height, width)
    for f in found:
        annotation = coco.add_mask(image_id, f.mask, f.score)
        result.masks.append(
            {key: annotation[key] for key in ("id", "score", "area", "bbox")} | {"prompt": f.prompt},
        )
    return result


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
    points_per_side: Annotated[int, typer.Option(min=1, max=128, help="Grid of --auto.")] = 32,
    multimask: Annotated[bool, typer.Option("--multimask", help="All three masks of every prompt.")] = False,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
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
        with progress("Segmenting", len(files), enabled=not as_json and (len(files) > 1 or auto)) as bar:
            for file, stem in zip(files, output_stems(files)):
                bar.label(file.name)
                grid = points_per_side if auto else 0
                try:
                    results.append(
                        segment_file(
                            predictor, file, stem, out, coco, prompts, multimask=multimask, points_per_side=grid
                        )
                    )
                except EdgeError as error:
                    failed.append({"file": file.name, "error": error.message, "action": error.action})
                    note(f"Skipped {file.name}: {error}")
                bar.step()
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
