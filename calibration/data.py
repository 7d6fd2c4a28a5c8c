"""What a bundle is calibrated and judged on: pictures and clips of the user's own, never random numbers.

Ranges taken from random pictures fit random pictures: activations of real ones lie elsewhere, and the clipped ones are
those that matter. So pictures of noise or of one colour are left out, named and counted, and a set that mostly holds
such pictures is refused. Copies of a picture are left out too, or one could be both calibrated and judged on; what
comes from one video is calibrated on or judged on as a whole, since its frames are nearly copies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from pixano_edge.engine.errors import CalibrationError, EdgeError
from pixano_edge.engine.models.images import Rgb, decode_image
from pixano_edge.engine.models.sam2.cache import pixel_digest
from pixano_edge.engine.models.sam2_video.frames import Frames, ImageFrames, VideoFrames

from .result import DataSummary, SkippedFile

MIN_SAMPLES = 8
"""Fewer leave nothing to judge on."""
MAX_SAMPLES = 64
"""Ranges hardly move after a few dozen pictures; more cost time."""
CLIP_LENGTH = 60
"""Frames of a clip: memory features drift for as long."""
FLAT = 2.0
"""Standard deviation of the luminance, of 255, below which a picture shows nothing."""
NOISE = 0.2
"""Correlation of neighbouring pixels below which a picture is noise; photographs have more than 0.8."""
DARK = 48.0
"""Distance of the 1st and 99th percentile of the luminance over all pictures, of 255, below which they warn."""
HELD_OUT = 0.35
"""Share of the samples that variants are judged on."""


@dataclass(frozen=True, eq=False)
class Truth:
    """An annotated object.

    Attributes:
        name: Of its category.
        box: x1, y1, x2, y2 in pixels.
        segmentation: As COCO has it (polygons or run lengths), or None.
    """

    name: str
    box: tuple[float, float, float, float]
    segmentation: Any = None

    def mask(self, height: int, width: int) -> npt.NDArray[np.bool_] | None:
        """(height, width) of its segmentation; None where there is none or it is damaged."""
        from pycocotools import mask as coco

        found = self.segmentation
        try:
            if isinstance(found, list) and found:
                found = coco.merge(coco.frPyObjects(found, height, width))
            elif isinstance(found, dict) and isinstance(found.get("counts"), list):
                found = coco.frPyObjects(found, height, width)
            if not isinstance(found, dict) or tuple(found["size"]) != (height, width):
                return None
            return np.asarray(coco.decode(found), np.bool_)
        except (TypeError, ValueError, KeyError, IndexError):
            return None


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture, decoded when it is asked for.

    Attributes:
        name: As the user knows it: a path within the data, or a frame of a video.
        source: Its file; of a frame, a lossless copy.
        truths: Annotated objects; empty where nothing is known.
        video: The video that it is a frame of; None for a picture of its own.
        place: Number of the frame.
        held: Keeps the copy of a frame until nobody needs it any more.
    """

    name: str
    source: Path
    truths: tuple[Truth, ...] = ()
    video: Path | None = None
    place: int = 0
    held: Any = field(default=None, repr=False)

    @property
    def group(self) -> str:
        """Equal for samples that are nearly copies of each other: frames of one video."""
        return str(self.video or self.source)

    def load(self) -> Rgb:
        """(H, W, 3) uint8 RGB.

        Raises:
            ImageError: It does not decode.
        """
        return decode_image(self.source)


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames in a row.

    Attributes:
        name: As the user knows it.
        source: A video, or its frames as files.
        place: Number of the first frame.
        length: Frames.
    """

    name: str
    source: Path | tuple[Path, ...]
    place: int
    length: int

    @property
    def group(self) -> str:
        """Equal for clips of one video."""
        return str(self.source if isinstance(self.source, Path) else self.source[0])

    def frames(self) -> Frames:
        """The frames, decoded when they are asked for; the caller closes them. Of a video's clips one at a time."""
        if not isinstance(self.source, Path):
            return ImageFrames(self.source[self.place : self.place + self.length])
        return _Part(_Reader.of(self.source), self.place, self.length)


class _Reader:
    """The video that was read last. It stays open, so that its clips, one after the other, walk through it once."""

    _open: ClassVar[tuple[Path, VideoFrames] | None] = None

    @classmethod
    def of(cls, path: Path) -> VideoFrames:
        """The frames of a video; those of the one before are closed."""
        if cls._open is None or cls._open[0] != path:
            if cls._open is not None:
                cls._open[1].close()
            cls._open = None
            cls._open = (path, VideoFrames(path))
        return cls._open[1]


class _Part(Frames):
    """Some frames of a video, which stays open."""

    def __init__(self, whole: VideoFrames, first: int, length: int) -> None:
        self._whole, self._first, self._length = whole, first, length
        self.size = whole.size

    def __len__(self) -> int:
        return self._length

    def _read(self, index: int) -> npt.NDArray[np.uint8]:
        return self._whole[self._first + index]


Sample = Picture | Clip
S = TypeVar("S", bound=Sample)


