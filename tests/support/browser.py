"""Chromium for the tests of the page: finding it, starting it, and what no page may do."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


def no_browser_reason() -> str | None:
    """Why no browser test can run; None where they can."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install 'pixano-edge[test]'"
    return None if find_chromium() else "no Chromium here: apt-get install chromium"


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser. Its event loop belongs to this thread until the end, so nothing else may await here."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Watch:
    """What a page must not do: errors in its console, a request to elsewhere, one that fails unasked."""

    def __init__(self, page: Any, origin: str) -> None:
        self.faults: list[str] = []
        self.allowed: set[str] = set()
        """Parts of console lines that a test provokes, such as ``401``."""
        self._origin = origin
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"console: {message.text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((f"{self._origin}/", "data:", "blob:")):
            self.faults.append(f"request to {request.url}")

    def check(self) -> None:
        """Raises AssertionError for what was seen and not allowed."""
        left = [fault for fault in self.faults if not any(part in fault for part in self.allowed)]
        assert not left, left


@contextmanager
def served(app: Any) -> Iterator[str]:
    """An application on a free port of this machine, in a thread; yields ``http://127.0.0.1:PORT``."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        for _ in range(600):
            if server.started:
                break
            thread.join(0.05)
            assert thread.is_alive(), "the server ended at once"
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"
