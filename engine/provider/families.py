"""Model families the provider can serve: which tasks each does and how its model is opened from a bundle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from ..contracts import grounding_dino, owlv2, qwen2_5_vl, sam2, sam2_video, smolvlm
from ..models.decoder.base import VisionLanguageModel
from ..models.detection.base import Detector
from ..models.sam2.cache import EmbeddingKey
from ..runtime.memory import MemoryUse
from .convert import LogitsMemory
from .errors import TaskNotSupportedError
from .seen import SeenImages
from .settings import LoadOptions
from .types import InferenceTask
from .warmup import Check, warm_detector, warm_masks, warm_text, warm_tracking
from .worker import Job

if TYPE_CHECKING:
    from ..models.sam2.cache import CacheStats

Array = npt.NDArray[Any]


class MaskPredictor(Protocol):
    """The part of `Sam2ImagePredictor` used here; called by one thread at a time."""

    @property
    def constants(self) -> sam2.Sam2Constants: ...

    def encode(self, image: Array) -> Any: ...

    def key(self, digest: bytes) -> EmbeddingKey: ...

    def recall(self, digest: bytes, size: tuple[int, int]) -> Any: ...

    def embedding_from_arrays(self, image_embed: Array, high_res: Any, original_size: Any) -> Any: ...

    def predict(self, image: Any, prompts: Any, *, multimask: bool = True, return_logits: bool = False) -> Any: ...

    def info(self) -> Any: ...

    def close(self) -> None: ...


class Tracker(Protocol):
    """The part of `VideoTracker` used here."""

    @property
    def maps(self) -> int: ...

    def add_prompt(self, object_id: int, frame: int, prompt: Any) -> Any: ...

    def add_mask(self, object_id: int, frame: int, mask: Array) -> Any: ...

    def propagate(self, start: int | None = None, end: int | None = None) -> Iterator[Any]: ...

    def close(self) -> None: ...


class VideoModel(Protocol):
    """The part of `Sam2VideoModel` used here; called by one thread at a time."""

    def track(self, source: Any, *, history: bool = True) -> Tracker: ...

    def close(self) -> None: ...


@dataclass
class LoadedModel:
    """A model in memory.

    Attributes:
        predictor: Answers requests for masks; used on the model's own thread only. None for a detector and for a model
            that answers in text.
        task: What it was loaded for. A model that tracks answers images, too.
        model_class: Name of the class that does the task.
        checkpoint: Where the weights came from.
        device: Name of the device it sits on.
        options: How it was loaded.
        details: More facts for a result's metadata.
        warnings: Fallbacks taken at loading.
        cleanup: Folder to remove when the model is freed.
        memory: Scores of recent answers, for mask inputs that come back.
        seen: Images of recent requests, by their encoded form.
        use: Tells what the model takes now; called on the model's own thread. None where nothing can be told.
        warm: Whether it ran at loading already, so that its activations have their memory.
        shrink: Drops caches that can be computed again, after memory ran out; called on the model's own thread.
        video: Tracks, where it was loaded for that; used on the model's own thread only.
        tracks: Whether its bundle has what tracking needs.
        trackers: Open trackers of `video`, whose memories count as this model's.
        detector: Answers requests for boxes, where it was loaded for that; used on the model's own thread only.
        cache: Counters of its cache of embeddings, from any thread; None where it has none.
        vlm: Answers in text, where it was loaded for that; used on the model's own thread only.
        warm_up: Runs it once, see `warmup`; called on the model's own thread before its first request. None where it
            ran at loading already, or cannot.
        warmed_in: Seconds that its runs before the first request took; None where there were none.
    """

    predictor: MaskPredictor | None
    task: InferenceTask
    model_class: str
    checkpoint: str
    device: str
    options: LoadOptions
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    cleanup: Path | None = None
    memory: LogitsMemory = field(default_factory=LogitsMemory)
    seen: SeenImages = field(default_factory=SeenImages)
    use: Callable[[], MemoryUse] | None = None
    warm: bool = False
    shrink: Callable[[], None] | None = None
    video: VideoModel | None = None
    tracks: bool = False
    trackers: set[Tracker] = field(default_factory=set)
    detector: Detector | None = None
    cache: Callable[[], CacheStats] | None = None
    vlm: VisionLanguageModel | None = None
    warm_up: Callable[[Check], None] | None = None
    warmed_in: float | None = None

    def close(self) -> None:
        """Frees the sessions, their memory and temporary files."""
        model = self.video or self.detector or self.vlm or self.predictor
        assert model is not None
        model.close()
        if self.cleanup is not None:
            shutil.rmtree(self.cleanup, ignore_errors=True)


Opener = Callable[[Path, str, LoadOptions, Job], LoadedModel]
"""Opens the bundle at a path for a task; calls `Job.check` between its steps and frees everything when it raises."""


IMAGES = InferenceTask.MASK_GENERATION.value
VIDEOS = InferenceTask.VIDEO_MASK_GENERATION.value
DETECTION = InferenceTask.OBJECT_DETECTION.value
TEXT = InferenceTask.TEXT_GENERATION.value

FAMILIES: Mapping[str, Mapping[str, str]] = {
    sam2.FAMILY: {IMAGES: "Sam2ImagePredictor", VIDEOS: "Sam2VideoModel"},
    **{family: {DETECTION: "Owlv2Detector"} for family in owlv2.FAMILIES},
    grounding_dino.FAMILY: {DETECTION: "GroundingDinoDetector"},
    smolvlm.FAMILY: {TEXT: "SmolVlmModel"},
    qwen2_5_vl.FAMILY: {TEXT: "Qwen2_5VlModel"},
}
"""Per family the name of the class that does each task, the one first that a bundle is listed with. A bundle may lack
what tracking needs; see `check_task`."""

TEXT_FAMILIES = tuple(family for family, found in FAMILIES.items() if TEXT in found)

MAX_UNPACKED_BYTES = 4 << 30
"""Most that a ``.pxe`` file may unpack to when a request names it; the largest SAM 2.1 has 1.4 GB in two precisions."""

TASKS = tuple(t.value for t in InferenceTask)


def does(task: str, asked: str) -> bool:
    """Whether a model loaded for `task` does `asked`: what tracks holds the image predictor, too."""
    return task == asked or (task == VIDEOS and asked == IMAGES)


def tracks(family: str, constants: Mapping[str, Any]) -> bool:
    """Whether a bundle has the graphs of tracking.

    Args:
        family: Of the bundle.
        constants: Of its manifest.

    Raises:
        ContractError: It says so, and its constants do not fit.
    """
    return family == sam2.FAMILY and sam2_video.constants_of(constants) is not None


def tasks(family: str, tracking: bool) -> list[str]:
    """What a bundle of a family does; `tracking` is what `tracks` says of it."""
    return [task for task in FAMILIES.get(family, {}) if task != VIDEOS or tracking]


def check_task(family: str, task: str, name: str, tracking: bool = False) -> str:
    """Name of the class that does `task` with a bundle.

    Args:
        family: Of the bundle.
        task: What is asked for.
        name: Of the bundle, for messages.
        tracking: What `tracks` says of it.

    Raises:
        TaskNotSupportedError: The family is unknown here or does another task, or the bundle has no graphs for it.
    """
    found = FAMILIES.get(family)
    if found is None:
        raise TaskNotSupportedError(
            f"Bundle '{name}' is of the family '{family}', which this version does not run.",
            f"Known families: {', '.join(FAMILIES)}. Update pixano-edge.",
        )
    can = tasks(family, tracking)
    if task in can:
        return found[task]
    action = f"Use task '{can[0]}'."
    if task == VIDEOS and task in found:
        action = f"Export its checkpoint again with 'pixano-edge export', which adds tracking, or use task '{can[0]}'."
    raise TaskNotSupportedError(f"Bundle '{name}' ({family}) does {' and '.join(can)}, not {task}.", action)


def facts_of(input_data: Any, model: LoadedModel) -> dict[str, Any]:
    """What the metadata of an answer tell of the request and of the model that gave it."""
    return {
        "model_name": input_data.model,
        "model_class": model.model_class,
        "device": model.device,
        **model.details,
    }


def open_model(path: Path, task: str, options: LoadOptions, job: Job) -> LoadedModel:
    """The `Opener` for real bundles: a folder, or a ``.pxe`` file that is unpacked to a temporary folder.

    Raises:
        BundleError: Damaged, or a ``.pxe`` of more than `MAX_UNPACKED_BYTES`.
    """
    from ..bundle import Bundle, unpack

    temporary: Path | None = None
    done = False
    try:
        if path.is_file():
            temporary = Path(tempfile.mkdtemp(prefix="pixano-edge-"))
            # unpack verifies every hash, so the bundle is not hashed a second time below.
            unpacked = unpack(path, temporary / "bundle", max_bytes=MAX_UNPACKED_BYTES)
            bundle = Bundle.open(unpacked, verify=False)
        else:
            bundle = Bundle.open(path, verify=options.verify)
        job.check()
        manifest = bundle.manifest
        tracking = tracks(manifest.family, manifest.constants)
        kind = check_task(manifest.family, task, manifest.name, tracking)
        loaded = _OPENERS[task](bundle, kind, options, temporary, job)
        loaded.tracks = tracking
        done = True
        return loaded
    finally:
        if temporary is not None and not done:
            shutil.rmtree(temporary, ignore_errors=True)


def _open_images(bundle: Any, kind: str, options: LoadOptions, cleanup: Path | None, job: Job) -> LoadedModel:
    from ..models.sam2.cache import EmbeddingCache
    from ..models.sam2.predictor import Sam2ImagePredictor

    predictor = Sam2ImagePredictor.open(
        bundle,
        device=options.device,
        backend=options.backend,
        precision=options.precision,
        threads=options.threads,
        cache=EmbeddingCache(int(options.cache_mb * (1 << 20))),
        check=job.check,
    )
    loaded = _loaded(bundle, kind, options, cleanup, predictor.info())
    loaded.predictor, loaded.shrink, loaded.use = predictor, predictor.shrink, predictor.memory
    loaded.cache = predictor.cache.stats
    return _to_warm(loaded, partial(warm_masks, predictor))


def _open_video(bundle: Any, kind: str, options: LoadOptions, cleanup: Path | None, job: Job) -> LoadedModel:
    from ..models.sam2.cache import EmbeddingCache
    from ..models.sam2_video.model import Sam2VideoModel
    from .video_needs import map_bytes

    video = Sam2VideoModel.open(
        bundle,
        options.device,
        options.backend,
        options.precision,
        threads=options.threads,
        cache=EmbeddingCache(int(options.cache_mb * (1 << 20))),
        check=job.check,
    )
    loaded = _loaded(bundle, kind, options, cleanup, video.info())
    loaded.task = InferenceTask.VIDEO_MASK_GENERATION
    loaded.predictor, loaded.shrink, loaded.video = video.predictor, video.predictor.shrink, video
    loaded.cache = video.predictor.cache.stats
    one = map_bytes(video.predictor.constants, video.video)

    def use() -> MemoryUse:
        maps = sum(tracker.maps for tracker in loaded.trackers)
        return video.memory() + MemoryUse(caches=maps * one)

    loaded.use = use
    return _to_warm(loaded, partial(warm_tracking, video))


def _open_detector(bundle: Any, kind: str, options: LoadOptions, cleanup: Path | None, job: Job) -> LoadedModel:
    from ..models.detection.opening import open_detector

    detector = open_detector(
        bundle,
        device=options.device,
        backend=options.backend,
        precision=options.precision,
        threads=options.threads,
        check=job.check,
        cache_bytes=int(options.cache_mb * (1 << 20)),
    )
    loaded = _loaded(bundle, kind, options, cleanup, detector.info())
    loaded.task = InferenceTask.OBJECT_DETECTION
    loaded.detector, loaded.shrink, loaded.use = detector, detector.shrink, detector.memory
    return _to_warm(loaded, partial(warm_detector, detector))


def _open_text(bundle: Any, kind: str, options: LoadOptions, cleanup: Path | None, job: Job) -> LoadedModel:
    from ..models.decoder.opening import open_vlm

    vlm = open_vlm(
        bundle,
        device=options.device,
        backend=options.backend,
        precision=options.precision,
        threads=options.threads,
        check=job.check,
        cache_bytes=int(options.cache_mb * (1 << 20)),
        context=options.context,
    )
    loaded = _loaded(bundle, kind, options, cleanup, vlm.info())
    loaded.task = InferenceTask.TEXT_GENERATION
    loaded.vlm, loaded.shrink, loaded.use = vlm, vlm.shrink, vlm.memory
    return _to_warm(loaded, partial(warm_text, vlm))


_OPENERS: Mapping[str, Callable[[Any, str, LoadOptions, Path | None, Job], LoadedModel]] = {
    IMAGES: _open_images,
    VIDEOS: _open_video,
    DETECTION: _open_detector,
    TEXT: _open_text,
}


def _to_warm(loaded: LoadedModel, run: Callable[[Check], None]) -> LoadedModel:
    """The model, which `run` warms up unless it did that itself."""
    if not loaded.warm:
        loaded.warm_up = run
    return loaded


def _loaded(bundle: Any, kind: str, options: LoadOptions, cleanup: Path | None, info: Mapping[str, Any]) -> LoadedModel:
    warmed = info.get("warm_up")
    return LoadedModel(
        predictor=None,
        task=InferenceTask.MASK_GENERATION,
        model_class=kind,
        checkpoint=bundle.manifest.source.checkpoint,
        device=info["device"],
        options=options,
        details={key: info[key] for key in ("bundle", "architecture", "precision", "backend")},
        warnings=tuple(info["warnings"]),
        cleanup=cleanup,
        warm=bool(warmed),
        warmed_in=warmed["seconds"] if warmed else None,
    )