def reading_order(samples: Iterable[S]) -> list[S]:
    """Samples such that those of one video follow each other in time: out of order it is decoded again and again."""
    first: dict[str, int] = {}
    listed = list(samples)
    for index, sample in enumerate(listed):
        first.setdefault(sample.group, index)
    return sorted(listed, key=lambda sample: (first[sample.group], sample.place))


@dataclass(frozen=True)
class Split:
    """The samples by what they are for; no sample is in two of them.

    Attributes:
        calibration: Ranges are taken from these, and blocks are chosen by these.
        held_out: The variant is judged on these alone.
    """

    calibration: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


@dataclass(frozen=True)
class Data:
    """Checked samples, in a random order that depends on the seed alone.

    Attributes:
        source: Name of the folder or file.
        kind: ``images``, ``video``, ``coco`` or ``pixano``.
        samples: Pictures, or clips where those were asked for.
        skipped: Files that could not be used, and why.
        digest: SHA-256 over the used files' contents, hexadecimal.
        seed: Of the order.
        warnings: In words.
        classes: Names of the categories, the most frequent first, where the data have some.
        pixels: Digest of what was looked at of each sample, in the order of `samples`.
    """

    source: str
    kind: str
    samples: tuple[Sample, ...]
    skipped: tuple[SkippedFile, ...]
    digest: str
    seed: int
    warnings: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    pixels: tuple[str, ...] = ()

    def split(self, held_out: Data | None = None) -> Split:
        """Calibration and held-out samples; the latter are a share of these, or another set altogether.

        Raises:
            CalibrationError: The two sets share samples, by their pixels.
        """
        if held_out is not None:
            ours = dict(zip(self.pixels, self.samples))
            shared = [(ours[key], theirs) for key, theirs in zip(held_out.pixels, held_out.samples) if key in ours]
            if shared:
                raise CalibrationError(
                    f"{len(shared)} held-out sample(s) are among the calibration data, for example "
                    f"'{shared[0][1].name}', which is '{shared[0][0].name}'.",
                    "Give other data to --held-out: a variant is not judged on what it was fitted to.",
                )
            return Split(self.samples, held_out.samples)
        kept = set(map(id, _held_out(self.samples)))
        calibration, judged = (tuple(s for s in self.samples if (id(s) in kept) == side) for side in (False, True))
        return Split(calibration, judged)

    def summary(self, split: Split) -> DataSummary:
        """For the report."""
        return DataSummary(
            self.source,
            self.kind,
            tuple(s.name for s in split.calibration),
            tuple(s.name for s in split.held_out),
            self.skipped,
            self.seed,
            self.digest,
            self.warnings,
        )


def _held_out(samples: Sequence[Sample]) -> list[Sample]:
    """`HELD_OUT` of the samples: whole videos where there are several, of a single one what comes last."""
    count = max(1, round(HELD_OUT * len(samples)))
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    if len(groups) == 1:
        return sorted(samples, key=lambda sample: sample.place)[len(samples) - count :]
    found: list[Sample] = []
    for group in groups.values():
        if len(found) < count and 2 * (len(found) + len(group)) <= max(len(samples), 2):
            found += group
    return found


def open_data(
    path: Path | str,
    *,
    clips: bool = False,
    limit: int = MAX_SAMPLES,
    clip_length: int = CLIP_LENGTH,
    seed: int = 0,
    allow_few: bool = False,
    frames: Path | None = None,
    on_file: Callable[[], None] = lambda: None,
) -> Data:
    """Opens and checks calibration data.

    Args:
        path: A folder of pictures (searched through), a video, a COCO JSON with its pictures beside it, or the folder
            of a Pixano dataset. For clips: a video, or a folder of videos, of folders of frames, or of frames.
        clips: Take clips, not pictures.
        limit: Most samples.
        clip_length: Frames of a clip; a shorter video is one clip, a longer one gives several.
        seed: Of the choice and order of the samples.
        allow_few: Take fewer than `MIN_SAMPLES` (two at least).
        frames: Folder for copies of the frames that are taken from videos as pictures, which go with the samples; None
            for the system's place for such files.
        on_file: Called after each file.

    Raises:
        CalibrationError: Nothing there, nothing usable, too few samples, or mostly noise.
        BundleError: The disk is full.
    """
    from .data_readers import find_clips, find_pictures

    root = Path(path).expanduser()
    if not root.exists():
        raise CalibrationError(f"There is nothing at '{path}'.", "Give a folder, a video or a COCO JSON to --data.")
    found = find_clips(root, clip_length) if clips else find_pictures(root, limit, frames)
    order = np.random.default_rng([81, seed]).permutation(len(found.samples))
    check = _Checks(on_file)
    chosen = [found.samples[index] for index in order]
    while chosen and len(check.used) < limit:
        # As many as are wanted still, read in their order; then those that stand for the ones that were left out.
        part, chosen = chosen[: limit - len(check.used)], chosen[limit - len(check.used) :]
        for sample in reading_order(part):
            check.take(sample)
    check.restore({id(found.samples[index]): place for place, index in enumerate(order)})
    skipped = (*found.skipped, *check.skipped)
    what = "clip" if clips else "picture"
    _refuse(what, path, check, skipped, allow_few)
    warnings = [*found.warnings, *check.warnings()]
    if len(check.used) < MIN_SAMPLES:
        warnings.append(f"Only {len(check.used)} {what}s: the figures may be far off for others.")
    return Data(
        root.resolve().name,
        found.kind,
        tuple(check.used),
        tuple(skipped),
        check.digest(),
        seed,
        tuple(warnings),
        found.classes,
        tuple(check.pixels),
    )


