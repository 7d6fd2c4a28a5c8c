"""The contract of decoders with a KV cache."""

from __future__ import annotations

import json

import pytest

from pixano_edge.engine.build.profiles import profiles
from pixano_edge.engine.contracts import decoder
from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.engine.errors import ContractError


def constants(**changes: object) -> DecoderConstants:
    values: dict[str, object] = {
        "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden_size": 64, "vocab_size": 300,
        "max_length": 512, "rope": "default", "eos_ids": (2,),
    }  # fmt: skip
    return DecoderConstants(**{**values, **changes})  # type: ignore[arg-type]


def test_the_onnx_graph_keeps_a_cache_of_one_length() -> None:
    c = constants()
    spec = decoder.decoder(c)
    assert [t.name for t in spec.inputs] == [
        "inputs_embeds", "seqlens_k", "past_key.0", "past_value.0", "past_key.1", "past_value.1",
    ]  # fmt: skip
    for past, present in c.cache_names:
        assert spec.tensor(past).dims == spec.tensor(present).dims == (1, 2, "C", 16)
    assert spec.tensor("logits").dims == (1, 300)
    assert c.cache_shape(100) == spec.tensor("past_key.1").shape({"C": 100})
    assert c.cache_bytes(100) == 4 * 2 * 2 * 2 * 100 * 16 == 2 * c.cache_bytes(100, "float16")


def test_the_tensorrt_graph_grows_its_cache() -> None:
    spec = decoder.decoder(constants(rope="mrope"), "float16", "tensorrt")
    assert [t.name for t in spec.inputs][:3] == ["inputs_embeds", "cache_position", "position_ids"]
    assert spec.tensor("position_ids").dims == (3, "S")
    assert spec.tensor("past_value.1").dims == (1, 2, "P", 16)
    assert spec.tensor("present_value.1").dims == (1, 2, "T", 16)
    assert spec.tensor("past_value.1").dtype == "float16"
    assert spec.tensor("logits").dtype == "float32"
    step, prompt = (dict(p) for p in profiles(spec))
    assert step["inputs_embeds"] == ((1, 1, 64),) * 3
    assert step["past_key.0"][0] == (1, 2, 1, 16)
    assert prompt["past_key.0"][0] == (1, 2, 0, 16)


def test_round_trip_through_json() -> None:
    c = constants(eos_ids=(2, 7), bos_id=1)
    assert DecoderConstants.from_dict(json.loads(json.dumps(c.to_dict()))) == c


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "share"),
        ({"head_dim": 15}, "pairs"),
        ({"layers": 0}, "above 0"),
        ({"eos_ids": [300]}, "eos_ids"),
        ({"eos_ids": []}, "eos_ids"),
        ({"rope": "yarn"}, "rope"),
        ({"bos_id": -2}, "bos_id"),
        ({"more": 1}, "'more' is unknown"),
    ],
)
def test_wrong_constants(change: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        DecoderConstants.from_dict({**constants().to_dict(), **change})
