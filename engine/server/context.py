"""The outermost layer: request id, the access log, and the last resort for errors that nobody foresaw."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import HIDDEN, error_response
from .state import CLIENT_CLOSED, ClientGone

log = logging.getLogger("pixano_edge.server")
access = logging.getLogger("pixano_edge.server.access")

_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class ContextMiddleware:
    """Gives every request its id, ``X-Request-ID`` as sent where that is plain text, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"")
        identity = sent.decode() if _ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = identity
        status = 0
        begun = time.perf_counter()

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", identity.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, tagged)
        except ClientGone:
            status = CLIENT_CLOSED
        except Exception:
            log.exception("Request failed", extra={"request_id": identity})
            if status:
                raise  # half an answer is out: only closing the connection can tell
            await error_response(500, HIDDEN, identity)(scope, receive, tagged)
        finally:
            seconds = time.perf_counter() - begun
            access.info(
                "%s %s %d %.1f ms",
                scope["method"],
                scope["path"],
                status,
                seconds * 1e3,
                extra={"request_id": identity},
            )
