"""What makes two engines different, and which box an engine fits."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pixano_edge.engine.build.key import Box, EngineKey
from pixano_edge.engine.errors import BundleError, DeviceError
from pixano_edge.engine.runtime.base import DeviceInfo

from .keys import make_box, make_key

CHANGES: dict[str, Any] = {
    "graph": "mask_decoder",
    "graph_sha256": "b" * 64,
    "variant": "fp16-tensorrt",
    "precision": "fp32",
    "profiles": (),
    "flags": ("recipe=1", "tf32"),
    "flavour": "tensorrt_rtx",
    "version": "10.3.1",
    "cuda_major": 13,
    "compute_capabilities": ("8.7", "8.9"),
    "device_name": "Orin NX",
    "sm_count": 8,
}


def test_every_part_changes_the_digest() -> None:
    assert set(CHANGES) == {f.name for f in dataclasses.fields(EngineKey)}
    digests = {make_key(**{name: value}).digest for name, value in CHANGES.items()}
    assert len(digests) == len(CHANGES)
    assert make_key().digest not in digests
    assert make_key().digest == make_key().digest


def test_survives_json() -> None:
    key = make_key()
    assert EngineKey.from_dict(json.loads(json.dumps(key.to_dict()))) == key
    rtx = make_key(device_name=None, sm_count=None, cuda_major=None)
    assert EngineKey.from_dict(json.loads(json.dumps(rtx.to_dict()))) == rtx


@pytest.mark.parametrize(
    "change", [{"extra": 1}, {"profiles": 3}, {"profiles": [[["a", [[1]]]]]}, {"sm_count": "many"}, {"flags": None}]
)
def test_a_key_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="key of an engine cannot be read"):
        EngineKey.from_dict(make_key().to_dict() | change)


def test_a_key_without_a_field_is_refused() -> None:
    values = make_key().to_dict()
    del values["version"]
    with pytest.raises(BundleError, match="cannot be read"):
        EngineKey.from_dict(values)


def test_fits_the_box_it_was_built_on() -> None:
    assert make_key().misfits(make_box()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flavour": "tensorrt_rtx"}, "built by tensorrt, this box has tensorrt_rtx"),
        ({"version": "10.3.1"}, "this box has 10.3.1"),
        ({"cuda_major": 13}, "CUDA 12, this box has 13"),
        ({"cuda_major": None}, "CUDA 12, this box has an unknown number"),
        ({"compute_capability": "8.6"}, "capability 8.7, this GPU has 8.6"),
        ({"device_name": "Orin NX"}, "'Orin NX'"),
        ({"sm_count": 8}, "16 multiprocessors, this GPU has 8"),
        ({"sm_count": None}, "16 multiprocessors, this GPU has an unknown number"),
    ],
)
def test_each_difference_of_the_box_counts(change: dict[str, Any], words: str) -> None:
    (reason,) = make_key().misfits(make_box(**change))
    assert words in reason


def test_an_engine_for_listed_gpus_fits_each_of_them() -> None:
    key = make_key(
        flavour="tensorrt_rtx", version="1.7.1", compute_capabilities=("8.6", "8.9"), device_name=None, sm_count=None
    )
    box = make_box(flavour="tensorrt_rtx", version="1.7.1", device_name="RTX A2000", sm_count=26)
    for capability, fits in (("8.6", True), ("8.9", True), ("8.0", False), ("12.0", False)):
        assert (not key.misfits(dataclasses.replace(box, compute_capability=capability))) == fits


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.3.0", "10.3.0", True),
        ("10.3.0", "10.16.2", True),
        ("10.3.0", "11.1.0", True),
        ("10.16.2", "10.3.0", False),
        ("11.0.0", "10.16.2", False),
        ("11.0.0", "12.0.0", False),
    ],
)
def test_version_compatible_engines_run_on_newer_releases_only(built: str, here: str, fits: bool) -> None:
    key = make_key(flags=("recipe=1", "version_compatible"), version=built)
    assert (key.misfits(make_box(version=here)) == []) == fits
    if built != here:
        assert make_key(version=built).misfits(make_box(version=here))


def test_hardware_compatible_engines() -> None:
    plus = make_key(flags=("hardware_compatible=ampere_plus",), device_name=None, sm_count=None)
    assert plus.misfits(make_box(compute_capability="12.0", device_name="RTX 5090", sm_count=170)) == []
    assert plus.misfits(make_box(compute_capability="7.5", device_name="T4", sm_count=40))
    same = make_key(flags=("hardware_compatible=same_compute_capability",), device_name=None, sm_count=None)
    assert same.misfits(make_box(device_name="Orin NX", sm_count=8)) == []
    assert same.misfits(make_box(compute_capability="8.6"))


def test_a_box_comes_from_a_devices_facts() -> None:
    info = DeviceInfo("Orin", "cuda", compute_capability="8.7", extra={"multiprocessors": "16"})
    assert Box.of(info, "tensorrt", "10.3.0", 12) == make_box()
    assert Box.of(dataclasses.replace(info, extra={}), "tensorrt", "10.3.0", 12).sm_count is None


@pytest.mark.parametrize("info", [DeviceInfo("cpu", "cpu"), DeviceInfo("odd", "cuda")])
def test_other_devices_are_refused(info: DeviceInfo) -> None:
    with pytest.raises(DeviceError, match="needs a CUDA device"):
        Box.of(info, "tensorrt", "10.3.0", 12)
