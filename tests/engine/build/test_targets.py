"""Targets, profiles and what is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.engine.build import library
from pixano_edge.engine.build.profiles import profiles
from pixano_edge.engine.build.targets import capabilities_of, check_targets, parse_target, parse_targets
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.errors import ContractError, DeviceError
from tests.support.system import write_system

KNOWN = ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]


@pytest.mark.parametrize(
    ("text", "capability"),
    [("sm_86", "8.6"), ("SM89", "8.9"), ("sm120", "12.0"), (" 8.7 ", "8.7"), ("12.1", "12.1"), ("sm_90a", "9.0")],
)
def test_targets_are_read(text: str, capability: str) -> None:
    assert parse_target(text) == capability


@pytest.mark.parametrize("text", ["", "sm_", "ampere", "8", "sm_8.6", "rtx3080", "sm_1200"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(DeviceError, match="not a GPU target"):
        parse_target(text)


def test_lists_are_split_sorted_and_each_once() -> None:
    assert parse_targets(["sm_120,sm_86", "8.9", "sm86,"]) == ["8.6", "8.9", "12.0"]


def test_members_of_the_enum() -> None:
    assert capabilities_of(["NONE", "CURRENT", "SM120", "SM86", "SM75"]) == ["7.5", "8.6", "12.0"]


@pytest.mark.parametrize(
    ("capability", "product"),
    [("8.7", "sm_87 (Jetson Orin)"), ("11.0", "Jetson Thor"), ("9.0", "H100"), ("6.1", "sm_61")],
)
def test_gpus_that_build_for_themselves_are_named_with_the_way(capability: str, product: str) -> None:
    with pytest.raises(DeviceError) as caught:
        check_targets(["8.6", capability], KNOWN, "1.7.1")
    assert product in caught.value.message
    assert "sm_86, " in caught.value.message
    assert "on the machine itself" in caught.value.action
    check_targets(["8.6", "12.1"], KNOWN, "1.7.1")


def test_profiles_of_the_mask_decoder() -> None:
    spec = sam2.mask_decoder(sam2.Sam2Constants(image_size=64, hidden_dim=16))
    typical, whole = (dict(p) for p in profiles(spec))
    assert typical["point_coords"] == ((1, 1, 2), (1, 2, 2), (4, 8, 2))
    assert whole["point_coords"] == ((1, 1, 2), (16, 11, 2), (256, 64, 2))
    assert whole["has_mask_input"] == ((1,), (16,), (256,))
    assert list(typical) == ["point_coords", "point_labels", "mask_input", "has_mask_input"]
    assert profiles(sam2.image_encoder(sam2.Sam2Constants())) == ()


def test_profiles_cover_the_whole_range_with_one_where_that_is_small() -> None:
    a = TensorSpec("a", "float32", ("B", 4))
    (only,) = profiles(GraphSpec("g", (a,), (a,), {"B": (1, 2, 6)}))
    assert dict(only) == {"a": ((1, 4), (2, 4), (6, 4))}
    with pytest.raises(ContractError, match="no range for"):
        profiles(GraphSpec("g", (a,), (a,)))


@pytest.mark.parametrize(
    ("names", "flavour", "major"),
    [
        (["tensorrt", "tensorrt_cu12", "tensorrt-cu12-libs"], "tensorrt", 12),
        (["tensorrt_cu13_bindings"], "tensorrt", 13),
        (["tensorrt_rtx_cu13_libs"], "tensorrt_rtx", 13),
        (["tensorrt_rtx_cu13_libs"], "tensorrt", None),
        (["tensorrt"], "tensorrt", None),
        ([], "tensorrt", None),
    ],
)
def test_cuda_major_from_the_wheels_name(names: list[str], flavour: str, major: int | None, tmp_path: Path) -> None:
    assert library.cuda_major(flavour, names, tmp_path) == major


def test_cuda_major_of_a_system_package(tmp_path: Path) -> None:
    system = {"usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}'}
    root = write_system(tmp_path, system)
    assert library.cuda_major("tensorrt", ["tensorrt"], root) == 12
    assert library.cuda_major("tensorrt", ["tensorrt-cu13"], root) == 13
    write_system(tmp_path, {"usr/local/cuda/version.json": "[]"})
    assert library.cuda_major("tensorrt", [], root) is None
