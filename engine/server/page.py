"""The page at ``/``: static files of this package, served from memory.

The page is plain HTML, CSS and ES modules (folder ``page_files``) and speaks to the server's own ``/v1`` routes. Its
files are read once, when the router is made. The document is checked anew at each visit (``ETag``); all else lies under
``/page/<digest of all files>/`` and may be kept for a year, since another release has another digest. Every address in
it is relative, so the server may be mounted under a prefix.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..errors import EdgeError

DOCUMENT_PATH = "/"
PREFIX = "/page/"
"""Where the page is: the server answers there without an API key, which the page asks for."""

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".jpg": "image/jpeg",
}
_DOCUMENT = "index.html"
_PLACE = "{{assets}}"
"""Stands in the document for ``page/<digest>``."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""Nothing from elsewhere, no inline script or style, no text that becomes markup."""

_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
_FOREVER = {"Cache-Control": "public, max-age=31536000, immutable"}
_CHECKED = {"Cache-Control": "no-cache"}


@dataclass(frozen=True)
class Asset:
    """One file of the page: its content, MIME type and ``ETag``."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, name: str, content: bytes) -> Asset:
        """An asset of the type that its name tells; KeyError for a type that the page does not have."""
        return cls(content, _TYPES[Path(name).suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


@dataclass(frozen=True)
class Page:
    """The page's files.

    Attributes:
        digest: Of all files; part of every address but the document's.
        document: ``index.html`` with the addresses filled in.
        assets: Name under ``/page/<digest>/`` -> file. Pictures of the demo are ``demo/NAME``.
    """

    digest: str
    document: Asset
    assets: Mapping[str, Asset]


def read_page() -> Page:
    """Reads the page from the package.

    Raises:
        EdgeError: It is not in this installation.
    """
    folder = _folder("pixano_edge.engine.server") / "page_files"
    files = {entry.name: entry.read_bytes() for entry in _entries(folder) if entry.suffix in _TYPES}
    if _DOCUMENT not in files:
        raise EdgeError(
            "The server's page is not in this installation.",
            "Install again with: pip install --force-reinstall 'pixano-edge[server]'",
        )
    demo = {entry.name: entry for entry in _entries(_folder("pixano_edge.engine.assets") / "demo")}
    files |= {f"demo/{name}": entry.read_bytes() for name, entry in demo.items() if entry.suffix in (".png", ".jpg")}
    if "demo.json" in demo:
        files["demo/demo.json"] = _names(demo["demo.json"], demo.get("talk.json"))
    whole = hashlib.sha256()
    for name, content in sorted(files.items()):
        whole.update(f"{name} {len(content)} ".encode())
        whole.update(content)
    digest = whole.hexdigest()[:16]
    document = files.pop(_DOCUMENT).decode("utf-8").replace(_PLACE, f"page/{digest}")
    assets = {name: Asset.of(name, content) for name, content in files.items()}
    return Page(digest, Asset.of(_DOCUMENT, document.encode("utf-8")), assets)


def _folder(package: str) -> Path:
    return Path(str(importlib.resources.files(package)))


def _entries(folder: Path) -> list[Path]:
    return sorted(e for e in folder.iterdir() if e.is_file()) if folder.is_dir() else []


def _names(listing: Path, talk: Path | None) -> bytes:
    """What the page needs of the demo's lists: pictures, the words for their objects, and questions about some."""
    pictures = json.loads(listing.read_text(encoding="utf-8"))["pictures"]
    short = [{"file": p["file"], "objects": [o["name"] for o in p["objects"]], "questions": []} for p in pictures]
    asked = json.loads(talk.read_text(encoding="utf-8"))["pictures"] if talk is not None else []
    short += [{"file": p["file"], "objects": [], "questions": [q["question"] for q in p["questions"]]} for p in asked]
    return json.dumps({"pictures": short}).encode()


class DemoClip:
    """Frames of the demo's clip as JPEG files, decoded at the first request: browsers do not play its codec."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: list[Asset] | None = None

    def frames(self) -> list[Asset]:
        """All frames in order; empty where the clip is not installed.

        Raises:
            EdgeError: OpenCV cannot decode it here.
        """
        with self._lock:
            if self._frames is None:
                self._frames = self._read()
            return self._frames

    @staticmethod
    def _read() -> list[Asset]:
        from ..models.sam2_video.frames import VideoFrames

        source = _folder("pixano_edge.engine.assets") / "demo" / "clip.mp4"
        if not source.is_file():
            return []
        with closing(VideoFrames(source)) as clip:
            return [_jpeg(clip[index]) for index in range(len(clip))]


def _jpeg(image: npt.NDArray[np.uint8]) -> Asset:
    """An RGB image (H, W, 3) as a JPEG file that shows no loss."""
    import cv2

    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    return Asset.of("frame.jpg", data.tobytes())


def router(page: Page | None = None) -> APIRouter:
    """Routes ``/``, ``/page/<digest>/...`` and the demo clip's frames; none of them asks for a key.

    Args:
        page: Another page, in tests.

    Raises:
        EdgeError: The page is not in this installation.
    """
    page = page or read_page()
    routes = APIRouter(include_in_schema=False)
    clip = DemoClip()
    base = f"{PREFIX}{page.digest}"
    add = partial(routes.add_api_route, methods=["GET", "HEAD"])

    async def document(request: Request) -> Response:
        return _answer(request, page.document, _CHECKED)

    async def asset(request: Request, name: str) -> Response:
        found = page.assets.get(name)
        return _absent() if found is None else _answer(request, found, _FOREVER)

    def clip_length() -> Response:  # not a coroutine: the first call decodes
        return JSONResponse({"frames": len(clip.frames())}, headers={**_HEADERS, **_CHECKED})

    def clip_frame(request: Request, index: int) -> Response:
        frames = clip.frames()
        return _answer(request, frames[index], _FOREVER) if 0 <= index < len(frames) else _absent()

    add(DOCUMENT_PATH, document)
    add(f"{base}/demo/clip.json", clip_length)
    add(f"{base}/demo/clip/{{index:int}}.jpg", clip_frame)
    add(f"{base}/{{name:path}}", asset)
    return routes


def _answer(request: Request, asset: Asset, caching: Mapping[str, str]) -> Response:
    headers = {**_HEADERS, **caching, "ETag": asset.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
    if asset.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)


def _absent() -> Response:
    return JSONResponse({"detail": "Not Found"}, 404, headers={**_HEADERS, **_CHECKED})
