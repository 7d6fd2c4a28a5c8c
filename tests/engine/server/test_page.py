"""The page's files and the routes that serve them; what it does in a browser is in the folder `page`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from pixano_edge.engine.server import page as page_module
from pixano_edge.engine.server.page import CONTENT_SECURITY_POLICY, Page, read_page, router
from tests.conftest import ROOT

FOLDER = ROOT / "engine" / "server" / "page_files"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
}


@pytest.fixture(scope="module")
def page() -> Page:
    return read_page()


@pytest.fixture(scope="module")
def client(page: Page) -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(router(page))
    with TestClient(app) as client:
        yield client


def test_the_document_names_every_module_and_nothing_else(page: Page, client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "{{" not in answer.text
    named = set(re.findall(r'(?:href|src)="([^"#]+)"', answer.text))
    modules = {f"page/{page.digest}/{path.name}" for path in FOLDER.glob("*.js")}
    assert modules <= named
    for address in named:
        assert client.get(f"/{address}").status_code == 200, address


def test_types_are_exact(page: Page, client: TestClient) -> None:
    assert {"main.js", "page.css", "icon.svg", "demo/demo.json", "demo/scene-1.png"} <= set(page.assets)
    for name in page.assets:
        answer = client.get(f"/page/{page.digest}/{name}")
        assert answer.headers["content-type"] == TYPES[Path(name).suffix], name
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_caching_by_content(page: Page, client: TestClient) -> None:
    document = client.get("/")
    assert document.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"If-None-Match": document.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    weak = client.get("/", headers={"If-None-Match": f'"other", W/{document.headers["etag"]}'})
    assert weak.status_code == 304
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200
    script = client.get(f"/page/{page.digest}/main.js")
    assert script.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert client.get("/page/0123456789abcdef/main.js").status_code == 404


def test_another_content_has_another_address(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    names = page_module._names
    monkeypatch.setattr(page_module, "_names", lambda *listings: names(*listings) + b" ")
    other = read_page()
    assert other.digest != page.digest
    assert other.digest.encode() in other.document.content


def test_policy_allows_this_origin_alone(client: TestClient) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert policy == CONTENT_SECURITY_POLICY
    for loose in ("unsafe", "*", "http", "data:"):
        assert loose not in policy
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize(
    "path",
    ["page.py", "../page.py", "%2e%2e/page.py", "..%2fpage.py", "demo/clip.mp4", "demo", "", "main.js/", "index.html"],
)
def test_nothing_else_is_served(page: Page, client: TestClient, path: str) -> None:
    answer = client.get(f"/page/{page.digest}/{path}", follow_redirects=False)
    assert answer.status_code == 404


def test_head_has_no_body(client: TestClient) -> None:
    answer = client.head("/")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) > 1000
    assert client.post("/").status_code == 405


def test_frames_of_the_demo_clip(page: Page, client: TestClient) -> None:
    base = f"/page/{page.digest}/demo"
    assert client.get(f"{base}/clip.json").json() == {"frames": 40}
    frame = client.get(f"{base}/clip/39.jpg")
    assert frame.headers["content-type"] == "image/jpeg"
    assert frame.content[:2] == b"\xff\xd8"
    for absent in ("40.jpg", "-1.jpg", "x.jpg", "1.png"):
        assert client.get(f"{base}/clip/{absent}").status_code == 404


def test_no_address_of_another_machine_and_no_way_around_the_policy() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|url\(", text), path.name
        assert not re.search(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|eval|document\.write)\b", text), path.name
        assert not re.search(r'\sstyle="|\son\w+="', text), path.name


def test_the_page_is_package_data() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["pixano_edge.engine.server"]
    packaged = {path.name for pattern in patterns for path in (ROOT / "engine" / "server").glob(pattern)}
    assert {path.name for path in FOLDER.iterdir()} <= packaged
