"""Requests to prompts and tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.provider.convert import LogitsMemory, read_array, read_features, read_multimask, read_prompts
from pixano_edge.engine.provider.errors import InvalidRequestError
from pixano_edge.engine.provider.types import NDArrayData

_M = 4


def _prompts(**fields: Any) -> list[tuple[Any, Any, Any, Any]]:
    prompts = read_prompts(SimpleNamespace(**fields), _M, LogitsMemory())
    return [(p.points, p.labels, p.box, p.mask_input) for p in prompts]


def _array(*shape: int, start: float = 0.0) -> NDArrayData:
    return NDArrayData.from_array(np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape))


def test_lists_are_zipped_by_index() -> None:
    assert _prompts(points=[[[1, 2]], [[3, 4], [5, 6]]], labels=[[1], [0, 1]], boxes=[[0, 0, 2, 2], [1, 1, 3, 3]]) == [
        ([[1, 2]], [1], [0, 0, 2, 2], None),
        ([[3, 4], [5, 6]], [0, 1], [1, 1, 3, 3], None),
    ]


@pytest.mark.parametrize("fields", [{}, {"points": None, "labels": [], "boxes": []}])
def test_nothing_is_one_empty_prompt(fields: dict[str, Any]) -> None:
    assert _prompts(**fields) == [(None, None, None, None)]


def test_absent_labels_and_lists() -> None:
    assert _prompts(points=[[[1, 2]]], labels=[]) == [([[1, 2]], None, None, None)]
    assert _prompts(points=[], boxes=[[0, 0, 2, 2]], labels=None) == [(None, None, [0, 0, 2, 2], None)]
    assert _prompts(points=[[], [[1, 1]]], boxes=[[0, 0, 2, 2], None]) == [
        ([], None, [0, 0, 2, 2], None),
        ([[1, 1]], None, None, None),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"points": [[[1, 2]]], "labels": [[1], [1]]}, "1 points, 2 labels"),
        ({"points": [[[1, 2]]], "boxes": [[0, 0, 1, 1]] * 3}, "1 points, 3 boxes"),
        ({"points": [[[1, 2]]] * 1001}, "1001 prompts are more than 1000"),
        ({"boxes": [[0, 0, 1, 1]] * 1001}, "1001 prompts are more than 1000"),
        ({"points": "1,2"}, "points must be a list, got str"),
        ({"boxes": 4}, "boxes must be a list"),
        ({"labels": {"0": 1}}, "labels must be a list"),
    ],
)
def test_lists_that_do_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        _prompts(**fields)


@pytest.mark.parametrize("shape", [(_M, _M), (1, _M, _M), (1, 1, _M, _M)])
def test_one_mask_input(shape: tuple[int, ...]) -> None:
    ((_, _, _, mask),) = _prompts(mask_input=_array(*shape))
    np.testing.assert_array_equal(mask, np.arange(16, dtype=np.float32).reshape(_M, _M))


@pytest.mark.parametrize("shape", [(2, 1, _M, _M), (2, _M, _M)])
def test_a_mask_per_prompt(shape: tuple[int, ...]) -> None:
    first, second = _prompts(mask_input=_array(*shape), points=[[[1, 1]], [[2, 2]]])
    assert first[3][0, 0] == 0
    assert second[3][0, 0] == 16


def test_masks_alone_say_how_many_prompts() -> None:
    assert len(_prompts(mask_input=_array(3, 1, _M, _M))) == 3


def test_of_three_masks_sent_back_the_best_is_taken() -> None:
    memory = LogitsMemory(size=2)
    three = _array(3, _M, _M)
    request = SimpleNamespace(mask_input=three)

    def taken() -> float:
        mask = read_prompts(request, _M, memory)[0].mask_input
        assert mask is not None
        return float(mask[0, 0])

    assert taken() == 0  # not sent from here: the first
    memory.note(three.to_array(), np.array([0.1, 0.2, 0.7], np.float32))
    assert taken() == 32
    for start in (1.0, 2.0):
        memory.note(_array(3, _M, _M, start=start).to_array(), np.array([0.1, 0.9, 0.7], np.float32))
    assert taken() == 0  # forgotten: bounded


@pytest.mark.parametrize("shape", [(5, 5), (2, 1, _M, _M), (1, 0, _M, _M), (_M,), (1, 1, 1, _M, _M)])
def test_mask_input_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError, match=r"mask_input.*\[1, 4, 4\]"):
        _prompts(mask_input=_array(*shape), points=[[[1, 1]]])


@pytest.mark.parametrize(
    "value",
    [
        NDArrayData([float("nan")], [1]),
        NDArrayData([None], [1]),  # type: ignore[list-item]
        NDArrayData([1e39], [1]),
        NDArrayData([1.0], [2]),
        NDArrayData(["a"], [1]),  # type: ignore[list-item]
        NDArrayData(5, [1]),  # type: ignore[arg-type]
        NDArrayData([1.0], 1),  # type: ignore[arg-type]
        NDArrayData([1.0], ["x"]),  # type: ignore[list-item]
        {"values": [1.0], "shape": [1]},
        [1.0],
    ],
)
def test_arrays_that_are_none(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="the tensor"):
        read_array(value, "the tensor")


def test_flat_arrays_are_read_too() -> None:
    array = np.arange(6, dtype=np.float32)
    back = read_array(SimpleNamespace(values=array, shape=[2, 3]), "x")
    np.testing.assert_array_equal(back, array.reshape(2, 3))
    assert not np.shares_memory(back, array)


def test_features_come_together() -> None:
    assert read_features(SimpleNamespace(image_embedding=None, high_resolution_features=[])) is None
    found = read_features(SimpleNamespace(image_embedding=_array(2), high_resolution_features=[_array(1), _array(3)]))
    assert found is not None
    assert [f.shape for f in found[1]] == [(1,), (3,)]
    for fields in ({"image_embedding": _array(2)}, {"high_resolution_features": [_array(1)]}):
        with pytest.raises(InvalidRequestError, match="together"):
            read_features(SimpleNamespace(**fields))


def test_number_of_masks() -> None:
    assert read_multimask(SimpleNamespace())
    assert not read_multimask(SimpleNamespace(multimask_output=False, num_multimask_outputs=1))
    with pytest.raises(InvalidRequestError, match="must be 3"):
        read_multimask(SimpleNamespace(multimask_output=True, num_multimask_outputs=1))
