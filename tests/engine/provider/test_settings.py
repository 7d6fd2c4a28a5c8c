"""Which settings a load takes."""

from __future__ import annotations

from typing import Any

import pytest

from pixano_edge.engine.provider.errors import InvalidRequestError
from pixano_edge.engine.provider.settings import LoadOptions


def test_a_request_overrides_defaults_and_none_keeps_them() -> None:
    options = LoadOptions(device="cpu", threads=2).updated(
        {"precision": "fp16", "threads": None, "cache_mb": 0, "verify": False}, {"max_image_pixels": 1000}
    )
    assert options == LoadOptions("cpu", "auto", "fp16", 2, 0, False, 1000)
    assert LoadOptions().updated({}, {}) == LoadOptions()


@pytest.mark.parametrize(
    ("config", "processor", "message"),
    [
        ({"gpu": 1, "beam": 2}, {}, r"unknown keys: beam, gpu.*Accepted: device, backend, precision, threads"),
        ({}, {"mean": 0}, r"processor_config has unknown keys: mean.*max_image_pixels"),
        ({"device": "tpu"}, {}, "cuda:N"),
        ({"device": 0}, {}, "device"),
        ({"backend": "onnx"}, {}, "onnxruntime"),
        ({"precision": "fp64"}, {}, "fp16"),
        ({"precision": []}, {}, "fp16"),
        ({"threads": 0}, {}, "threads"),
        ({"threads": True}, {}, "threads"),
        ({"cache_mb": float("nan")}, {}, "cache_mb"),
        ({"cache_mb": -1}, {}, "cache_mb"),
        ({"verify": "no"}, {}, "true or false"),
        ({}, {"max_image_pixels": 10**12}, "above this server's"),
        ({}, {"max_image_pixels": 2.5}, "whole number"),
        ("device=cpu", {}, "mapping"),
        ({}, [1], "mapping"),
    ],
)
def test_refused(config: Any, processor: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        LoadOptions().updated(config, processor)


def test_defaults_of_the_provider_are_checked_too() -> None:
    with pytest.raises(InvalidRequestError, match="device"):
        LoadOptions(device="gpu").check()
    assert LoadOptions(max_image_pixels=10**12).check().max_image_pixels == 10**12
