"""Small engines built with the real TensorRT, without ONNX: for tests only.

``compute_capability`` is for TensorRT for RTX, for example ``SM86``; this machine's own GPU when None.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pixano_edge.engine.runtime.tensorrt_api import TensorRt
from pixano_edge.engine.runtime.tensorrt_callbacks import make_logger


def build_double(api: TensorRt, compute_capability: str | None = None) -> bytes:
    """``y = x + x`` of float32[2, 4]."""
    trt = api.module
    errors: list[str] = []
    logger = make_logger(trt, errors, [])
    builder, network = _network(api, logger)
    x = network.add_input("x", trt.float32, (2, 4))
    _output(network, network.add_elementwise(x, x, trt.ElementWiseOperation.SUM), "y")
    return _build(api, builder, network, builder.create_builder_config(), compute_capability, errors)


def build_project(api: TensorRt, weights: np.ndarray[Any, Any], compute_capability: str | None = None) -> bytes:
    """``y = x @ weights`` of float32[P, K] with P in profiles 1..4 and 1..64."""
    trt = api.module
    errors: list[str] = []
    logger = make_logger(trt, errors, [])
    builder, network = _network(api, logger)
    rows, columns = weights.shape
    x = network.add_input("x", trt.float32, (-1, rows))
    w = network.add_constant((rows, columns), trt.Weights(np.ascontiguousarray(weights)))
    none = trt.MatrixOperation.NONE
    _output(network, network.add_matrix_multiply(x, none, w.get_output(0), none), "y")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for low, typical, high in ((1, 2, 4), (1, 16, 64)):
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (low, rows), (typical, rows), (high, rows))
        config.add_optimization_profile(profile)
    return _build(api, builder, network, config, compute_capability, errors)


def build_positive(api: TensorRt, compute_capability: str | None = None) -> bytes:
    """``found`` = int64[K, 1] places of the positive values of float32[8]: a size that depends on data.

    TensorRT for RTX 1.7 cannot build it for any GPU: it has neither NonZero nor NMS ("no runners that implement it").
    """
    trt = api.module
    errors: list[str] = []
    logger = make_logger(trt, errors, [])
    builder, network = _network(api, logger)
    x = network.add_input("x", trt.float32, (8,))
    zero = network.add_constant((8,), trt.Weights(np.zeros(8, np.float32))).get_output(0)
    above = network.add_elementwise(x, zero, trt.ElementWiseOperation.GREATER).get_output(0)
    places = network.add_non_zero(above).get_output(0)  # [1, K]
    turned = network.add_shuffle(places)
    turned.first_transpose = trt.Permutation([1, 0])
    _output(network, network.add_cast(turned.get_output(0), trt.int64), "found")
    return _build(api, builder, network, builder.create_builder_config(), compute_capability, errors)


def _network(api: TensorRt, logger: Any) -> tuple[Any, Any]:
    trt = api.module
    builder = trt.Builder(logger)
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always so in RTX and from 11 on
    return builder, builder.create_network(0 if flags is None else 1 << int(flags))


def _output(network: Any, layer: Any, name: str) -> None:
    tensor = layer.get_output(0)
    tensor.name = name
    network.mark_output(tensor)


def _build(api: TensorRt, builder: Any, network: Any, config: Any, capability: str | None, errors: list[str]) -> bytes:
    if api.rtx:
        kinds = api.module.ComputeCapability
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(kinds, capability or "CURRENT"), 0)
        config.set_flag(api.module.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else it cannot be captured
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, errors
    return bytes(memoryview(engine))