def _refuse(what: str, path: Path | str, check: _Checks, skipped: Sequence[SkippedFile], allow_few: bool) -> None:
    """Raises CalibrationError where the samples cannot be calibrated on."""
    count, blank = len(check.used), check.random + check.flat
    left_out = f" ({len(skipped)} left out: {_examples(skipped)})" if skipped else ""
    if blank > count:
        kind = "noise" if check.random >= check.flat else "one colour"
        raise CalibrationError(
            f"{blank} of {blank + count} {what}s in '{path}' are noise or of one colour, mostly {kind}{left_out}.",
            "Give pictures such as the model will see: ranges of random data fit no real picture.",
        )
    if not count:
        raise CalibrationError(
            f"There is no {what} to calibrate on in '{path}'{left_out}.", "Give a folder with pictures, or a video."
        )
    if count == 1:
        raise CalibrationError(
            f"'{path}' holds one {what} only{left_out}: nothing is left to judge the result on.",
            f"Give {MIN_SAMPLES} or more, such as the model will see.",
        )
    if count < MIN_SAMPLES and not allow_few:
        raise CalibrationError(
            f"'{path}' holds {count} usable {what}s{left_out}, fewer than {MIN_SAMPLES}.",
            "Give more, or --allow-few to calibrate on these all the same.",
        )


def _examples(skipped: Sequence[SkippedFile]) -> str:
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return "; ".join(f"{s.name}: {s.reason.rstrip('.')}" for s in skipped[:3]) + more


class _Checks:
    """Looks at samples one by one; keeps those that can be used, and the reasons of the others."""

    def __init__(self, on_file: Callable[[], None]) -> None:
        self.used: list[Sample] = []
        self.skipped: list[SkippedFile] = []
        self.random = self.flat = 0
        self.pixels: list[str] = []
        self._seen: dict[bytes, str] = {}
        self._luminance = np.zeros(256, np.int64)
        self._on_file = on_file

    def take(self, sample: Sample) -> None:
        try:
            reason = self._look(sample)
        except EdgeError as error:
            reason = error.message
        if reason:
            self.skipped.append(SkippedFile(sample.name, reason))
        else:
            self.used.append(sample)
        self._on_file()

    def restore(self, places: dict[int, int]) -> None:
        """Puts what is used into another order, given as the place of each sample by its id."""
        pairs = sorted(zip(self.used, self.pixels), key=lambda pair: places[id(pair[0])])
        self.used, self.pixels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def _look(self, sample: Sample) -> str:
        """Why a sample cannot be used; empty where it can."""
        if isinstance(sample, Picture):
            images = [sample.load()]
        else:
            frames = sample.frames()
            try:
                images = [frames[index] for index in sorted({0, len(frames) // 2, len(frames) - 1})]
            finally:
                frames.close()
        digest = hashlib.blake2b(b"".join(map(pixel_digest, images)), digest_size=32).digest()
        if digest in self._seen:
            return f"the same picture as {self._seen[digest]}"
        grays = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images]
        if all(gray.std() < FLAT for gray in grays):
            self.flat += 1
            return "of one colour"
        if all(_neighbours(gray) < NOISE for gray in grays):
            self.random += 1
            return "noise: neighbouring pixels have nothing to do with each other"
        self._seen[digest] = sample.name
        self.pixels.append(digest.hex())
        for gray in grays:
            self._luminance += np.bincount(gray.reshape(-1), minlength=256)
        return ""

    def warnings(self) -> list[str]:
        """What is odd about the used samples as a whole."""
        total = np.cumsum(self._luminance)
        if not total[-1]:
            return []
        low, high = (int(np.searchsorted(total, share * total[-1])) for share in (0.01, 0.99))
        if high - low >= DARK:
            return []
        return [f"The pictures use the grey levels {low} to {high} of 255 only; others will be clipped."]

    def digest(self) -> str:
        """Of the pixels that were looked at, in no order."""
        return hashlib.sha256("".join(sorted(self.pixels)).encode()).hexdigest()


def _neighbours(gray: npt.NDArray[Any]) -> float:
    """The larger correlation of horizontal and vertical neighbours; 1 where there are none."""
    values = gray.astype(np.float32)
    values -= values.mean()
    power = float((values**2).mean())
    pairs = [(values[:, 1:], values[:, :-1]), (values[1:], values[:-1])]
    return max((float((a * b).mean()) / power for a, b in pairs if a.size and power), default=1.0)
