"""A server on a free port of this machine with the packaged demo bundles, and what to send to it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients import material

uvicorn = pytest.importorskip("uvicorn", reason="needs pixano-edge[server]")


VLM = "tiny-vlm"


@dataclass(frozen=True)
class Live:
    """A running server: its address, and the provider behind it, to compare with."""

    url: str
    provider: Any


def serve(app: Any) -> Iterator[str]:
    """Runs an application on a free port until the generator is closed."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise AssertionError("the server did not start")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def live(tiny_vlm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The server of all tests here: the packaged demo bundles, and a small language model that knows nothing."""
    from pixano_edge.engine.server import ServerSettings, create_app

    store = tmp_path_factory.mktemp("store")
    shutil.copytree(tiny_vlm_bundle, store / VLM)
    app = create_app(ServerSettings(demo=True, store=store, threads=1))
    for url in serve(app):
        yield Live(url, app.state.server.provider)


@pytest.fixture(scope="session")
def photo() -> material.Photo:
    return material.read_photo()


@pytest.fixture(scope="session")
def clip() -> material.Clip:
    return material.read_clip()


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[2]
