"""Tracking requests: what is read, and what is refused with advice, before any frame is computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.models.rle import encode_rle
from pixano_edge.engine.provider import EdgeVideoMaskGenerationInput, InvalidRequestError, VideoMaskGenerationInput
from pixano_edge.engine.provider.video_prompts import TrackingRequest, read_request

from .fakes import CONSTANTS

HEIGHT, WIDTH = 97, 161
MASK = {"size": [HEIGHT, WIDTH], "counts": encode_rle(np.eye(HEIGHT, WIDTH, dtype=np.bool_))["counts"]}


def _read(**fields: Any) -> TrackingRequest:
    return read_request(EdgeVideoMaskGenerationInput(**{"video": [], "model": "m", **fields}))


def _seed(**fields: Any) -> TrackingRequest:
    """As the seed interface sends it: without the newer fields."""
    values: dict[str, Any] = {"video": ["a"], "model": "m", "objects_ids": [1], "frame_indexes": [0], **fields}
    return read_request(VideoMaskGenerationInput(**values))


def _key(*keyframes: Any, ids: Any = None, **fields: Any) -> TrackingRequest:
    return _read(objects_ids=ids or list(range(len(keyframes))), frame_indexes=[], keyframes=list(keyframes), **fields)


def _shown(request: TrackingRequest) -> list[tuple[Any, ...]]:
    return [
        (p.object_id, p.frame, p.prompt and (p.prompt.points, p.prompt.labels, p.prompt.box), p.rle)
        for p in request.prompts
    ]


def test_seed_lists() -> None:
    request = _seed(
        objects_ids=[7, 3], frame_indexes=[2, 0], points=[[[1, 2], [3, 4]], []], labels=[[1, 0], []],
        boxes=[[], [1, 2, 30, 40]],
    )  # fmt: skip
    assert _shown(request) == [
        (7, 2, ([[1, 2], [3, 4]], [1, 0], None), None),
        (3, 0, (None, None, [1, 2, 30, 40]), None),
    ]
    assert request.propagate
    assert request.interval is None


def test_seed_points_and_box_combine_and_labels_may_be_absent() -> None:
    ((_, _, prompt, _),) = _shown(_seed(points=[[[1, 2]]], boxes=[[0, 0, 9, 9]]))
    assert prompt == ([[1, 2]], None, [0, 0, 9, 9])  # None: foreground


def test_ids_without_a_prompt_are_left_out() -> None:
    """Pixano's helper sends ids and frames of the whole clip with one prompt."""
    request = _seed(objects_ids=list(range(9)), frame_indexes=list(range(9)), points=[[[1, 2]]])
    assert _shown(request) == [(0, 0, ([[1, 2]], None, None), None)]


def test_keyframes() -> None:
    request = _key(
        {"frame_index": 4, "points": [{"x": 1, "y": 2, "label": 0}, {"x": 3, "y": 4}]},
        {"frame_index": 0, "box": {"x": 10, "y": 20, "width": 30, "height": 40}, "points": None, "mask": None},
        {"frame_index": 1, "points": [], "box": None, "mask": MASK},
        {"frame_index": 5, "points": [{"x": 1, "y": 2, "label": 1}], "box": {"x": 0, "y": 0, "width": 5, "height": 5}},
        ids=[5, 6, 5, 5],
    )
    assert _shown(request) == [
        (5, 4, ([[1, 2], [3, 4]], [0, 1], None), None),
        (6, 0, (None, None, [10, 20, 40, 60]), None),  # xywh to xyxy
        (5, 1, None, MASK),  # empty points are absent
        (5, 5, ([[1, 2]], [1], [0, 0, 5, 5]), None),
    ]
    np.testing.assert_array_equal(request.prompts[2].mask(), np.eye(HEIGHT, WIDTH, dtype=np.bool_))


