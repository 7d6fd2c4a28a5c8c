"""Prompts of `pixano-edge track`: ``[ID=]FRAME:`` before what `segment` takes, in pixels of the frame."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer

from .prompts import ParsedPrompt, add_point, as_box, numbers

POINT_HELP = (
    "A point on a frame; label 1 = on the object (default), 0 = not on it. Frames start at 0. ID is the object's "
    "number, 1 without it. Points of one object on one frame belong together."
)
BOX_HELP = "A box around an object on a frame; with --point on the same frame it belongs to the same answer."
MASK_HELP = "A picture of the frames' size whose pixels that are not 0 are the object on that frame. It comes alone."

_PLACE = re.compile(r"^(?:(?P<id>[^=:,]*)=)?(?P<frame>[^=:,]*):(?P<rest>.+)$", re.DOTALL)


@dataclass
class ObjectPrompt:
    """What marks one object on one frame.

    Attributes:
        object_id: From 1.
        frame: From 0.
        marks: Points and box; empty with a mask.
        mask: File of a mask instead.
    """

    object_id: int
    frame: int
    marks: ParsedPrompt
    mask: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        mask = {"mask": str(self.mask)} if self.mask is not None else self.marks.to_dict()
        return {"id": self.object_id, "frame": self.frame, **mask}


def parse_track_prompts(points: Sequence[str], boxes: Sequence[str], masks: Sequence[str]) -> list[ObjectPrompt]:
    """Turns the three options into one prompt for each object and frame, by frame, then by object.

    Raises:
        typer.BadParameter: Malformed; two boxes for one object on one frame, or a mask with anything else there.
    """
    found: dict[tuple[int, int], ObjectPrompt] = {}

    def at(text: str, option: str, form: str) -> tuple[ObjectPrompt, str]:
        object_id, frame, rest = _place(text, option, form)
        return found.setdefault((frame, object_id), ObjectPrompt(object_id, frame, ParsedPrompt())), rest

    for text in points:
        prompt, rest = at(text, "--point", "x,y[,label]")
        add_point(prompt.marks, numbers(rest, (2, 3), "--point"), "--point")
    for text in boxes:
        prompt, rest = at(text, "--box", "x0,y0,x1,y1")
        if prompt.marks.box is not None:
            raise typer.BadParameter(
                f"Object {prompt.object_id} has two boxes on frame {prompt.frame}; "
                f"give each object a number: --box {prompt.object_id + 1}={prompt.frame}:x0,y0,x1,y1."
            )
        prompt.marks.box = as_box(numbers(rest, (4,), "--box"), "--box")
    for text in masks:
        prompt, rest = at(text, "--mask", "FILE")
        if prompt.mask is not None or prompt.marks.points or prompt.marks.box is not None:
            raise typer.BadParameter(
                f"Object {prompt.object_id} has a mask and something else on frame {prompt.frame}; a mask comes alone."
            )
        prompt.mask = Path(rest)
    return [found[key] for key in sorted(found)]


def read_mask(path: Path, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The mask in a picture: pixels that are not 0, of any colour.

    Args:
        path: PNG or another picture; palettes and 16 bits are read as numbers.
        size: (height, width) that it must have.

    Raises:
        typer.BadParameter: It cannot be read, or has another size.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pixels: npt.NDArray[Any] = np.asarray(picture)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise typer.BadParameter(f"--mask '{path}' cannot be read: {error}.") from error
    if pixels.ndim == 3:
        colours = 3 if pixels.shape[2] == 4 else 1 if pixels.shape[2] == 2 else pixels.shape[2]  # alpha says nothing
        pixels = np.asarray(pixels[..., :colours].any(axis=2))
    if pixels.shape != size:
        raise typer.BadParameter(
            f"--mask '{path.name}' is {pixels.shape[1]}x{pixels.shape[0]}, the frames are {size[1]}x{size[0]}."
        )
    return np.ascontiguousarray(pixels != 0)


def _place(text: str, option: str, form: str) -> tuple[int, int, str]:
    match = _PLACE.match(text)
    object_id, frame = (match["id"] or "1", match["frame"]) if match else ("", "")
    if match is None or not (frame.isdecimal() and object_id.isdecimal() and int(object_id) >= 1) or match["id"] == "":
        raise typer.BadParameter(
            f"{option} takes [ID=]FRAME:{form}, for example {option} 2=0:{_EXAMPLE[form]}, got '{text}'."
        )
    return int(object_id), int(frame), match["rest"]


_EXAMPLE = {"x,y[,label]": "320,210", "x0,y0,x1,y1": "40,60,300,280", "FILE": "mask.png"}
