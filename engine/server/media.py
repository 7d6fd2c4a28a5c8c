"""Media of requests: ``data:`` URIs decoded off the event loop, http(s) URLs fetched, everything else left alone.

What is left, paths above all, is judged by the provider's `MediaPolicy`.
"""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..provider.errors import InvalidRequestError
from .arrays import decode
from .fetch import Allowance, FetchPolicy, fetch
from .settings import ServerSettings

_DATA_URI = {
    kind: re.compile(rf"data:{kind}/[A-Za-z0-9][A-Za-z0-9.+-]{{0,63}};base64,", re.ASCII) for kind in ("image", "video")
}
_EXAMPLE = {"image": "image/jpeg", "video": "video/mp4"}
FETCHES = 8
"""URLs fetched at a time, by all requests together."""


class Media:
    """What one server does with the media of requests.

    Args:
        settings: Limits, and whether URLs are fetched.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._policy = FetchPolicy(
            allow_url=settings.media_allow_url,
            url_hosts=settings.media_url_hosts,
            url_host_allowlist=settings.media_url_host_allowlist,
            allow_private_ips=settings.media_allow_private_ips,
            max_redirects=settings.media_max_redirects,
            connect_timeout_s=settings.media_connect_timeout_s,
            read_timeout_s=settings.media_read_timeout_s,
            total_timeout_s=settings.media_total_timeout_s,
            video_timeout_s=settings.media_video_timeout_s,
            ca_file=None if settings.media_ca_file is None else str(settings.media_ca_file),
        )
        self._threads = ThreadPoolExecutor(max_workers=FETCHES, thread_name_prefix="pixano-edge-fetch")

    def decoded(self, source: Any, kind: str = "image") -> Any:
        """The bytes of a ``data:`` URI; anything else as it is. Blocks for large ones.

        Raises:
            InvalidRequestError: A URI of another kind, too large, or not base64.
        """
        if not isinstance(source, str) or source[:5].lower() != "data:":
            return source
        header = _DATA_URI[kind].match(source)
        if header is None:
            raise InvalidRequestError(
                f"Not a data URI of base64 with {kind} content: {source[:40]!r}.",
                f"Send 'data:{_EXAMPLE[kind]};base64,...'.",
            )
        limit = self._limit(kind)
        if (len(source) - header.end()) // 4 * 3 > limit + 2:
            raise InvalidRequestError(
                f"The encoded {kind} has more than {limit} bytes.", f"Send a smaller {kind}, or raise the limit."
            )
        try:
            content = decode(source[header.end() :])
        except (binascii.Error, ValueError) as error:
            raise InvalidRequestError(
                f"The data URI of the {kind} is not valid base64: {error}.", "Encode the file's bytes again."
            ) from error
        if not content:
            raise InvalidRequestError(f"The data URI holds no {kind} (0 bytes).", "Encode the file's bytes again.")
        return content

    def allowance(self) -> Allowance:
        """What the URLs of one request may take together."""
        return Allowance(self._settings.media_max_urls, self._settings.media_max_fetched_bytes)

    async def fetched(self, source: Any, kind: str = "image", allowance: Allowance | None = None) -> Any:
        """The content behind an http(s) URL; anything else as it is. Cancelling ends the fetch.

        Args:
            source: Of a request.
            kind: ``image`` or ``video``.
            allowance: Of the request, where it may name several URLs.

        Raises:
            InvalidRequestError: Not allowed, or it cannot be fetched.
        """
        if not is_url(source):
            return source
        return (await self.fetched_all([source], kind, allowance))[0]

    async def fetched_all(
        self, sources: Sequence[Any], kind: str = "image", allowance: Allowance | None = None
    ) -> list[Any]:
        """`fetched` of many, some at a time; the first failure ends all of them."""
        found = list(sources)
        urls = [index for index, source in enumerate(found) if is_url(source)]
        if not urls:
            return found
        shared = allowance or self.allowance()
        shared.begin(len(urls))
        loop = asyncio.get_running_loop()
        limit = self._limit(kind)
        under_way = [
            loop.run_in_executor(self._threads, fetch, found[index], self._policy, limit, kind, shared)
            for index in urls
        ]
        done = False
        try:
            for index, content in zip(urls, await asyncio.gather(*under_way), strict=True):
                found[index] = content
            done = True
            return found
        finally:
            if not done:
                shared.stop()
                for future in under_way:
                    future.cancel()

    def _limit(self, kind: str) -> int:
        video = self._settings.media_max_video_bytes
        return video if kind == "video" else self._settings.media_max_image_bytes

    def close(self) -> None:
        """Ends the threads after what they fetch."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def is_url(source: Any) -> bool:
    """Whether a source is to be fetched."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))
