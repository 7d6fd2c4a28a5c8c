"""Model families the provider can serve: which task each does and how its predictor is opened from a bundle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from ..contracts import sam2
from ..runtime.memory import MemoryUse
from .convert import LogitsMemory
from .errors import TaskNotSupportedError
from .settings import LoadOptions
from .types import InferenceTask
from .worker import Job

Array = npt.NDArray[Any]


class MaskPredictor(Protocol):
    """The part of `Sam2ImagePredictor` used here; called by one thread at a time."""

    @property
    def constants(self) -> sam2.Sam2Constants: ...

    def encode(self, image: Array) -> Any: ...

    def embedding_from_arrays(self, image_embed: Array, high_res: Any, original_size: Any) -> Any: ...

    def predict(self, image: Any, prompts: Any, *, multimask: bool = True, return_logits: bool = False) -> Any: ...

    def info(self) -> Any: ...

    def close(self) -> None: ...


@dataclass
class LoadedModel:
    """A model in memory.

    Attributes:
        predictor: Answers requests; used on the model's own thread only.
        task: What it does.
        model_class: Name of the predictor's class.
        checkpoint: Where the weights came from.
        device: Name of the device it sits on.
        options: How it was loaded.
        details: More facts for a result's metadata.
        warnings: Fallbacks taken at loading.
        cleanup: Folder to remove when the model is freed.
        memory: Scores of recent answers, for mask inputs that come back.
        use: Tells what the model takes now; called on the model's own thread. None where nothing can be told.
        warm: Whether it ran at loading already, so that its activations have their memory.
        shrink: Drops caches that can be computed again, after memory ran out; called on the model's own thread.
    """

    predictor: MaskPredictor
    task: InferenceTask
    model_class: str
    checkpoint: str
    device: str
    options: LoadOptions
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    cleanup: Path | None = None
    memory: LogitsMemory = field(default_factory=LogitsMemory)
    use: Callable[[], MemoryUse] | None = None
    warm: bool = False
    shrink: Callable[[], None] | None = None

    def close(self) -> None:
        """Frees the sessions, their memory and temporary files."""
        self.predictor.close()
        if self.cleanup is not None:
            shutil.rmtree(self.cleanup, ignore_errors=True)


Opener = Callable[[Path, str, LoadOptions, Job], LoadedModel]
"""Opens the bundle at a path for a task; calls `Job.check` between its steps and frees everything when it raises."""


@dataclass(frozen=True)
class Family:
    """One model family: its task and its predictor's class name."""

    task: InferenceTask
    model_class: str


FAMILIES: Mapping[str, Family] = {sam2.FAMILY: Family(InferenceTask.MASK_GENERATION, "Sam2ImagePredictor")}

MAX_UNPACKED_BYTES = 4 << 30
"""Most that a ``.pxe`` file may unpack to when a request names it; the largest SAM 2.1 has 1.4 GB in two precisions."""

TASKS = tuple(t.value for t in InferenceTask)


def check_task(family: str, task: str, name: str) -> Family:
    """The family's entry when it does `task`.

    Raises:
        TaskNotSupportedError: The family is unknown here or does another task.
    """
    found = FAMILIES.get(family)
    if found is None:
        raise TaskNotSupportedError(
            f"Bundle '{name}' is of the family '{family}', which this version does not run.",
            f"Known families: {', '.join(FAMILIES)}. Update pixano-edge.",
        )
    if found.task.value != task:
        raise TaskNotSupportedError(
            f"Bundle '{name}' ({family}) does {found.task.value}, not {task}.", f"Use task '{found.task.value}'."
        )
    return found


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
        family = check_task(bundle.manifest.family, task, bundle.manifest.name)
        loaded = _open_sam2(bundle, family, options, temporary, job)
        done = True
        return loaded
    finally:
        if temporary is not None and not done:
            shutil.rmtree(temporary, ignore_errors=True)


def _open_sam2(bundle: Any, family: Family, options: LoadOptions, cleanup: Path | None, job: Job) -> LoadedModel:
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
    info = predictor.info()
    return LoadedModel(
        predictor=predictor,
        task=family.task,
        model_class=family.model_class,
        checkpoint=bundle.manifest.source.checkpoint,
        device=info["device"],
        options=options,
        details={key: info[key] for key in ("bundle", "architecture", "precision", "backend")},
        warnings=tuple(info["warnings"]),
        cleanup=cleanup,
        use=predictor.memory,
        warm=bool(info.get("warm_up")),
        shrink=predictor.cache.clear,
    )
