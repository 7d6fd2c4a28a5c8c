"""The contract of SmolVLM."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pixano_edge.engine.contracts import smolvlm
from pixano_edge.engine.contracts.smolvlm import SmolVlmConstants
from pixano_edge.engine.errors import ContractError

from .test_decoder import constants as decoder_constants


def constants(**changes: Any) -> SmolVlmConstants:
    values: dict[str, Any] = {
        "decoder": decoder_constants(), "image_size": 64, "patch_size": 8, "scale_factor": 2, "image_seq_len": 16,
        "longest_edge": 256, "split": True, "resample": "lanczos", "rescale": 1 / 255, "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5), "image_token": "<image>", "image_token_id": 290,
        "fake_token": "<fake_token_around_image>", "global_token": "<global-img>",
    }  # fmt: skip
    return SmolVlmConstants(**{**values, **changes})


def test_shapes_follow_the_constants() -> None:
    graphs = smolvlm.graphs(constants())
    assert list(graphs) == ["vision_encoder", "embed_tokens", "decoder"]
    assert graphs["vision_encoder"].inputs[0].dims == ("T", 3, 64, 64)
    assert graphs["vision_encoder"].outputs[0].dims == ("T", 16, 64)
    assert graphs["embed_tokens"].outputs[0].dims == (1, "S", 64)


def test_published_sizes() -> None:
    constants(image_size=512, patch_size=16, scale_factor=4, image_seq_len=64)  # 256M and 500M
    constants(image_size=384, patch_size=14, scale_factor=3, image_seq_len=81)  # 2.2B: 27 whole patches
    constants(image_size=364, patch_size=14, scale_factor=2, image_seq_len=169)  # Idefics3


def test_round_trip_through_json() -> None:
    c = constants()
    values = json.loads(json.dumps(c.to_dict()))
    assert SmolVlmConstants.from_dict(values) == c
    half = smolvlm.family_graphs(values, "fp16", "tensorrt")["decoder"]
    assert half.tensor("past_key.0").dtype == "float16"
    assert half.tensor("past_key.0").dims[2] == "P"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_seq_len": 15}, "features"),
        ({"scale_factor": 3}, "joined"),
        ({"patch_size": 65}, "do not fit"),
        ({"image_token_id": 300}, "vocabulary"),
        ({"split": 1}, "split"),
        ({"resample": "box"}, "resample"),
        ({"tile_token": "<row>"}, "tile_token"),
        ({"decoder": 3}, "decoder"),
    ],
)
def test_wrong_constants(change: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        SmolVlmConstants.from_dict({**constants().to_dict(), **change})