def test_keyframes_win_over_lists() -> None:
    request = _read(
        objects_ids=[1],
        frame_indexes=[0],
        points=[[[9, 9]]],
        keyframes=[{"frame_index": 2, "points": [{"x": 1, "y": 2}]}],
    )
    assert _shown(request) == [(1, 2, ([[1, 2]], [1], None), None)]
    fallback = _read(objects_ids=[1], frame_indexes=[6], keyframes=[{"points": [{"x": 1, "y": 2}]}])
    assert fallback.prompts[0].frame == 6


@pytest.mark.parametrize(
    ("fields", "span", "total"),
    [
        ({}, (2, 9), 8),
        ({"propagate": None}, (2, 9), 8),
        ({"propagate": False}, (2, 9), 2),
        ({"interval": {"start_frame": 3, "end_frame": 6}}, (3, 6), 4),
        ({"interval": {"start_frame": 6, "end_frame": 3, "direction": "forward"}}, (6, 3), 4),
        ({"interval": {"start_frame": 6, "end_frame": 3, "direction": "backward"}}, (6, 3), 4),
        ({"interval": {"start_frame": 4, "end_frame": 4, "direction": "backward"}}, (4, 4), 1),
    ],
)
def test_range(fields: dict[str, Any], span: tuple[int, int], total: int) -> None:
    point = {"points": [{"x": 1, "y": 2}]}
    request = _key({"frame_index": 5, **point}, {"frame_index": 2, **point}, **fields)
    assert request.span(10) == span
    assert request.total(10) == total


