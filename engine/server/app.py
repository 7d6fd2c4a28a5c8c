"""`create_app`: the application, from settings and a provider."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from ..libraries import engine_versions
from ..provider import EdgeProvider
from . import legacy_inference, legacy_tasks, page, routes_info, routes_v1
from .auth import OPEN_PATHS, AuthMiddleware, Keys
from .context import ContextMiddleware
from .errors import HANDLERS
from .limits import BodyLimitMiddleware
from .settings import ServerSettings
from .state import Server, make_provider


def create_app(settings: ServerSettings | None = None, provider: EdgeProvider | None = None) -> FastAPI:
    """The application. Loads no model and starts no thread before its first request or its lifespan.

    Args:
        settings: None for the defaults, not for the environment: see `ServerSettings.read`.
        provider: Answers requests, and stays its owner's to close; None makes one from the settings.
    """
    settings = settings or ServerSettings()
    server = Server(settings, provider or make_provider(settings), provider is None)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await server.close()

    app = FastAPI(
        title="Pixano Edge",
        version=engine_versions()["pixano-edge"],
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    app.include_router(routes_info.router(server))
    app.include_router(routes_v1.router(server))
    app.include_router(legacy_tasks.router(server))
    app.include_router(legacy_inference.router(server))
    app.include_router(page.router())
    # The last one added is the outermost.
    app.add_middleware(BodyLimitMiddleware, limit=settings.max_request_body_bytes)
    # The page asks for a key itself, so its files are open.
    open_paths = {*OPEN_PATHS, page.DOCUMENT_PATH}
    app.add_middleware(
        AuthMiddleware, keys=Keys(settings.api_keys), open_paths=open_paths, open_prefixes=(page.PREFIX,)
    )
    app.add_middleware(ContextMiddleware)
    return app
