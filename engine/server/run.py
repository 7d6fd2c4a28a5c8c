"""Runs the application with uvicorn: binds first, says where, and drains at SIGTERM."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import uvicorn

from ..errors import EdgeError
from .app import create_app
from .logs import configure
from .settings import ServerSettings

log = logging.getLogger("pixano_edge.server")

KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that none sends a request into a connection being closed."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        EdgeError: The address is not this machine's, taken, or not allowed.
    """
    name = host.strip("[]")
    try:
        family = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((name, port), family=family, backlog=2048)
    except OSError as error:
        raise EdgeError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}.",
            "Choose another --port (0 takes a free one) or --host, or stop what listens there.",
        ) from error
    listening.set_inheritable(False)
    return listening


def url_of(listening: socket.socket) -> str:
    """Where clients reach a socket: ``http://host:port``."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(settings: ServerSettings, announce: Callable[[str], None] = lambda url: None) -> None:
    """Serves until SIGINT or SIGTERM: no new connection then, requests under way have `shutdown_timeout_s` to end,
    models are unloaded, and jobs that run are marked by their store.

    Args:
        settings: What to serve.
        announce: Gets the address once it is bound; requests that come from then on wait until the start is done.

    Raises:
        EdgeError: The address is refused or taken, or the provider cannot be made.
    """
    settings.check_bind()
    configure(settings.log_level, settings.log_json)
    listening = bind(settings.host, settings.port)
    try:
        app = create_app(settings)
        announce(url_of(listening))
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
        )
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        listening.close()
