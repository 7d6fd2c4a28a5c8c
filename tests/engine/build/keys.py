"""Sample keys and boxes."""

from __future__ import annotations

from typing import Any

from pixano_edge.engine.build.key import Box, EngineKey

PROFILES = ((("a", ((1, 4), (2, 4), (8, 4))),),)


def make_key(**changes: Any) -> EngineKey:
    """An engine of full TensorRT, tuned to one product."""
    values: dict[str, Any] = {
        "graph": "image_encoder",
        "graph_sha256": "a" * 64,
        "variant": "fp16",
        "precision": "fp16",
        "profiles": PROFILES,
        "flags": ("recipe=1",),
        "flavour": "tensorrt",
        "version": "10.3.0",
        "cuda_major": 12,
        "compute_capabilities": ("8.7",),
        "device_name": "Orin",
        "sm_count": 16,
    }
    return EngineKey(**(values | changes))


def make_box(**changes: Any) -> Box:
    """The box that `make_key` is for."""
    values: dict[str, Any] = {
        "flavour": "tensorrt",
        "version": "10.3.0",
        "cuda_major": 12,
        "compute_capability": "8.7",
        "device_name": "Orin",
        "sm_count": 16,
    }
    return Box(**(values | changes))
