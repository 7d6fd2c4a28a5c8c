"""Prompts of `track`: the syntax, what belongs together, and masks from pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from pixano_edge.engine.cli.track_prompts import parse_track_prompts, read_mask


def test_points_and_a_box_of_one_object_on_one_frame_belong_together() -> None:
    found = parse_track_prompts(["0:10,20", "0:30,40,0", "2=5:1,2", "9:7,8.5"], ["0:1,2,30,40", "2=0:5,6,7,8"], [])
    assert [(p.frame, p.object_id) for p in found] == [(0, 1), (0, 2), (5, 2), (9, 1)]
    assert found[0].marks.points == [(10, 20), (30, 40)]
    assert found[0].marks.labels == [1, 0]
    assert found[0].marks.box == (1, 2, 30, 40)
    assert found[3].marks.points == [(7, 8.5)]
    assert found[1].to_dict() == {"id": 2, "frame": 0, "points": [], "labels": [], "box": (5, 6, 7, 8)}


def test_a_mask_may_have_any_name() -> None:
    (found,) = parse_track_prompts([], [], ["3=12:C:/a=b,c.png"])
    assert (found.object_id, found.frame, found.mask) == (3, 12, Path("C:/a=b,c.png"))


@pytest.mark.parametrize(
    "text",
    ["10,20", "0:10", "x:1,2", "-1:1,2", "a=0:1,2", "=0:1,2", "0=0:1,2", "1=2=0:1,2", "0:1,2,5", "0:nan,1", "0:"],
)
def test_malformed_points(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="--point"):
        parse_track_prompts([text], [], [])


def test_what_does_not_go_together() -> None:
    with pytest.raises(typer.BadParameter, match=r"two boxes on frame 0.*--box 2=0:"):
        parse_track_prompts([], ["0:1,2,3,4", "0:5,6,7,8"], [])
    with pytest.raises(typer.BadParameter, match="x1 > x0"):
        parse_track_prompts([], ["0:5,6,5,8"], [])
    for points, masks in ((["0:1,2"], ["0:m.png"]), ([], ["0:m.png", "0:n.png"])):
        with pytest.raises(typer.BadParameter, match="a mask comes alone"):
            parse_track_prompts(points, [], masks)
    assert len(parse_track_prompts(["1:1,2"], [], ["0:m.png"])) == 2, "another frame"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_masks_of_every_kind_of_picture(tmp_path: Path, mode: str) -> None:
    want = np.zeros((6, 9), bool)
    want[2:4, 3:8] = True
    plain = Image.fromarray(want.astype(np.uint8) * 3)
    picture = {
        "1": lambda: Image.fromarray(want),
        "I;16": lambda: Image.fromarray(want.astype(np.uint16) * 300),
        "P": lambda: Image.frombytes("P", (9, 6), want.astype(np.uint8).tobytes()),
    }.get(mode, lambda: plain.convert(mode))()
    if mode == "P":
        picture.putpalette([200, 200, 200, 0, 0, 0])  # the number counts, not the colour
    picture.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", (6, 9)), want)


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    Image.new("L", (9, 6)).save(tmp_path / "m.png")
    with pytest.raises(typer.BadParameter, match="9x6, the frames are 10x6"):
        read_mask(tmp_path / "m.png", (6, 10))
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "absent.png"):
        with pytest.raises(typer.BadParameter, match="cannot be read"):
            read_mask(tmp_path / name, (6, 9))
