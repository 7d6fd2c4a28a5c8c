"""`EdgeProvider`: the local models behind Pixano's provider interface, in the calling process.

It is its own administrator: models are loaded from bundles on disk, on demand or by `instantiate_model`, each with
a thread of its own, and unloaded by `delete_model`. The coroutines only wait, from any event loop.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BundleError, CancelledError, DeviceError, EdgeError
from .absent import AbsentTasks
from .base import InferenceProvider
from .budget import MemoryBudget, read_devices
from .catalogue import Catalogue, Store
from .detection import detect
from .directory import Directory
from .edge_tracking import TrackingMethods
from .errors import InferenceError, InvalidRequestError, ModelNotFoundError, ProviderNotFoundError, provider_errors
from .families import IMAGES, TASKS, LoadedModel, Opener, facts_of, open_model
from .hardware import read_hardware
from .jobs import JOB_CAP, JOB_TTL, JobStore, MemoryJobStore
from .media import MediaPolicy
from .models import ModelTable, Slot
from .placement import auto_gpus
from .registry import register_provider
from .segmentation import segment
from .server_info import server_info
from .settings import (
    DEFAULT_CACHE_MB,
    DEFAULT_MAX_BYTES,
    DEFAULT_MAX_PIXELS,
    DEFAULT_MAX_VIDEO_BYTES,
    Limit,
    LoadOptions,
    read_limits,
)
from .states import DEPLOYING, RUNNING, ModelState, Observer
from .text import TextService
from .text_types import TextChunk
from .types import (
    ImageMaskGenerationInput,
    ImageMaskGenerationResult,
    ImageZeroShotDetectionInput,
    ImageZeroShotDetectionResult,
    InferenceTask,
    ModelConfig,
    ModelInfo,
    ProviderCapabilities,
    ServerInfo,
    TextImageConditionalGenerationInput,
    TextImageConditionalGenerationResult,
)
from .video import VideoService
from .worker import QUEUE_DEPTH, Deadline, Job, wait_for

T = TypeVar("T")

ACCEPTED_PROVIDERS = ("edge", "pixano-edge")
"""What `instantiate_model` takes as its `provider`."""

_MAX_SIDE = 65_535


@register_provider("edge")
class EdgeProvider(TrackingMethods, AbsentTasks, InferenceProvider):
    """Local inference. Making one does no work; `close` frees what it loaded.

    Args:
        url: Ignored; Pixano passes it to every provider it connects to.
        api_key: Ignored, for the same reason.
        store: Local model store, its folder, or None for the user's own (see `BundleStore`).
        device: Default device of models: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. With several GPUs ``auto`` and
            ``cuda`` take the one with the most free memory.
        backend: Default back end: ``auto``, ``onnxruntime`` or ``tensorrt``.
        precision: Default precision: ``auto``, ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``int4``.
        threads: Threads of one inference; None lets the back end choose.
        cache_mb: Budget of each model's cache in MiB: of embeddings, or of a detector's features.
        verify: Check the hashes of a bundle's files at loading.
        autoload: Offer every bundle of the store and load it on its first request. Without it, only models loaded
            by `instantiate_model` are offered.
        media_roots: Folders whose files requests may name as image. None allows any file that this process can
            read, since the caller runs in it; a server for others passes its own folders, or ``[]`` for none.
        max_image_pixels: Larger images are refused before they are decoded.
        max_image_bytes: Larger encoded images are refused.
        max_video_bytes: Larger video files are refused.
        queue_depth: Requests that may run or wait per model, and clips that it may track in at once; one more gets
            `ModelBusyError` at once.
        memory_limits: Memory that models may take: one limit for every device or a mapping (``cpu``, ``cuda:N``,
            ``cuda``, ``*``) to bytes, a share or text such as ``6GiB`` and ``80%``. None takes the environment's
            ``PIXANO_EDGE_MEMORY``, and without that 80 % of RAM and 90 % of each GPU. What other processes use counts
            too, unless the limit is in bytes. Idle models are unloaded, the least recently used first, when another
            one needs the room; they come back at their next request.
        jobs: Keeps tracking jobs: a file, or the folder of a ``jobs.sqlite``, in which they outlive this process (see
            `SqliteJobStore`), any `JobStore`, or None for memory. Closed with the provider.
        job_ttl: Seconds that a tracking job is kept after its end; None for an hour in memory, a week in a file.
        job_cap: Tracking jobs that are kept; one more drops the oldest ended one, or is refused when all run.
        warm_up: Run a model once after `instantiate_model` and `preload`, before they return, so that its first request
            is no slower than the next ones; not when a request waits for it already.
        opener: Opens bundles; replaced in tests.

    Raises:
        InvalidRequestError: A setting is out of range.
        JobStoreError: The file of jobs is in use, newer, another program's, or cannot be opened.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        store: Store | Path | str | None = None,
        device: str = "auto",
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        cache_mb: float = DEFAULT_CACHE_MB,
        verify: bool = True,
        autoload: bool = True,
        media_roots: Sequence[str | Path] | None = None,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        max_image_bytes: int = DEFAULT_MAX_BYTES,
        max_video_bytes: int = DEFAULT_MAX_VIDEO_BYTES,
        queue_depth: int = QUEUE_DEPTH,
        memory_limits: Limit | str | Mapping[str, Limit | str] | None = None,
        jobs: JobStore | Path | str | None = None,
        job_ttl: float | None = None,
        job_cap: int = JOB_CAP,
        warm_up: bool = True,
        opener: Opener = open_model,
    ) -> None:
        self._options = LoadOptions(
            device,
            backend,
            precision,
            threads,
            cache_mb,
            verify,
            max_image_pixels,
            max_image_bytes,
            max_video_bytes,
            warm_up=warm_up,
        ).check()
        if store is None or isinstance(store, str | Path):
            from ..bundle import BundleStore

            store = BundleStore(store)
        self._catalogue = Catalogue(store)
        # read_hardware is looked up at each call.
        budget = MemoryBudget(read_limits(memory_limits), lambda: read_devices(read_hardware()))
        self._table = ModelTable(opener, queue_depth, budget, auto_gpus)
        self._directory = Directory(self._catalogue, self._table, self._options, autoload)
        self._media = MediaPolicy(media_roots)
        if jobs is None:
            jobs = MemoryJobStore(JOB_TTL if job_ttl is None else job_ttl, job_cap)
        elif isinstance(jobs, str | Path):
            from .jobs_sqlite import SAVED_JOB_TTL, SqliteJobStore

            jobs = SqliteJobStore(jobs, SAVED_JOB_TTL if job_ttl is None else job_ttl, job_cap)
        self._video = VideoService(self._table, self._hold_tracking, self._media, jobs, queue_depth)
        self._text = TextService(self._table, self._hold_text, self._media, queue_depth)
        self._files = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pixano-edge-files")
        self._closed = False

    @property
    def name(self) -> str:
        """``edge``."""
        return "edge"

    @property
    def max_image_side(self) -> int:
        """Side in pixels of the largest square image that is accepted."""
        return min(_MAX_SIDE, math.isqrt(self._options.max_image_pixels))

    async def get_capabilities(self) -> ProviderCapabilities:
        """Tasks of the models that `list_models` offers.

        One request holds one image (with any number of prompts), so `supports_batching` is False.
        """
        tasks = {info.task for info in await self.list_models()}
        return ProviderCapabilities([t for t in InferenceTask if t.value in tasks], max_image_size=self.max_image_side)

    async def list_models(self, task: InferenceTask | str | None = None) -> list[ModelInfo]:
        """Models that requests may name: loaded ones, and with `autoload` the bundles of the store. Loads nothing.

        Args:
            task: Only models of this task; any enum with the same values does.
        """
        with provider_errors():
            infos, _ = await self._in_files(self._directory.offered)
        wanted = None if task is None else str(getattr(task, "value", task))
        return [info for info in infos if wanted in (None, info.task)]

    def model_states(self) -> list[ModelState]:
        """Models in memory or on their way there; an addition of Pixano Edge to the interface. Returns at once."""
        found = []
        for slot in self._table.slots():
            waiting, steps = slot.worker.pending
            model, ready = slot.model, slot.ready.done()
            found.append(
                ModelState(
                    slot.base or slot.name,
                    slot.task,
                    RUNNING if model is not None and ready else DEPLOYING,
                    "" if model is None else model.device,
                    waiting,
                    steps,
                    slot.worker.depth,
                    None if model is None or model.cache is None else model.cache(),
                )
            )
        return found

    def stored(self, name: str) -> Path:
        """Folder of a bundle of the store; an addition of Pixano Edge to the interface. Reads the disk.

        Raises:
            ModelNotFoundError, InvalidRequestError: There is none, or that is no name.
        """
        with provider_errors():
            return self._catalogue.locate(ModelConfig(name, "")).path

    async def preload(self, name: str, timeout: float | None = None) -> None:
        """Loads a model that `list_models` offers and waits for it; an addition of Pixano Edge to the interface.

        Raises:
            ModelNotFoundError: None is offered by that name.
            InferenceError: It does not load, or not in time.
        """
        deadline = Deadline(timeout)
        with provider_errors():
            infos, _ = await self._in_files(self._directory.offered, deadline)
            task = next((info.task for info in infos if info.name == name), IMAGES)
            slot = await self._held(name, InferenceTask(task), deadline, loading=True)
            try:
                await wait_for(slot.ready, deadline, f"Loading model '{name}'")
            finally:
                self._table.let_go(slot, loading=True)

    def observe(self, observer: Observer | None) -> None:
        """Has the time of every stage told from now on; an addition of Pixano Edge to the interface. Stages:
        ``load``, ``warm_up``, ``queue``, ``decode_image``, ``encode`` or ``cached_features``, ``decode_masks``,
        ``pack``, ``detect`` and ``track`` (one prompt or frame)."""
        self._table.observer = observer

    async def get_server_info(self) -> ServerInfo:
        """State of the machine and the models now; see `ServerInfo` for the layout of `gpu_info`."""
        with provider_errors():
            return await self._in_files(self._server_info)

    async def instantiate_model(self, provider: str, config: ModelConfig, timeout: float = 60) -> None:
        """Loads a bundle under the name `config.name`.

        ``config.task`` decides what is loaded and what the name is listed for: with ``image_mask_generation`` the two
        graphs for images, with ``video_mask_generation`` all five, which answer images as well, with
        ``image_zero_shot_detection`` a detector, with ``text_image_conditional_generation`` a model that answers in
        text. A bundle that can track is offered for the other task, too, under a second name: see `Directory`. Loaded
        for images, it is loaded anew with all graphs when the first request to track comes or when this asks for it.

        ``config.path`` is None for the store's bundle of that name, else a bundle folder, a ``.pxe`` file or the
        name of a bundle in the store. ``config.config`` takes device, backend, precision, threads, cache_mb, verify,
        warm_up and context, ``config.processor_config`` takes max_image_pixels, max_image_bytes and max_video_bytes.
        Loading the same again does nothing; while the first load runs, a second one waits for it. A ``.pxe`` file is
        unpacked to the temporary folder and may hold `MAX_UNPACKED_BYTES` (4 GiB); unpack larger ones and give the
        folder.

        Args:
            provider: ``edge`` or ``pixano-edge``.
            config: What to load and how.
            timeout: Seconds. When they are over, or this coroutine is cancelled, the load is aborted: nothing is
                registered, and what was opened is closed as soon as the back end returns.

        Raises:
            ProviderNotFoundError: Another `provider`.
            ModelNotFoundError: No such bundle.
            InvalidRequestError: A hub id or a checkpoint, unknown keys, a damaged bundle, a device that is not
                there, or a name that is taken by a model loaded otherwise.
            TaskNotSupportedError: The bundle does not do ``config.task``.
            InferenceTimeoutError: Not loaded in time.
        """
        if provider not in ACCEPTED_PROVIDERS:
            raise ProviderNotFoundError(
                f"This box has no model provider '{str(provider)[:100]}'.",
                f"Accepted: {', '.join(ACCEPTED_PROVIDERS)}.",
            )
        deadline = Deadline(timeout)
        task = str(getattr(config.task, "value", config.task))
        if task not in TASKS:
            raise InvalidRequestError(f"There is no task '{task[:100]}'.", f"Tasks: {', '.join(TASKS)}.")
        options = self._options.updated(config.config, config.processor_config)
        with provider_errors(invalid=(BundleError, DeviceError)):
            loaded = [slot.name for slot in self._table.slots()]
            source = await self._in_files(lambda: self._catalogue.locate(config, loaded), deadline)
            while True:
                slot, started = self._directory.takes_over(config.name, source, task, options), False
                if slot is None:
                    slot, started = self._table.start(config.name, source, task, options)
                arrived = False
                try:
                    await wait_for(slot.ready, deadline, f"Loading model '{config.name}'")
                    arrived = True
                except CancelledError:
                    if not slot.replaced:
                        raise
                finally:
                    # Whoever started a load and leaves ends it; others only wait for it.
                    if started and not arrived:
                        self._table.retire(slot)
                if arrived:
                    return

    async def delete_model(self, model_name: str) -> None:
        """Unloads a model and stops offering it; its bundle stays on disk.

        New requests get `ModelNotFoundError` at once, also from a store with `autoload`, until `instantiate_model`
        loads the name again. Accepted requests for images finish, tracking fails at its next frame with the reason;
        this returns when they have ended and the memory is free. A model with two names goes under both.

        Raises:
            ModelNotFoundError: No such model, or deleted already.
        """
        with provider_errors():
            names = self._directory.withdraw_loaded(model_name)
            if not names:
                names = await self._in_files(lambda: self._directory.withdraw(model_name))
            for freed in [freed for name in names for freed in self._table.remove(name)]:
                await wait_for(freed, Deadline(None), f"Unloading model '{model_name}'")

    async def image_mask_generation(
        self, input_data: ImageMaskGenerationInput, timeout: float = 60.0
    ) -> ImageMaskGenerationResult:
        """Masks at the image's size for P prompts; ``data`` is an `EdgeMaskGenerationOutput`.

        Args:
            input_data: Any object with the attributes of `ImageMaskGenerationInput`; `mask_input` and
                `return_logits` are read where present (see `EdgeMaskGenerationInput`).
            timeout: Seconds for waiting, loading and computing. A load that this request started goes on, so that
                the next request finds the model.

        Raises:
            InvalidRequestError: The image, a prompt or a tensor is malformed, or not allowed.
            ModelNotFoundError: No such model, or it was unloaded.
            TaskNotSupportedError: The model does another task.
            ModelBusyError: Too many requests wait for the model.
            InferenceTimeoutError: No answer in time; the work stops at its next step and its result is dropped.
        """
        started = time.perf_counter()
        deadline = Deadline(timeout)
        with provider_errors():
            output, model = await self._answered(
                input_data, InferenceTask.MASK_GENERATION, "Segmentation", segment, deadline
            )
        return ImageMaskGenerationResult(
            data=output,
            timestamp=datetime.now(timezone.utc),
            processing_time=time.perf_counter() - started,
            metadata=facts_of(input_data, model),
            id=uuid.uuid4().hex,
        )

    async def image_zero_shot_detection(
        self, input_data: ImageZeroShotDetectionInput, timeout: float = 60.0
    ) -> ImageZeroShotDetectionResult:
        """Boxes of the named classes on one image, best score first.

        Boxes are whole pixels ``[x1, y1, x2, y2]`` within the image; ``classes`` has for each the name as it was asked
        for. What the thresholds mean differs by family: see ``docs/detection.md``. The features of a list of classes
        are kept, so asking for the same ones on the next image costs less.

        Args:
            input_data: Any object with the attributes of `ImageZeroShotDetectionInput`. ``classes`` is a list, or a
                text that is split as `read_classes` says.
            timeout: As for `image_mask_generation`.

        Raises:
            InvalidRequestError: The image, the classes or a threshold is malformed, or not allowed.
            ModelNotFoundError, TaskNotSupportedError, ModelBusyError, InferenceTimeoutError: As
                `image_mask_generation`.
        """
        started = time.perf_counter()
        deadline = Deadline(timeout)
        with provider_errors():
            output, model = await self._answered(
                input_data, InferenceTask.OBJECT_DETECTION, "Detection", detect, deadline
            )
        return ImageZeroShotDetectionResult(
            data=output,
            timestamp=datetime.now(timezone.utc),
            processing_time=time.perf_counter() - started,
            metadata=facts_of(input_data, model),
            id=uuid.uuid4().hex,
        )

    async def detection(self, input_data: Any, timeout: float = 60.0) -> ImageZeroShotDetectionResult:
        """`image_zero_shot_detection` by the name of Pixano 0.8, whose request has the same fields."""
        return await self.image_zero_shot_detection(input_data, timeout)

    async def text_image_conditional_generation(
        self, input_data: TextImageConditionalGenerationInput, timeout: float = 60.0
    ) -> TextImageConditionalGenerationResult:
        """The model's answer to a text, or to chat messages, with any number of images.

        Steps of several answers on one model take turns, and other requests to it go between. What a model knows of a
        prompt's start, its image for example, is kept for the next prompt: see ``reused_tokens`` in the metadata.

        Args:
            input_data: Any object with the attributes of `TextImageConditionalGenerationInput`; those of
                `EdgeTextImageConditionalGenerationInput` are read where present. ``max_new_tokens`` None is 512.
            timeout: Seconds for waiting, loading and computing.

        Raises:
            InvalidRequestError: The prompt, an image or a setting is malformed or not allowed, or prompt and answer do
                not fit the model's context.
            ModelNotFoundError: No such model, or it was unloaded, also while this ran.
            TaskNotSupportedError: The model does another task.
            ModelBusyError: Too many answers of the model are under way or wait.
            InferenceTimeoutError: No answer in time; the work stops within one token.
            InferenceError: The back end failed.
        """
        started = time.perf_counter()
        with provider_errors():
            output, told, model = await self._text.answer(input_data, Deadline(timeout))
        return TextImageConditionalGenerationResult(
            data=output,
            timestamp=datetime.now(timezone.utc),
            processing_time=time.perf_counter() - started,
            metadata={**facts_of(input_data, model), **told},
            id=uuid.uuid4().hex,
        )

    async def vlm(self, input_data: Any, timeout: float = 60.0) -> TextImageConditionalGenerationResult:
        """`text_image_conditional_generation` by the name of Pixano 0.8, whose request has the same fields."""
        return await self.text_image_conditional_generation(input_data, timeout)

    async def stream_text_image_conditional_generation(
        self, input_data: TextImageConditionalGenerationInput, timeout: float | None = None
    ) -> AsyncIterator[TextChunk]:
        """The answer in pieces as they come, the last one with the whole of it; an addition of Pixano Edge.

        Leaving the iterator (``aclose``, or the end of its task) stops the work within one token. Raises as
        `text_image_conditional_generation`, after the pieces that were done.
        """
        with provider_errors():
            async for chunk in self._text.stream(input_data, Deadline(timeout), facts_of):
                yield chunk

    async def close(self) -> None:
        """Unloads every model after its accepted requests, and refuses everything from now on. Tracking fails at its
        next frame, an answer in text at its next token. May be repeated."""
        self._closed = True
        for freed in self._table.close():
            await wait_for(freed, Deadline(None), "Unloading")
        await self._video.close()
        await self._text.close()
        self._files.shutdown(wait=False)

    async def _answered(
        self,
        input_data: Any,
        task: InferenceTask,
        what: str,
        work: Callable[[LoadedModel, Any, MediaPolicy, Job], T],
        deadline: Deadline,
    ) -> tuple[T, LoadedModel]:
        """The answer to an image request, computed by `work` on the model's thread, and which model gave it."""
        while True:
            slot = await self._held(getattr(input_data, "model", None), task, deadline)
            try:
                model = await wait_for(slot.ready, deadline, f"Loading model '{slot.name}'")
                job, future = self._table.submit(slot, lambda m, job: work(m, input_data, self._media, job))
                output = await wait_for(future, deadline, f"{what} with model '{slot.name}'", job)
                return output, model
            except EdgeError as error:
                # Another slot answers where one that tracks, too, has taken over, or where that did not load.
                replaced = slot.replaced and isinstance(error, ModelNotFoundError | CancelledError)
                failed = slot.base is not None and slot.ready.done() and slot.ready.exception() is error
                if not (replaced or failed):
                    raise
            finally:
                self._table.let_go(slot)

    async def _hold_tracking(self, name: Any, deadline: Deadline) -> Slot:
        return await self._held(name, InferenceTask.VIDEO_MASK_GENERATION, deadline)

    async def _hold_text(self, name: Any, deadline: Deadline) -> Slot:
        return await self._held(name, InferenceTask.TEXT_GENERATION, deadline)

    async def _held(self, name: Any, task: InferenceTask, deadline: Deadline, *, loading: bool = False) -> Slot:
        """The slot of a model that does `task`, kept from being unloaded to make room; `ModelTable.let_go` ends it."""
        while True:
            slot = await self._slot(name, task, deadline)
            if self._table.hold(slot, loading=loading):
                return slot

    async def _slot(self, name: Any, task: InferenceTask, deadline: Deadline) -> Slot:
        """The slot of a model that does `task`. Loading starts here with `autoload`, or if it made room for another."""
        if not isinstance(name, str) or not name:
            raise InvalidRequestError("model must be the name of a model.", "list_models has the names.")
        slot = self._directory.loaded(name, task.value)
        if slot is not None:
            return slot
        return await self._in_files(lambda: self._directory.find(name, task.value), deadline)

    def _server_info(self) -> ServerInfo:
        infos, faults = self._directory.offered()
        jobs = self._video.running()
        faults = {**faults, **{f"jobs {i}": text for i, text in enumerate(self._video.warnings)}}
        return server_info(infos, faults, self._table, read_hardware(), not self._closed, jobs)

    async def _in_files(self, work: Callable[[], T], deadline: Deadline | None = None) -> T:
        """Runs what touches files or drivers on a thread of its own."""
        if self._closed:
            raise InferenceError("This provider is closed.", "Make a new one.")
        return await wait_for(self._files.submit(work), deadline or Deadline(None), "Reading the model store")
