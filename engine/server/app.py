"""`create_app`: the application, from settings and a provider."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ..provider import EdgeProvider
from . import legacy_inference, legacy_tasks, openapi, page, routes_info, routes_jobs, routes_models, routes_v1
from .auth import OPEN_PATHS, AuthMiddleware, Keys
from .callers import CallerMiddleware
from .context import ContextMiddleware
from .errors import HANDLERS
from .guard import BrowserGuard
from .limits import BodyLimitMiddleware
from .settings import STRONG_KEY, ServerSettings
from .state import Server, make_provider

log = logging.getLogger("pixano_edge.server")


def create_app(settings: ServerSettings | None = None, provider: EdgeProvider | None = None) -> FastAPI:
    """The application. Loads no model and starts no thread before its first request or its lifespan.

    Args:
        settings: None for the defaults, not for the environment: see `ServerSettings.read`.
        provider: Answers requests, and stays its owner's to close; None makes one from the settings.

    Raises:
        EdgeError: The provider cannot be made from the settings.
    """
    settings = settings or ServerSettings()
    server = Server(settings, provider or make_provider(settings), provider is None)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if weak := settings.weak_keys():
            log.warning("%d API key(s) have fewer than %d characters and may be guessed", weak, STRONG_KEY)
        loading = asyncio.ensure_future(server.preload())
        try:
            yield
        finally:
            server.stopping = True
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await server.close()

    app = FastAPI(
        title="Pixano Edge",
        description="Inference for Pixano on this machine.",
        version=openapi.VERSION,
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    for routes in (routes_info, routes_models, routes_v1, routes_jobs, legacy_tasks, legacy_inference):
        app.include_router(routes.router(server))
    app.include_router(page.router())
    openapi.install(app, bool(settings.api_keys))
    # The last one added is the outermost.
    app.add_middleware(BodyLimitMiddleware, limit=settings.max_request_body_bytes, total=settings.max_bodies_bytes)
    app.add_middleware(CallerMiddleware, keyed=bool(settings.api_keys))
    # The page asks for a key itself, so its files are open.
    open_paths = {*OPEN_PATHS, page.DOCUMENT_PATH}
    app.add_middleware(
        AuthMiddleware, keys=Keys(settings.api_keys), open_paths=open_paths, open_prefixes=(page.PREFIX,)
    )
    if settings.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_allow_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("Authorization", "Content-Type", "X-API-Key", "X-Request-ID"),
            expose_headers=("X-Request-ID", "Retry-After"),
        )
    alone = settings.loopback and not settings.api_keys
    app.add_middleware(BrowserGuard, origins=settings.cors_allow_origins, loopback_only=alone)
    app.add_middleware(ContextMiddleware, metrics=server.metrics)
    return app
