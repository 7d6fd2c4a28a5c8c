"""What the first request would wait for besides its model: libraries that are imported when they are used."""

from __future__ import annotations


def load_codecs() -> None:
    """Imports the readers of pictures and the run-length codec of masks; a box that lacks one hears of it when it is
    used."""
    from PIL import Image

    Image.preinit()  # BMP, GIF, JPEG, PNG and PPM; others when a picture is none of these
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError:
        return
