"""The contract of Qwen2.5-VL."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts import qwen2_5_vl as contract
from pixano_edge.engine.contracts.qwen2_5_vl import QwenVlConstants
from pixano_edge.engine.errors import ContractError

from .test_decoder import constants as decoder_constants


def constants(**changes: Any) -> QwenVlConstants:
    values: dict[str, Any] = {
        "decoder": decoder_constants(rope="mrope"), "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "window_units": 4, "min_pixels": 3136, "max_pixels": contract.MAX_PIXELS, "resample": "bicubic",
        "rescale": 1 / 255, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "image_token": "<|image_pad|>",
        "image_token_id": 290,
    }  # fmt: skip
    return QwenVlConstants(**{**values, **changes})


def test_shapes_follow_the_constants() -> None:
    graphs = contract.graphs(constants(), "float16", "tensorrt")
    vision = graphs["vision_encoder"]
    assert [t.dims for t in vision.inputs] == [("W", 64, 1176), ("W", 64, 2), ("W", 64)]
    assert vision.outputs[0].dims == ("W", 16, 64)
    assert graphs["decoder"].tensor("position_ids").dims == (3, "S")


def test_units_in_windows() -> None:
    assert contract.window_units(3, 5, 2).tolist() == [
        [0, 1, 5, 6], [2, 3, 7, 8], [4, -1, 9, -1], [10, 11, -1, -1], [12, 13, -1, -1], [14, -1, -1, -1],
    ]  # fmt: skip
    for rows, columns in ((1, 1), (4, 8), (7, 9), (1, 200)):
        units = contract.window_units(rows, columns, 4)
        assert sorted(units[units >= 0].tolist()) == list(range(rows * columns))
        assert (units >= 0).any(axis=1).all()


def test_every_size_fits_the_graph() -> None:
    """Resized images of any ratio have no more windows than the graph takes, nor longer sides than its tables."""
    c = constants()
    most = c.max_pixels // c.factor**2
    worst = 0
    for rows in range(1, int(most**0.5) + 1):
        columns = min(most // rows, (contract.MAX_RATIO + 1) * rows)
        worst = max(worst, len(contract.window_units(rows, columns, c.window_units)))
        assert columns * c.merge_size <= contract.MAX_GRID
    assert worst <= contract.MAX_WINDOWS


def test_round_trip_through_json() -> None:
    values = json.loads(json.dumps(constants().to_dict()))
    assert QwenVlConstants.from_dict(values) == constants()
    assert np.prod(contract.family_graphs(values, "fp16")["decoder"].tensor("logits").shape()) == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "above 0"),
        ({"max_pixels": 100}, "cut"),
        ({"min_pixels": 10**9}, "cut"),
        ({"image_token_id": 300}, "vocabulary"),
        ({"resample": "box"}, "resample"),
        ({"decoder": decoder_constants().to_dict()}, "rope 'default'"),
    ],
)
def test_wrong_constants(change: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        QwenVlConstants.from_dict({**constants().to_dict(), **change})
