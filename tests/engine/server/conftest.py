"""The application over ASGI: with a provider whose models are fakes, and with the packaged demo bundles."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="needs pixano-edge[test]")
pytest.importorskip("fastapi", reason="needs pixano-edge[server]")

from pixano_edge.engine.provider import EdgeProvider  # noqa: E402
from pixano_edge.engine.server import ServerSettings, create_app  # noqa: E402
from tests.engine.provider.fakes import FakeOpener, add_bundle, make_provider  # noqa: E402


@pytest.fixture
def opener() -> FakeOpener:
    return FakeOpener()


@pytest.fixture
async def provider(tmp_path: Path, opener: FakeOpener) -> AsyncIterator[EdgeProvider]:
    """Offers ``alpha`` (masks, and ``alpha-video`` tracks) and ``find`` (boxes)."""
    add_bundle(tmp_path, "alpha", tracks=True)
    add_bundle(tmp_path, "find", family="owlv2")
    edge = make_provider(tmp_path, opener, media_roots=[])
    yield edge
    opener.gate.set()
    for held in (*opener.opened, *opener.videos, *opener.detectors):
        held.gate.set()
    await edge.close()


def asgi(app: Any, **options: Any) -> Any:
    """A client of an application without a socket; unforeseen errors are answers, as behind a server."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7463", timeout=60, **options)


@pytest.fixture
async def connect(provider: EdgeProvider) -> AsyncIterator[Callable[..., Any]]:
    """Makes clients of applications over `provider`, by the settings given."""
    clients = []

    def connected(headers: dict[str, str] | None = None, **settings: Any) -> Any:
        client = asgi(create_app(ServerSettings(**settings), provider), headers=headers)
        clients.append(client)
        return client

    yield connected
    for client in clients:
        await client._transport.app.state.server.close()
        await client.aclose()


@pytest.fixture
def client(connect: Callable[..., Any]) -> Any:
    """A client of the application with the default settings."""
    return connect()


@pytest.fixture(scope="session")
def demo_provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeProvider]:
    """The packaged demo bundles, loaded once for all tests that ask."""
    import asyncio

    edge = EdgeProvider(store=tmp_path_factory.mktemp("store"), threads=1, media_roots=[])
    yield edge
    asyncio.run(edge.close())


@pytest.fixture
async def demo(demo_provider: EdgeProvider) -> AsyncIterator[Any]:
    """A client of the application over the demo bundles."""
    client = asgi(create_app(ServerSettings(), demo_provider))
    yield client
    await client._transport.app.state.server.close()
    await client.aclose()