_POINT = {"frame_index": 0, "points": [{"x": 1, "y": 2}]}
_BOX = {"x": 1, "y": 1, "width": 2, "height": 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "marks no object"),
        ({"objects_ids": [1], "frame_indexes": [0], "points": []}, "marks no object"),
        ({"points": [[[1, 2]]], "frame_indexes": [0]}, "1 prompts and 0 objects_ids"),
        ({"points": [[[1, 2]]], "objects_ids": [1]}, "1 prompts and 0 frame_indexes"),
        ({"points": [[[1, 2]]], "boxes": [[0, 0, 1, 1]] * 2, "objects_ids": [1, 2]}, "1 points, 2 boxes"),
        ({"points": [[]], "objects_ids": [4], "frame_indexes": [3]}, "Object 4 has neither point nor box on frame 3"),
        ({"points": "1,2", "objects_ids": [1], "frame_indexes": [0]}, "points must be a list"),
        ({"objects_ids": 3}, "objects_ids must be a list"),
        ({"objects_ids": ["a"]}, r"objects_ids\[0\] must be a whole number"),
        ({"objects_ids": [True]}, r"objects_ids\[0\] must be a whole number"),
        ({"frame_indexes": [-1]}, r"frame_indexes\[0\] must be a whole number, 0 or more"),
        ({"keyframes": [_POINT]}, "1 prompts and 0 objects_ids"),
        ({"keyframes": [3], "objects_ids": [1]}, r"keyframes\[0\] must be an object"),
        ({"keyframes": [{"points": [{"x": 1, "y": 2}]}], "objects_ids": [1]}, "has no frame_index"),
        ({"keyframes": [{"frame_index": 1.5}], "objects_ids": [1]}, "frame_index must be a whole number"),
        ({"keyframes": [{"frame_index": 0}], "objects_ids": [1]}, "marks nothing"),
        ({"keyframes": [{"frame_index": 0, "points": []}], "objects_ids": [1]}, "marks nothing"),
        ({"keyframes": [{**_POINT, "mask": MASK}], "objects_ids": [1]}, "mask together with points"),
        ({"keyframes": [{"frame_index": 0, "box": _BOX, "mask": MASK}], "objects_ids": [1]}, "mask together with"),
        ({"keyframes": [{"frame_index": 0, "mask": "abc"}], "objects_ids": [1]}, "'size' and 'counts'"),
        ({"keyframes": [{"frame_index": 0, "points": [[1, 2]]}], "objects_ids": [1]}, "must have x and y"),
        ({"keyframes": [{"frame_index": 0, "points": {"x": 1}}], "objects_ids": [1]}, "points must be a list"),
        ({"keyframes": [{"frame_index": 0, "points": [{"x": 1}]}], "objects_ids": [1]}, "y must be a number"),
        (
            {"keyframes": [{"frame_index": 0, "points": [{"x": 1, "y": 2, "label": 2}]}], "objects_ids": [1]},
            "label is 2",
        ),
        ({"keyframes": [{"frame_index": 0, "box": [1, 2, 3, 4]}], "objects_ids": [1]}, "x, y, width and height"),
        ({"keyframes": [{"frame_index": 0, "box": {**_BOX, "width": 0}}], "objects_ids": [1]}, "no area"),
        ({"keyframes": [{"frame_index": 0, "box": {**_BOX, "x": np.nan}}], "objects_ids": [1]}, "x must be a number"),
        ({"keyframes": [_POINT, _POINT], "objects_ids": [8, 8]}, "Object 8 is marked twice on frame 0"),
        ({"keyframes": [_POINT], "objects_ids": [1], "propagate": "yes"}, "propagate must be"),
        ({"keyframes": [_POINT], "objects_ids": [1], "interval": [0, 3]}, "start_frame and end_frame"),
        ({"keyframes": [_POINT], "objects_ids": [1], "interval": {"start_frame": 0}}, "end_frame must be"),
        (
            {"keyframes": [_POINT], "objects_ids": [1],
             "interval": {"start_frame": 0, "end_frame": 3, "direction": "backward"}},
            "goes forward, from frame 0 to 3",
        ),
        (
            {"keyframes": [_POINT], "objects_ids": [1],
             "interval": {"start_frame": 0, "end_frame": 3, "direction": "both"}},
            "direction is 'both'",
        ),
    ],
)  # fmt: skip
def test_refused_without_the_clip(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        _read(**{"objects_ids": [], "frame_indexes": [], **fields})
    assert caught.value.action


@pytest.mark.parametrize(
    ("keyframe", "interval", "message"),
    [
        ({**_POINT, "frame_index": 9}, None, "Frame 9 is asked for, the clip has 9"),
        (_POINT, (0, 9), "Frame 9 is asked for, the clip has 9"),
        ({"frame_index": 2, "points": [{"x": 999, "y": 2}]}, None, "The prompt of object 0 on frame 2: .*outside"),
        ({"frame_index": 0, "mask": {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}}, None, r"\[161, 97\]"),
        ({"frame_index": 0, "mask": {"size": [HEIGHT, WIDTH], "counts": [5]}}, None, "object 0 on frame 0: .*cover 5"),
        ({"frame_index": 0, "mask": {"size": [HEIGHT, WIDTH]}}, None, "counts"),
    ],
)
def test_refused_with_the_clip(keyframe: dict[str, Any], interval: tuple[int, int] | None, message: str) -> None:
    given = None if interval is None else dict(zip(("start_frame", "end_frame"), interval))
    request = _key(keyframe, interval=given)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        request.check(9, (HEIGHT, WIDTH), CONSTANTS)
    assert caught.value.action


def test_a_mask_of_another_size_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred million pixels are a few bytes on the wire, and seconds of work."""
    monkeypatch.setattr("pixano_edge.engine.provider.video_prompts.decode_rle", None)
    request = _key({"frame_index": 0, "mask": {"size": [99_999, 1000], "counts": [99_999_000]}})
    with pytest.raises(InvalidRequestError, match=r"the mask is \[99999, 1000\]"):
        request.check(9, (HEIGHT, WIDTH), CONSTANTS)


def test_what_the_clip_allows() -> None:
    request = _key(_POINT, {"frame_index": 8, "mask": MASK}, interval={"start_frame": 8, "end_frame": 0})
    request.check(9, (HEIGHT, WIDTH), CONSTANTS)


def test_any_object_with_the_fields_will_do() -> None:
    request = read_request(SimpleNamespace(objects_ids=(1,), keyframes=(_POINT,)))
    assert _shown(request) == [(1, 0, ([[1, 2]], [1], None), None)]
