"""Prompts as typed on the command line."""

from __future__ import annotations

import pytest
import typer

from pixano_edge.engine.cli.prompts import ParsedPrompt, parse_prompts


def test_several_points_are_one_object():
    (prompt,) = parse_prompts(["10,20", "30.5,40,0"], [], [])
    assert prompt == ParsedPrompt(points=[(10, 20), (30.5, 40)], labels=[1, 0])
    assert not prompt.ambiguous
    assert parse_prompts(["1,2"], [], [])[0].ambiguous


def test_a_box_joins_the_points():
    (prompt,) = parse_prompts(["10,20"], ["0,0,50,60"], [])
    assert prompt == ParsedPrompt(points=[(10, 20)], labels=[1], box=(0, 0, 50, 60))
    assert not prompt.ambiguous


def test_several_boxes_are_one_object_each():
    assert [p.box for p in parse_prompts([], ["0,0,5,6", "7,8,9,10"], [])] == [(0, 0, 5, 6), (7, 8, 9, 10)]


def test_prompt_groups():
    first, second, third = parse_prompts(["1,2"], [], ["3,4 5,6,0 0,0,9,9", "7,8,20,21"])
    assert first == ParsedPrompt(points=[(1, 2)], labels=[1])
    assert second == ParsedPrompt(points=[(3, 4), (5, 6)], labels=[1, 0], box=(0, 0, 9, 9))
    assert third == ParsedPrompt(box=(7, 8, 20, 21))


def test_to_prompt_keeps_numbers_and_dtypes():
    prompt = parse_prompts(["10,20", "1,2,0"], ["0,0,5,6"], [])[0].to_prompt()
    assert prompt.points.tolist() == [[10, 20], [1, 2]]
    assert prompt.labels.tolist() == [1, 0]
    assert prompt.box.tolist() == [0, 0, 5, 6]


@pytest.mark.parametrize(
    ("points", "boxes", "prompts", "text"),
    [
        (["1"], [], [], "x,y"),
        (["a,b"], [], [], "got 'a,b'"),
        (["nan,1"], [], [], "nan"),
        (["1,2,3"], [], [], "label"),
        (["1,2,-1"], [], [], "label"),
        ([], ["1,2,3"], [], "x0,y0,x1,y1"),
        ([], ["5,5,5,9"], [], "x1 > x0"),
        (["1,2"], ["0,0,1,1", "2,2,3,3"], [], "--prompt"),
        ([], [], ["0,0,1,1 2,2,3,3"], "one box"),
        ([], [], ["  "], "empty"),
    ],
)
def test_mistakes_are_usage_errors(points: list[str], boxes: list[str], prompts: list[str], text: str):
    with pytest.raises(typer.BadParameter) as caught:
        parse_prompts(points, boxes, prompts)
    assert text in caught.value.message
