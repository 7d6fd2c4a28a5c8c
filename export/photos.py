"""Pictures that parity is measured on: the user's photos, else two CC0 ones, named for what they are."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pixano_edge.engine.errors import ExportError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_PHOTOS = 4
MAX_SIDE = 1600
"""Longer photos are reduced for parity; masks are compared at this size."""
# File in scikit-image's `skimage/data`, where it comes from (docstrings of `skimage.data`), and top, left, height and
# width of the part that is used.
_BUNDLED = (
    ("coffee.png", "photo by Rachel Michetti, CC0-1.0, from scikit-image", (0, 1, 399, 599)),
    ("chelsea.png", "photo by Stefan van der Walt, CC0-1.0, from scikit-image", (1, 82, 299, 263)),
)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Photo:
    """One picture.

    Attributes:
        name: Shown in the parity report; never a path.
        pixels: (H, W, 3) uint8 RGB, C-contiguous.
        origin: Author and licence, empty where only the user knows them.
    """

    name: str
    pixels: Pixels
    origin: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]


def find_photos(folder: Path) -> list[Path]:
    """Up to `MAX_PHOTOS` pictures of a folder, evenly spread over its sorted names.

    Raises:
        ExportError: There is none.
    """
    if not folder.is_dir():
        raise ExportError(f"'{folder}' is not a folder.", "Give a folder of photos, or leave --photos out.")
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)
    if not files:
        raise ExportError(f"No photos in '{folder}'.", f"Known suffixes: {', '.join(SUFFIXES)}.")
    picked = np.linspace(0, len(files) - 1, min(len(files), MAX_PHOTOS)).round().astype(int)
    return [files[i] for i in picked]


def load_photos(files: Sequence[Path | Photo]) -> list[Photo]:
    """Opens pictures as they are stored (no EXIF rotation), reduced to `MAX_SIDE`; open ones stay as they are.

    Raises:
        ExportError: A file is not a readable picture.
    """
    return [file if isinstance(file, Photo) else Photo(file.name, _open(file)) for file in files]


def _open(path: Path) -> Pixels:
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ExportError(f"'{path.name}' is not a readable picture: {error}", "Remove it from the photos.") from error
    return reduce(np.asarray(rgb, dtype=np.uint8), MAX_SIDE)


def reduce(pixels: Pixels, longest: int) -> Pixels:
    """The picture with its longer side at most `longest` pixels; unchanged when it already is."""
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return np.ascontiguousarray(pixels)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.ascontiguousarray(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX)))


def default_photos() -> list[Photo]:
    """Two real photos for exports without the user's own, cut to odd sizes; drawn pictures where they are not there.

    The files are read from the scikit-image wheel (`skimage/data`); nothing is imported from it or downloaded.
    """
    folder = _bundled_folder()
    photos = []
    for name, origin, (top, left, height, width) in _BUNDLED:
        if folder is None or not (folder / name).is_file():
            warnings.warn(
                "scikit-image and its photos are not installed; parity is measured on simple drawn pictures. "
                "Give real ones with --photos.",
                stacklevel=2,
            )
            return [Photo(f"drawn-{seed}", draw(seed), "drawn by pixano-edge") for seed in (1, 2)]
        # Not square and of odd size, so that a mix-up of width and height or of scales shows.
        pixels = np.ascontiguousarray(_open(folder / name)[top : top + height, left : left + width])
        photos.append(Photo(f"skimage-{Path(name).stem}-{width}x{height}", pixels, origin))
    return photos


def _bundled_folder() -> Path | None:
    """`skimage/data` of the installed scikit-image, or None."""
    spec = importlib.util.find_spec("skimage")
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) / "data" if locations else None


def draw(seed: int, height: int = 213, width: int = 255) -> Pixels:
    """A drawn picture without any dependency: discs over a gradient with noise. Deterministic in `seed`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    ramp = np.stack([x / width, y / height, (x + y) / (width + height)], axis=-1)
    image = 60 + 120 * ramp[:, :, rng.permutation(3)]
    for _ in range(9):
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        radius = rng.uniform(8, 60)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        image[inside] = rng.uniform(0, 255, 3) + 15 * np.sin(x[inside] / rng.uniform(1.5, 6))[:, None]
    image += rng.normal(0, 8, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)
