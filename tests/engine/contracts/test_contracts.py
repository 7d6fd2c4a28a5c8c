"""Tensor and graph specifications, and the SAM 2 contract."""

from __future__ import annotations

import numpy as np
import pytest

from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.contracts.base import TensorSpec
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.errors import ContractError

SPEC = TensorSpec("x", "float32", ("P", 3, "N"))


def test_shape_fills_dynamic_dimensions() -> None:
    assert SPEC.shape({"P": 2, "N": 5}) == (2, 3, 5)
    assert SPEC.dynamic == ("P", "N")


def test_shape_names_the_missing_dimension() -> None:
    with pytest.raises(ContractError, match="N"):
        SPEC.shape({"P": 2})


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), np.float32),
        np.zeros((2, 4, 5), np.float32),
        np.zeros((2, 3, 5), np.float64),
        np.zeros((2, 3, 5), np.float16),
    ],
)
def test_check_refuses_other_rank_size_or_dtype(array: np.ndarray) -> None:
    with pytest.raises(ContractError, match="expects float32"):
        SPEC.check(array)


def test_check_accepts_any_size_of_a_dynamic_dimension() -> None:
    SPEC.check(np.zeros((7, 3, 1), np.float32))


@pytest.mark.parametrize(("size", "dim"), [(1024, 256), (256, 128), (128, 32)])
def test_sam2_shapes_follow_the_constants(size: int, dim: int) -> None:
    constants = Sam2Constants(image_size=size, hidden_dim=dim)
    graphs = sam2.graphs(constants)
    encoder, decoder = graphs[sam2.IMAGE_ENCODER], graphs[sam2.MASK_DECODER]
    assert encoder.tensor(sam2.IMAGE_EMBED).dims == (1, dim, size // 16, size // 16)
    assert encoder.tensor(sam2.HIGH_RES_0).dims == (1, dim // 8, size // 4, size // 4)
    assert encoder.tensor(sam2.HIGH_RES_1).dims == (1, dim // 4, size // 8, size // 8)
    # What the encoder writes is what the decoder reads, tensor by tensor: they are bound to the same memory.
    assert encoder.outputs == decoder.inputs[:3]
    assert decoder.tensor(sam2.MASKS).dims == ("P", 4, size // 4, size // 4)
    assert set(decoder.ranges) == {"P", "N"}


def test_sam2_constants_round_trip_through_json_types() -> None:
    constants = Sam2Constants(image_size=512, hidden_dim=64)
    values = constants.to_dict()
    assert Sam2Constants.from_dict({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}) == constants


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 100},
        {"image_size": 0},
        {"image_size": 128.0},
        {"image_size": True},
        {"hidden_dim": 30},
        {"hidden_dim": -8},
        {"hidden_dim": "32"},
        {"mean": [0.5, 0.5]},
        {"mean": 0.5},
        {"mean": ["a", "b", "c"]},
        {"mean": [0.1, 0.2, float("nan")]},
        {"std": [0.2, 0.2, 0.0]},
        {"std": [0.2, 0.2, -0.2]},
        {"std": [0.2, 0.2, float("inf")]},
        {"mask_threshold": None},
        {"mask_threshold": float("nan")},
        {"dynamic_multimask_via_stability": 1},
        {"stability_delta": -0.1},
        {"stability_delta": "0.05"},
        {"stability_threshold": True},
    ],
)
def test_sam2_constants_refuse_what_does_not_fit(change: dict[str, object]) -> None:
    with pytest.raises(ContractError, match=next(iter(change))):
        Sam2Constants.from_dict({**Sam2Constants().to_dict(), **change})


@pytest.mark.parametrize("key", Sam2Constants().to_dict())
def test_sam2_constants_have_no_defaults_in_a_manifest(key: str) -> None:
    values = Sam2Constants().to_dict()
    del values[key]
    with pytest.raises(ContractError, match=f"'{key}' is missing"):
        Sam2Constants.from_dict(values)
    with pytest.raises(ContractError, match="'extra' is unknown"):
        Sam2Constants.from_dict({**Sam2Constants().to_dict(), "extra": 1})


VIDEO = sam2_video.Sam2VideoConstants(64, 7, 16, -1, 0, 1, True, True, (0.5,) * 17)


def test_constants_of_a_bundle_that_tracks() -> None:
    image = Sam2Constants().to_dict()
    assert sam2_video.constants_of(image) is None
    assert set(sam2_video.family_graphs(image)) == {"image_encoder", "mask_decoder"}
    both = {**image, sam2.VIDEO: VIDEO.to_dict()}
    assert sam2_video.constants_of(both) == VIDEO
    assert Sam2Constants.from_dict(both) == Sam2Constants()
    video = {"memory_attention", "track_decoder", "memory_encoder"}
    assert set(sam2_video.family_graphs(both)) == {"image_encoder", "mask_decoder", *video}


@pytest.mark.parametrize("broken", [[], "yes", {}, {**VIDEO.to_dict(), "num_memories": 0}])
def test_constants_of_tracking_that_do_not_fit(broken: object) -> None:
    with pytest.raises(ContractError, match="video constants"):
        sam2_video.family_graphs({**Sam2Constants().to_dict(), sam2.VIDEO: broken})


def test_profiles_of_the_memory_attention_hold_what_the_tracker_asks_for() -> None:
    """At 1024 pixels 64 objects with 64 memories each would be 69 GB of attention weights in bytes."""
    from pixano_edge.engine.models.sam2_video.steps import ATTENTION_BYTES

    assert ATTENTION_BYTES == 4 * sam2_video.MAX_ATTENTION
    spec = sam2_video.memory_attention(Sam2Constants(), VIDEO)
    tokens, parts = 64 * 64, 256 // 64
    for memories in range(1, sam2_video.MAX_MEMORIES + 1):
        for pointers in (0, 1, 16, sam2_video.MAX_POINTERS):
            most = max(1, sam2_video.MAX_ATTENTION // (tokens * (memories * tokens + pointers * parts)))
            sizes = {"B": min(most, sam2_video.MAX_OBJECTS), "M": memories, "K": pointers}
            assert any(all(p[d][0] <= n <= p[d][2] for d, n in sizes.items()) for p in spec.profiles), sizes
    for profile in spec.profiles:
        assert all(low <= usual <= high for low, usual, high in profile.values())
        objects, memories = profile["B"][2], profile["M"][2]
        assert objects == 1 or objects * memories * tokens**2 <= 2 * sam2_video.MAX_ATTENTION
    assert spec.profiles[-1]["M"][2] == sam2_video.MAX_MEMORIES
    assert len(spec.profiles) <= 6
    small = sam2_video.memory_attention(Sam2Constants(image_size=256, hidden_dim=128), VIDEO)
    assert small.profiles == ()  # the whole range is no trouble


def test_unknown_tensor_is_named() -> None:
    with pytest.raises(ContractError, match="nothing"):
        sam2.mask_decoder(Sam2Constants()).tensor("nothing")
