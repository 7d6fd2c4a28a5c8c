"""The outermost layer: request id, access log, metrics, and the last resort for errors that nobody foresaw."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import HIDDEN, error_response
from .metrics import METHODS, OTHER, Metrics
from .state import CLIENT_CLOSED, ClientGone

log = logging.getLogger("pixano_edge.server")
access = logging.getLogger("pixano_edge.server.access")

_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_PROBES = ("/health", "/ready", "/metrics", "/info")


class ContextMiddleware:
    """Gives every request its id, ``X-Request-ID`` as sent where that is plain text, else a new one.

    Args:
        app: The rest.
        metrics: Counts requests.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"")
        identity = sent.decode() if _ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = identity
        status = 0
        method = scope["method"] if scope["method"] in METHODS else OTHER
        begun = time.perf_counter()

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", identity.encode())]}
            await send(message)

        self._metrics.in_progress.labels(method).inc()
        try:
            await self.app(scope, receive, tagged)
        except (ClientGone, ClientDisconnect):  # the second one: in the middle of its body
            status = CLIENT_CLOSED
        except Exception:
            log.exception("Request failed", extra={"request_id": identity})
            if status:
                raise  # half an answer is out: only closing the connection can tell
            await error_response(500, HIDDEN, identity)(scope, receive, tagged)
        finally:
            self._metrics.in_progress.labels(method).dec()
            self._note(scope, method, status, time.perf_counter() - begun, identity)

    def _note(self, scope: Scope, method: str, status: int, seconds: float, identity: str) -> None:
        route: Any = scope.get("route")
        path = getattr(route, "path", None) or OTHER
        self._metrics.requests.labels(method, path, str(status)).inc()
        self._metrics.duration.labels(method, path).observe(seconds)
        level = logging.DEBUG if scope["path"].endswith(_PROBES) and status < 500 else logging.INFO
        if access.isEnabledFor(level):
            fields = {
                "request_id": identity,
                "method": method,
                "path": scope["path"][:200],
                "status": status,
                "ms": round(seconds * 1e3, 1),
                "client": (scope.get("client") or ("",))[0],
            }
            access.log(level, "request", extra=fields)
