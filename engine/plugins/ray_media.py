"""What a request to the Ray server names as image or video, under that server's own media policy."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..models.images import ImageLimits
from ..provider.errors import MissingPixanoError

try:
    from pixano_inference.utils import media_security as rules
except ImportError as error:
    raise MissingPixanoError(
        f"The server of Pixano Inference cannot be imported here: {error}.",
        "Install it with: pip install 'pixano-inference[server]>=0.7.1,<0.8'",
    ) from error

Source = bytes | str | Path
"""Bytes and ``data:`` URIs as they came, files as the path that the policy allows."""


def image(source: Any) -> Source:
    """An image of a request.

    Raises:
        ValueError: The policy refuses it: its address, its path, or its format.
    """
    policy = rules.get_media_policy()
    found = _resolved(source, policy.max_image_bytes)
    if policy.allowed_image_formats and not policy.allowed_image_formats.issuperset(ImageLimits().formats):
        _check_format(found, tuple(sorted(policy.allowed_image_formats)))
    return found


def images(sources: Any) -> list[Source] | None:
    """The images of a request for text; none and an empty list are the same."""
    return [image(source) for source in sources] if sources else None


def video(source: Any) -> Source | list[Source]:
    """The video of a request: a list of frames, or one file.

    Raises:
        ValueError: As `image`.
    """
    if isinstance(source, list):
        return [image(frame) for frame in source]
    return _resolved(source, rules.get_media_policy().max_video_bytes)


def limits() -> dict[str, Any]:
    """The policy's limits as keywords of `EdgeProvider`; those that are turned off stay our own."""
    policy = rules.get_media_policy()
    found = {
        "max_image_pixels": policy.max_image_pixels,
        "max_image_bytes": policy.max_image_bytes,
        "max_video_bytes": policy.max_video_bytes,
    }
    return {name: value for name, value in found.items() if value}


def _resolved(source: Any, max_bytes: int) -> Source:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return source
        if rules.is_http_url(source):
            fetched: bytes = rules.fetch_url_bytes(source, max_bytes=max_bytes)
            return fetched
    path: Path = rules.resolve_local_path(source)
    return path


def _check_format(source: Source, allowed: tuple[str, ...]) -> None:
    content: Any = source
    if isinstance(source, str):
        try:
            content = base64.b64decode(source.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise rules.MediaSecurityError(f"The image is not valid base64: {error}. Encode it again.") from error
    try:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content), formats=allowed):
            pass
    except UnidentifiedImageError as error:
        raise rules.MediaSecurityError(
            f"The image is damaged, or its format is not allowed here. Use one of {', '.join(allowed)}."
        ) from error
