"""The layers of a network as TensorRT parsed it, as plain values. Runs in the child; imports nothing of TensorRT."""

from __future__ import annotations

import re
from typing import Any

from .compare import dtype_name

# Layers whose name alone does not say what they compute: the class to look at, and its attribute.
_OPERATION = {
    "UNARY": ("IUnaryLayer", "op"),
    "ELEMENTWISE": ("IElementWiseLayer", "op"),
    "ACTIVATION": ("IActivationLayer", "type"),
    "REDUCE": ("IReduceLayer", "op"),
    "POOLING": ("IPoolingLayer", "type"),
}
_ONNX = re.compile(r"\[ONNX Layer: (.*?)\]")


def describe_layers(trt: Any, network: Any) -> list[dict[str, Any]]:
    """One entry per layer of an ``INetworkDefinition``, in its order, JSON-ready.

    Returns:
        ``name``; ``type`` (of ``LayerType``); ``op``, what an elementwise or similar layer computes, or None;
        ``node``, the ONNX node that it came from, or None; ``inputs`` and ``outputs``, each a list of
        ``[tensor, dtype, shape]`` with -1 for an open size.
    """
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        origin = _ONNX.search(str(getattr(layer, "metadata", "") or ""))
        tensors = [
            [_tensor(get(i)) for i in range(count) if get(i) is not None]
            for get, count in ((layer.get_input, layer.num_inputs), (layer.get_output, layer.num_outputs))
        ]
        found.append(
            {
                "name": layer.name,
                "type": kind,
                "op": _operation(trt, layer, kind),
                "node": origin[1] if origin else None,
                "inputs": tensors[0],
                "outputs": tensors[1],
            }
        )
    return found


def _tensor(tensor: Any) -> list[Any]:
    shape = tuple(tensor.shape)
    return [tensor.name, dtype_name(tensor.dtype), list(shape)]


def _operation(trt: Any, layer: Any, kind: str) -> str | None:
    if kind not in _OPERATION:
        return None
    name, attribute = _OPERATION[kind]
    # `get_layer` returns the base class; NVIDIA's own samples reach the subclass's attributes this way.
    layer.__class__ = getattr(trt, name)
    return str(getattr(layer, attribute).name)
