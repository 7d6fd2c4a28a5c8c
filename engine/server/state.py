"""`Server`: what the routes of one application share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response

from ..errors import EdgeError
from ..provider import EdgeProvider
from ..provider.callers import caller
from ..provider.errors import ModelNotFoundError
from ..provider.placement import auto_gpus
from ..provider.statuses import status_of
from .answers import PiecesResponse, pieces
from .echoes import Echoes
from .flights import Flights
from .media import Media
from .metrics import Metrics
from .settings import ServerSettings
from .stats import Stats
from .warmup import load_codecs

T = TypeVar("T")

log = logging.getLogger("pixano_edge.server")

LOADS_ON_CPU = 2
"""Models that are loaded at a time at start."""

CLIENT_CLOSED = 499
"""Status in logs and metrics of a request whose client left before the answer; nobody receives it."""


class ClientGone(Exception):
    """The client hung up; its work was cancelled."""


class Server:
    """Settings, provider, threads and counters behind the routes.

    Args:
        settings: As given to `create_app`.
        provider: Answers requests.
        owned: Whether to close it at shutdown.

    Attributes:
        media: Reads the media of requests.
        metrics: For Prometheus; the provider's stages are told to it.
        stats: For people.
        warnings: Faults of the server itself, for ``/v1/info``.
        starting: Models that are being loaded at start.
        stopping: Whether the server is about to end.
    """

    def __init__(self, settings: ServerSettings, provider: EdgeProvider, owned: bool) -> None:
        self.settings = settings
        self.provider = provider
        self.owned = owned
        self.media = Media(settings)
        self.metrics = Metrics()
        self.stats = Stats()
        self.warnings: list[str] = []
        self.starting: set[str] = set(settings.preload)
        self.stopping = False
        self.echoes = Echoes(settings.embedding_handles, settings.echo_mb << 20)
        self.flights = Flights()
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pixano-edge-wire")
        provider.observe(self.metrics.stage)

    async def on_thread(self, work: Callable[..., T], *values: Any) -> T:
        """Runs what would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *values)

    async def once(
        self,
        request: Request,
        digest: bytes | None,
        compute: Callable[[], Coroutine[Any, Any, T]],
        timeout: float | None = None,
        **options: Any,
    ) -> T:
        """What `compute` returns, computed once for equal requests of one caller; see `flights`. Ends when the client
        hangs up.

        Args:
            request: Its body must have been read.
            digest: Of the body, as `bodies` notes it; None computes in any case.
            compute: Without a timeout of its own.
            timeout: Seconds that this request waits.
            options: More of `Flights.join`.

        Raises:
            ClientGone: It hung up.
            InferenceTimeoutError: The time is over.
        """
        key = None if digest is None else (caller(), request.scope["path"], digest)
        return await until_gone(request, self.flights.join(key, compute, timeout, **options))

    async def respond(self, value: Any, status: int = 200) -> Response:
        """A JSON response, written on a thread; `value` may be a function that makes the value there."""

        def written() -> list[bytes]:
            return list(pieces(value() if callable(value) else value))

        return PiecesResponse(await self.on_thread(written), status)

    async def answered(
        self,
        request: Request,
        capability: str,
        compute: Callable[[], Coroutine[Any, Any, T]],
        timeout: float | None = None,
    ) -> T:
        """`once` for an inference request, counted.

        Args:
            request: Read by one of the functions of `bodies`, which note its digest.
            capability: On the wire.
            compute: Returns a result of the provider, or a tuple that begins with one.
            timeout: Seconds that this request waits.
        """
        try:
            found = await self.once(request, getattr(request.state, "body_digest", None), compute, timeout)
        except ClientGone:
            self.metrics.errors.labels(capability, str(CLIENT_CLOSED)).inc()
            raise
        except EdgeError as error:
            self.metrics.errors.labels(capability, str(status_of(error))).inc()
            raise
        result: Any = found[0] if isinstance(found, tuple) else found
        model, seconds = str(result.metadata["model_name"]), float(result.processing_time)
        self.metrics.inference.labels(model, capability).observe(seconds)
        self.stats.answered(model, capability, seconds)
        return found

    async def preload(self) -> None:
        """Loads libraries and the models that the settings name, started in their order; a failure becomes a warning.

        Two at a time on a CPU, where most of a load is the work of one core. On a GPU one by one: what a load takes
        there is measured as memory that is gone after it.
        """
        try:
            await self.on_thread(load_codecs)
            places = asyncio.Semaphore(await self._loads_at_once())
            await asyncio.gather(*(self._preload(name, places) for name in self.settings.preload))
        except Exception as error:
            # Nobody waits for this task: without a word the server would stay without its models.
            self.warnings.append(f"Loading at start ended early: {type(error).__name__}: {error}")
            log.exception("loading at start ended early")
            self.starting.clear()  # as after any other failure: models load when they are asked for

    async def _loads_at_once(self) -> int:
        device = self.settings.device
        gpu = device.startswith("cuda") or (device == "auto" and bool(await self.on_thread(auto_gpus)))
        return 1 if gpu else LOADS_ON_CPU

    async def _preload(self, name: str, places: asyncio.Semaphore) -> None:
        async with places:
            begun = time.perf_counter()
            try:
                await self.provider.preload(name)
                log.info("model loaded", extra={"model": name, "seconds": round(time.perf_counter() - begun, 2)})
            except EdgeError as error:
                self.warnings.append(f"Model '{name}' did not load at start: {error}")
                log.error("model did not load: %s", error, extra={"model": name})
            finally:
                self.starting.discard(name)

    async def check_model(self, name: str) -> None:
        """Raises ModelNotFoundError where no model goes by that name."""
        known = sorted(info.name for info in await self.provider.list_models())
        if name not in known:
            raise ModelNotFoundError(
                f"There is no model '{name[:200]}'.", f"Known: {', '.join(known) or 'none'}. See GET /v1/models."
            )

    def leave(self) -> None:
        """Makes ``ready`` answer 503; everything else goes on."""
        self.stopping = True

    async def close(self) -> None:
        """Closes what this server made."""
        self.stopping = True
        self.provider.observe(None)
        self.flights.close()
        if self.owned:
            await self.provider.close()
        self.media.close()
        self._threads.shutdown(wait=False)


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and cancels it when the client hangs up. The body must have been read.

    Raises:
        ClientGone: It hung up.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, watcher):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_provider(settings: ServerSettings) -> EdgeProvider:
    """The provider that a server with these settings has.

    Raises:
        EdgeError: A setting that the provider refuses, or the file of jobs cannot be used.
    """
    from ..bundle import BundleStore

    store = BundleStore(settings.store)
    return EdgeProvider(
        store=store if settings.demo else WithoutDemo(store),
        device=settings.device,
        backend=settings.backend,
        precision=settings.precision,
        threads=settings.threads,
        cache_mb=settings.cache_mb,
        warm_up=settings.warm_up,
        media_roots=list(settings.media_roots),
        max_image_pixels=settings.media_max_image_pixels,
        max_image_bytes=settings.media_max_image_bytes,
        max_video_bytes=settings.media_max_video_bytes,
        queue_depth=settings.queue_depth,
        jobs=settings.jobs,
    )


class WithoutDemo:
    """A store that does not list the packaged demo bundles.

    Args:
        store: The store with them.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    def list(self) -> Any:
        """Names of the other bundles."""
        from ..bundle.store import DEMO_NAMES

        return [name for name in self._store.list() if name not in DEMO_NAMES]

    def path(self, name: str) -> Path:
        """As the store's own."""
        found: Path = self._store.path(name)
        return found
