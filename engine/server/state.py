"""`Server`: what the routes of one application share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response

from ..provider import EdgeProvider
from .answers import PiecesResponse, pieces
from .settings import ServerSettings

T = TypeVar("T")

log = logging.getLogger("pixano_edge.server")

CLIENT_CLOSED = 499
"""Status in logs and metrics of a request whose client left before the answer; nobody receives it."""


class ClientGone(Exception):
    """The client hung up; its work was cancelled."""


class Server:
    """Settings, provider and threads behind the routes.

    Args:
        settings: As given to `create_app`.
        provider: Answers requests.
        owned: Whether to close it at shutdown.
    """

    def __init__(self, settings: ServerSettings, provider: EdgeProvider, owned: bool) -> None:
        self.settings = settings
        self.provider = provider
        self.owned = owned
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pixano-edge-wire")

    async def on_thread(self, work: Callable[..., T], *values: Any) -> T:
        """Runs what would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *values)

    async def respond(self, value: Any, status: int = 200) -> Response:
        """A JSON response, written on a thread."""
        return PiecesResponse(await self.on_thread(lambda: list(pieces(value))), status)

    async def close(self) -> None:
        """Closes what this server made."""
        if self.owned:
            await self.provider.close()
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
    """The provider that a server with these settings has."""
    from ..bundle import BundleStore

    store = BundleStore(settings.store)
    return EdgeProvider(
        store=store if settings.demo else WithoutDemo(store),
        device=settings.device,
        backend=settings.backend,
        precision=settings.precision,
        threads=settings.threads,
        cache_mb=settings.cache_mb,
        media_roots=list(settings.media_roots),
        max_image_pixels=settings.media_max_image_pixels,
        max_image_bytes=settings.media_max_image_bytes,
        max_video_bytes=settings.media_max_video_bytes,
        queue_depth=settings.queue_depth,
    )


class WithoutDemo:
    """A store that does not list the packaged demo bundles."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def list(self) -> Any:
        from ..bundle.store import DEMO_NAMES

        return [name for name in self._store.list() if name not in DEMO_NAMES]

    def path(self, name: str) -> Any:
        return self._store.path(name)
