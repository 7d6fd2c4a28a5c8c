"""From an `nn.Module` to a clean ONNX file that matches its contract."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import ExportError
from pixano_edge.export.tensorrt_passes import PLAIN_PASSES, apply_passes

OPSET = 18
_ONNX_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
}


def export_graph(module: nn.Module, spec: GraphSpec, example: tuple[Tensor, ...]) -> onnx.ModelProto:
    """Exports a module with torch's dynamo exporter.

    Args:
        module: In eval mode; inputs and outputs in the order of `spec`.
        spec: Names, dynamic dimensions and their ranges.
        example: Inputs to trace with; dynamic sizes must not be 0 or 1.

    Raises:
        ExportError: The exporter failed, or the graph does not match its contract.
    """
    dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, _, high) in spec.ranges.items()}
    shapes = tuple({i: dims[d] for i, d in enumerate(t.dims) if isinstance(d, str)} for t in spec.inputs)
    with _quiet(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                module,
                example,
                input_names=[t.name for t in spec.inputs],
                output_names=[t.name for t in spec.outputs],
                dynamic_shapes=shapes if dims else None,
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
            raise ExportError(
                f"torch could not export '{spec.name}': {str(error).splitlines()[0]}",
                "This release of torch may be too new or too old; see the versions in pyproject.toml.",
            ) from error
        model: onnx.ModelProto = program.model_proto
    clean(model, spec.name)
    apply_passes(model, PLAIN_PASSES)
    check_contract(model, spec)
    return model


def clean(model: onnx.ModelProto, name: str) -> None:
    """Removes what only the exporting machine needs: stack traces, file paths, symbolic shapes of inner tensors."""
    graph = model.graph
    graph.name = name
    for holder in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        holder.doc_string = ""
        del holder.metadata_props[:]
    del graph.value_info[:]
    for node in graph.node:
        if node.op_type == "Reshape":
            # The flag only matters for a size of 0, which no graph has; runtimes differ in taking it.
            kept = [a for a in node.attribute if a.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)


def check_contract(model: onnx.ModelProto, spec: GraphSpec) -> None:
    """Compares names, order, element types, ranks and dimensions of a graph with its contract.

    Raises:
        ExportError: With the first difference.
    """
    for kind, values, specs in (
        ("input", model.graph.input, spec.inputs),
        ("output", model.graph.output, spec.outputs),
    ):
        if [v.name for v in values] != [s.name for s in specs]:
            raise ExportError(
                f"Graph '{spec.name}' has {kind}s {[v.name for v in values]}, the contract {[s.name for s in specs]}.",
                "Export and contract must change together.",
            )
        for value, tensor in zip(values, specs):
            kept = value.type.tensor_type
            found = tuple(d.dim_param or d.dim_value for d in kept.shape.dim)
            if kept.elem_type != _ONNX_TYPES[tensor.dtype] or found != tensor.dims:
                raise ExportError(
                    f"{kind.capitalize()} '{tensor.name}' of '{spec.name}' is {found} of type {kept.elem_type}, "
                    f"the contract says {tensor.dims} {tensor.dtype}.",
                    "Export and contract must change together.",
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's remarks about optional libraries and renamed dimensions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
