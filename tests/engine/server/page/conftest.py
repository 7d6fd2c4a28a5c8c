"""A server, its provider and Chromium, shared by the tests of the page in this folder.

No test passes when the page's console shows an error (a violated content policy is one) or when a request goes to
another origin.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pixano_edge.engine.server import ServerSettings, create_app
from tests.support.browser import Watch, chromium, served
from tests.support.page_user import Recorder, User, answer_of


@pytest.fixture(scope="package")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    provider = Recorder(store=tmp_path_factory.mktemp("store"), media_roots=[], threads=1)
    yield provider
    answer_of(provider.close)


@pytest.fixture(scope="package")
def url(provider: Recorder) -> Iterator[str]:
    with served(create_app(ServerSettings(demo=True), provider)) as url:
        yield url


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def watched(browser: Any, url: str) -> Iterator[Any]:
    """Makes tabs; their contexts are closed and what they did is checked afterwards."""
    contexts: list[Any] = []
    watches: list[Watch] = []

    def tab(at: str = url, **options: Any) -> tuple[User, Watch]:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 820}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        watches.append(Watch(page, at))
        return User(page, at), watches[-1]

    yield tab
    for context in contexts:
        context.close()
    for watch in watches:
        watch.check()


@pytest.fixture
def user(watched: Any) -> User:
    return watched()[0]


@pytest.fixture(scope="package")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real photo, wider than high."""
    data = pytest.importorskip("skimage.data", reason="photos come with pixano-edge[benchmarks]")
    path = tmp_path_factory.mktemp("photo") / "chelsea.png"
    Image.fromarray(data.chelsea()).save(path)
    return path
