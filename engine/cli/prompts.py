"""Prompts from the command line: ``x,y``, ``x,y,label`` and ``x0,y0,x1,y1``, in pixels of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..models.sam2.prompts import Prompt

POINT_HELP = "x,y or x,y,label; label 1 = on the object (default), 0 = not on it. Several points mean one object."
BOX_HELP = "x0,y0,x1,y1. With --point it belongs to the same object; several boxes mean one object each."
PROMPT_HELP = (
    "One more object: points and at most one box, separated by spaces, for example "
    "--prompt '480,270 500,300,0' --prompt '10,20,200,220'."
)


@dataclass
class ParsedPrompt:
    """One object's prompt as plain numbers; `to_prompt` makes the engine's type."""

    points: list[tuple[float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    box: tuple[float, float, float, float] | None = None

    @property
    def ambiguous(self) -> bool:
        """One point and no box can mean a part or the whole: the model is asked for several masks."""
        return len(self.points) == 1 and self.box is None

    def to_prompt(self) -> Prompt:
        import numpy as np

        from ..models.sam2.prompts import Prompt

        return Prompt(
            points=np.array(self.points, np.float32) if self.points else None,
            labels=np.array(self.labels, np.int32) if self.points else None,
            box=np.array(self.box, np.float32) if self.box is not None else None,
        )

    def to_dict(self) -> dict[str, object]:
        return {"points": self.points, "labels": self.labels, "box": self.box}


def numbers(text: str, counts: tuple[int, ...], option: str) -> list[float]:
    """Finite numbers separated by commas, as many as one of `counts`; raises BadParameter with the name `option`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts or not all(math.isfinite(v) for v in values):
        forms = {2: "x,y", 3: "x,y,label", 4: "x0,y0,x1,y1"}
        raise typer.BadParameter(f"{option} takes {' or '.join(forms[c] for c in counts)}, got '{text}'.")
    return values


def add_point(prompt: ParsedPrompt, values: Sequence[float], option: str) -> None:
    """Adds x, y and maybe a label; raises BadParameter for a label that is neither 0 nor 1."""
    label = values[2] if len(values) == 3 else 1.0
    if label not in (0.0, 1.0):
        raise typer.BadParameter(f"{option}: the label is 1 (on the object) or 0 (not on it), got {label:g}.")
    prompt.points.append((values[0], values[1]))
    prompt.labels.append(int(label))


def as_box(values: Sequence[float], option: str) -> tuple[float, float, float, float]:
    """Checked corners; raises BadParameter for a box without area."""
    x0, y0, x1, y1 = values
    if x1 <= x0 or y1 <= y0:
        raise typer.BadParameter(f"{option} is x0,y0,x1,y1 with x1 > x0 and y1 > y0, got {x0:g},{y0:g},{x1:g},{y1:g}.")
    return x0, y0, x1, y1


def parse_prompts(points: Sequence[str], boxes: Sequence[str], prompts: Sequence[str]) -> list[ParsedPrompt]:
    """Turns the three options into one prompt per object, `--point`/`--box` first.

    Raises:
        typer.BadParameter: Malformed numbers, or several boxes together with points.
    """
    found: list[ParsedPrompt] = []
    main = ParsedPrompt()
    for text in points:
        add_point(main, numbers(text, (2, 3), "--point"), "--point")
    parsed_boxes = [as_box(numbers(text, (4,), "--box"), "--box") for text in boxes]
    if main.points and len(parsed_boxes) > 1:
        raise typer.BadParameter("--point with several --box is ambiguous; give each object its own --prompt.")
    if main.points:
        main.box = parsed_boxes[0] if parsed_boxes else None
        found.append(main)
    else:
        found += [ParsedPrompt(box=box) for box in parsed_boxes]
    for text in prompts:
        one = ParsedPrompt()
        for part in text.split():
            values = numbers(part, (2, 3, 4), "--prompt")
            if len(values) < 4:
                add_point(one, values, "--prompt")
            elif one.box is None:
                one.box = as_box(values, "--prompt")
            else:
                raise typer.BadParameter(f"--prompt takes at most one box, got two in '{text}'.")
        if not one.points and one.box is None:
            raise typer.BadParameter("--prompt is empty; it takes points and at most one box.")
        found.append(one)
    return found
