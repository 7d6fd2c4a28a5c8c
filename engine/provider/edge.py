"""`EdgeProvider`: the local models behind Pixano's provider interface, in the calling process.

It is its own administrator: models are loaded from bundles on disk, on demand or by `instantiate_model`, each with
a thread of its own, and unloaded by `delete_model`. The coroutines only wait, from any event loop.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from ..bundle import BundleStore
from ..errors import BundleError, ContractError, DeviceError, EdgeError
from .absent import AbsentTasks
from .base import InferenceProvider
from .budget import MemoryBudget, read_devices
from .catalogue import Catalogue, Entry, FilesState, Source, Store, files_state, refreshed, unknown_model
from .errors import (
    InferenceError,
    InvalidRequestError,
    ProviderNotFoundError,
    TaskNotSupportedError,
    provider_errors,
)
from .families import TASKS, Opener, check_task, open_model
from .hardware import read_hardware
from .media import MediaPolicy
from .models import ModelTable, Slot, Unloaded
from .placement import auto_gpus
from .registry import register_provider
from .segmentation import segment
from .server_info import offered, server_info
from .settings import DEFAULT_CACHE_MB, DEFAULT_MAX_BYTES, DEFAULT_MAX_PIXELS, Limit, LoadOptions, read_limits
from .types import (
    ImageMaskGenerationInput,
    ImageMaskGenerationResult,
    InferenceTask,
    ModelConfig,
    ModelInfo,
    ProviderCapabilities,
    ServerInfo,
)
from .worker import QUEUE_DEPTH, Deadline, wait_for

T = TypeVar("T")

LoadArguments = tuple[str, Source, str, LoadOptions]
"""Of `ModelTable.start`."""

ACCEPTED_PROVIDERS = ("edge", "pixano-edge")
"""What `instantiate_model` takes as its `provider`."""

_MAX_SIDE = 65_535


@register_provider("edge")
class EdgeProvider(AbsentTasks, InferenceProvider):
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
        cache_mb: Budget of each model's embedding cache in MiB.
        verify: Check the hashes of a bundle's files at loading.
        autoload: Offer every bundle of the store and load it on its first request. Without it, only models loaded
            by `instantiate_model` are offered.
        media_roots: Folders whose files requests may name as image. None allows any file that this process can
            read, since the caller runs in it; a server for others passes its own folders, or ``[]`` for none.
        max_image_pixels: Larger images are refused before they are decoded.
        max_image_bytes: Larger encoded images are refused.
        queue_depth: Requests that may run or wait per model; one more gets `ModelBusyError` at once.
        memory_limits: Memory that models may take: one limit for every device or a mapping (``cpu``, ``cuda:N``,
            ``cuda``, ``*``) to bytes, a share or text such as ``6GiB`` and ``80%``. None takes the environment's
            ``PIXANO_EDGE_MEMORY``, and without that 80 % of RAM and 90 % of each GPU. What other processes use counts
            too, unless the limit is in bytes. Idle models are unloaded, the least recently used first, when another
            one needs the room; they come back at their next request.
        opener: Opens bundles; replaced in tests.

    Raises:
        InvalidRequestError: A setting is out of range.
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
        queue_depth: int = QUEUE_DEPTH,
        memory_limits: Limit | str | Mapping[str, Limit | str] | None = None,
        opener: Opener = open_model,
    ) -> None:
        self._options = LoadOptions(
            device, backend, precision, threads, cache_mb, verify, max_image_pixels, max_image_bytes
        ).check()
        self._catalogue = Catalogue(BundleStore(store) if store is None or isinstance(store, str | Path) else store)
        # read_hardware is looked up at each call.
        budget = MemoryBudget(read_limits(memory_limits), lambda: read_devices(read_hardware()))
        self._table = ModelTable(opener, queue_depth, budget, auto_gpus)
        self._media = MediaPolicy(media_roots)
        self._autoload = autoload
        # Names that delete_model took away: their bundles stay in the store but no request loads them again. Only
        # instantiate_model does, and what it loaded is found in the table.
        self._withdrawn: set[str] = set()
        # Bundles that failed to load by themselves, and the state of their files then: hashing gigabytes again for
        # every request would only fail again.
        self._broken: dict[str, tuple[FilesState, EdgeError]] = {}
        self._files = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pixano-edge-files")
        self._closed = False

    @property
    def name(self) -> str:
        """``edge``."""
        return "edge"

    async def get_capabilities(self) -> ProviderCapabilities:
        """Tasks of the models that `list_models` offers.

        One request holds one image (with any number of prompts), so `supports_batching` is False.
        """
        tasks = {info.task for info in await self.list_models()}
        side = min(_MAX_SIDE, math.isqrt(self._options.max_image_pixels))
        return ProviderCapabilities([t for t in InferenceTask if t.value in tasks], max_image_size=side)

    async def list_models(self, task: InferenceTask | str | None = None) -> list[ModelInfo]:
        """Models that requests may name: loaded ones, and with `autoload` the bundles of the store. Loads nothing.

        Args:
            task: Only models of this task; any enum with the same values does.
        """
        with provider_errors():
            infos, _ = await self._in_files(self._offered)
        wanted = None if task is None else str(getattr(task, "value", task))
        return [info for info in infos if wanted in (None, info.task)]

    async def get_server_info(self) -> ServerInfo:
        """State of the machine and the models now; see `ServerInfo` for the layout of `gpu_info`."""
        with provider_errors():
            return await self._in_files(self._server_info)

    async def instantiate_model(self, provider: str, config: ModelConfig, timeout: float = 60) -> None:
        """Loads a bundle under the name `config.name`.

        ``config.path`` is None for the store's bundle of that name, else a bundle folder, a ``.pxe`` file or the
        name of a bundle in the store. ``config.config`` takes device, backend, precision, threads, cache_mb and
        verify, ``config.processor_config`` takes max_image_pixels and max_image_bytes. Loading the same again does
        nothing; while the first load runs, a second one waits for it. A ``.pxe`` file is unpacked to the temporary
        folder and may hold `MAX_UNPACKED_BYTES` (4 GiB); unpack larger ones and give the folder.

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
            slot, started = self._table.start(config.name, source, task, options)
            arrived = False
            try:
                await wait_for(slot.ready, deadline, f"Loading model '{config.name}'")
                arrived = True
            finally:
                # Whoever started a load and leaves ends it; others only wait for it.
                if started and not arrived:
                    self._table.retire(slot)

    async def delete_model(self, model_name: str) -> None:
        """Unloads a model and stops offering it; its bundle stays on disk.

        New requests get `ModelNotFoundError` at once, also from a store with `autoload`, until `instantiate_model`
        loads the name again. Accepted requests finish; this returns when they have and the memory is free.

        Raises:
            ModelNotFoundError: No such model, or deleted already.
        """
        slot = self._table.get(model_name) if isinstance(model_name, str) else None
        if slot is None:
            with provider_errors():
                infos, _ = await self._in_files(self._offered)
            if model_name not in (info.name for info in infos):
                raise unknown_model(model_name, (info.name for info in infos))
        self._withdrawn.add(model_name)
        with provider_errors():
            for freed in self._table.remove(model_name):
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
            slot = await self._held(getattr(input_data, "model", None), InferenceTask.MASK_GENERATION, deadline)
            try:
                model = await wait_for(slot.ready, deadline, f"Loading model '{slot.name}'")
                job, future = self._table.submit(slot, lambda m, job: segment(m, input_data, self._media, job))
                output = await wait_for(future, deadline, f"Segmentation with model '{slot.name}'", job)
            finally:
                self._table.let_go(slot)
        return ImageMaskGenerationResult(
            data=output,
            timestamp=datetime.now(timezone.utc),
            processing_time=time.perf_counter() - started,
            metadata={
                "model_name": slot.name,
                "model_class": model.model_class,
                "device": model.device,
                **model.details,
            },
            id=uuid.uuid4().hex,
        )

    async def close(self) -> None:
        """Unloads every model after its accepted requests, and refuses everything from now on. May be repeated."""
        self._closed = True
        for freed in self._table.close():
            await wait_for(freed, Deadline(None), "Unloading")
        self._files.shutdown(wait=False)

    async def _held(self, name: Any, task: InferenceTask, deadline: Deadline) -> Slot:
        """The slot of a model that does `task`, kept from being unloaded to make room; `ModelTable.let_go` ends it."""
        while True:
            slot = await self._slot(name, task, deadline)
            if self._table.hold(slot):
                return slot

    async def _slot(self, name: Any, task: InferenceTask, deadline: Deadline) -> Slot:
        """The slot of a model that does `task`. Loading starts here with `autoload`, or if it made room for another."""
        if not isinstance(name, str) or not name:
            raise InvalidRequestError("model must be the name of a model.", "list_models has the names.")
        slot = self._table.get(name)
        if slot is None:
            slot = await self._autoloaded(name, task, deadline)
        _check_task(name, slot.task, task)
        return slot

    async def _autoloaded(self, name: str, task: InferenceTask, deadline: Deadline) -> Slot:
        entries, faults, state, back = await self._in_files(lambda: self._look_up(name), deadline)
        held = self._table.get(name)
        if held is not None:
            return held
        if back is not None:
            _check_task(name, back[2], task)
            return self._table.start(*back)[0]
        entry = entries.get(name)
        if name in self._withdrawn or not self._autoload or (entry is None and name not in faults):
            known = {slot.name for slot in self._table.slots()}
            if self._autoload:
                known |= entries.keys() - self._withdrawn
            raise unknown_model(name, known)
        if entry is None:
            raise InferenceError(faults[name], "Check it with 'pixano-edge bundle inspect'.")
        check_task(entry.family, task.value, name)
        failed = self._broken.get(name)
        if failed is not None and failed[0] == state:
            raise InferenceError(failed[1].message, f"{failed[1].action} It is tried again when its files change.")
        slot, started = self._table.start(name, entry.source, task.value, self._options)
        if started:
            slot.ready.add_done_callback(lambda done: self._note_failure(name, state, done.exception()))
        return slot

    def _look_up(self, name: str) -> tuple[dict[str, Entry], dict[str, str], FilesState, LoadArguments | None]:
        """Bundles and faults of the store, the state of this one's files, and how to load a model that made room."""
        entries, faults = self._catalogue.scan()
        gone = next((u for u in self._table.unloaded() if u.name == name), None)
        entry = entries.get(name)
        state = files_state(entry.source.path) if entry is not None else ()
        usual = self._autoload and entry is not None and name not in self._withdrawn
        if gone is None or (usual and entry is not None and self._is_usual(gone, entry)):
            return entries, faults, state, None
        return entries, faults, state, (name, refreshed(gone.source), gone.task, gone.options)

    def _is_usual(self, gone: Unloaded, entry: Entry) -> bool:
        """Whether an unloaded model is what a first request would load from the store."""
        return (gone.source.path, gone.options) == (entry.source.path, self._options)

    def _note_failure(self, name: str, state: FilesState, error: BaseException | None) -> None:
        # What the system refused (rights, open files) may work the next time.
        if isinstance(error, BundleError | ContractError) and not isinstance(error.__cause__, OSError):
            self._broken[name] = (state, error)
        elif error is None:
            self._broken.pop(name, None)

    def _offered(self) -> tuple[list[ModelInfo], dict[str, str]]:
        """Models that requests may name, by name, and the store's faults."""
        entries, faults = self._catalogue.scan()
        stored = [e for e in entries.values() if self._autoload and e.name not in self._withdrawn]
        return offered(stored, self._table), faults

    def _server_info(self) -> ServerInfo:
        infos, faults = self._offered()
        return server_info(infos, faults, self._table, read_hardware(), not self._closed)

    async def _in_files(self, work: Callable[[], T], deadline: Deadline | None = None) -> T:
        """Runs what touches files or drivers on a thread of its own."""
        if self._closed:
            raise InferenceError("This provider is closed.", "Make a new one.")
        return await wait_for(self._files.submit(work), deadline or Deadline(None), "Reading the model store")


def _check_task(name: str, does: str, asked: InferenceTask) -> None:
    if does != asked.value:
        raise TaskNotSupportedError(f"Model '{name}' does {does}, not {asked.value}.", "Name another model.")
