"""Engines for tests of the TensorRT back end: what the fake TensorRT takes for serialised ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.runtime.base import Array
from pixano_edge.engine.runtime.tensorrt import TrtSession
from pixano_edge.engine.runtime.tensorrt_api import TensorRt
from tests.support.fake_tensorrt import FakeTensorRt, Plan
from tests.support.gpu_stub import GpuStub

FIXED, DYNAMIC, OPEN = b"fixed", b"dynamic", b"open"

FIXED_SPEC = GraphSpec("fixed", (TensorSpec("x", "float32", (2, 4)),), (TensorSpec("y", "float32", (2, 4)),))
DYNAMIC_SPEC = GraphSpec(
    "dynamic",
    (TensorSpec("x", "float32", ("P", 4)),),
    (TensorSpec("y", "float32", ("P", 4)),),
    {"P": (1, 2, 64)},
)
OPEN_SPEC = GraphSpec(
    "open", (TensorSpec("x", "float32", (8,)),), (TensorSpec("found", "int64", ("K", 1)),), {"K": (0, 2, 4)}
)


def double(inputs: dict[str, Array]) -> Mapping[str, Array]:
    return {"y": inputs["x"] * 2}


def positive(inputs: dict[str, Array]) -> Mapping[str, Array]:
    return {"found": np.argwhere(inputs["x"] > 0).astype(np.int64)}


def profile(low: int, typical: int, high: int) -> dict[str, Any]:
    return {"x": ((low, 4), (typical, 4), (high, 4))}


def fixed(**changes: Any) -> Plan:
    shape = ("FLOAT", (2, 4))
    return Plan(**{"inputs": {"x": shape}, "outputs": {"y": shape}, "function": double} | changes)


def dynamic(**changes: Any) -> Plan:
    """Three profiles: 1..4, 1..16, 1..64, of 1, 4 and 16 KiB of scratch memory."""
    values: dict[str, Any] = {
        "inputs": {"x": ("FLOAT", (-1, 4))},
        "outputs": {"y": ("FLOAT", (-1, 4))},
        "function": double,
        "profiles": [profile(1, 16, 64), profile(1, 2, 4), profile(1, 8, 16)],
        "scratch": [16384, 1024, 4096],
    }
    return Plan(**values | changes)


def opened(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "inputs": {"x": ("FLOAT", (8,))},
        "outputs": {"found": ("INT64", (-1, 1))},
        "function": positive,
        "open_outputs": ("found",),
    }
    return Plan(**values | changes)


def fake(device: GpuStub, rtx: bool = False, **plans: Plan) -> FakeTensorRt:
    """A TensorRT that knows the three engines; keyword arguments replace what they are."""
    known = {"fixed": fixed(), "dynamic": dynamic(), "open": opened()} | plans
    return FakeTensorRt(device, {name.encode(): plan for name, plan in known.items()}, rtx)


def session(device: GpuStub, trt: FakeTensorRt, engine: bytes = FIXED, **options: Any) -> TrtSession:
    spec = {FIXED: FIXED_SPEC, DYNAMIC: DYNAMIC_SPEC, OPEN: OPEN_SPEC}[engine]
    api = TensorRt(trt, "tensorrt_rtx" if trt.rtx else "tensorrt")
    return TrtSession(engine, spec, device, api=api, options=options)
