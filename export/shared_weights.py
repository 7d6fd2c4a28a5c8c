"""One set of weights for two graphs: the second names byte ranges of the first's ONNX file as its external data.

External data of ONNX is a file, an offset and a length
(https://onnx.ai/onnx/repo-docs/ExternalData.html), and the weights of an ordinary ONNX file lie in it as plain bytes.
So a changed graph beside its original costs its nodes alone, some 50 kB, however large the model. TensorRT's parser
and ONNX Runtime read it like any other external data; both refuse paths outside the graph's own folder, so the two
files lie side by side.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from pixano_edge.engine.errors import ExportError

WEIGHTS_FILE = "pixano_edge.weights"
"""Model metadata: name of the file that holds the weights."""
WEIGHTS_SHA256 = "pixano_edge.weights_sha256"
"""Model metadata: SHA-256 of that file. Without it, two models of one architecture would give equal graph files, and
a cache keyed by the graph file's hash would hand out the wrong engine."""
MIN_BYTES = 1024
"""Smaller initialisers stay in the graph: shapes and axes must be readable where the graph is parsed."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.name and raw_data.
_GRAPH, _INITIALIZER, _NAME, _RAW_DATA = 7, 5, 8, 9


def share_weights(model: onnx.ModelProto, holder: Path) -> tuple[onnx.ModelProto, int]:
    """A copy whose initialisers refer to `holder` wherever that file has the same bytes under the same name.

    Args:
        model: Weights inside; left as it is.
        holder: ONNX file with its weights inside. It must not change afterwards, and the copy must be saved beside
            it.

    Returns:
        The copy, and the bytes that need not be stored twice; with 0 it equals the model.

    Raises:
        ExportError: `holder` is not an ONNX file.
    """
    # Field by field, so that weights which are shared are never copied.
    graph = onnx.GraphProto(name=model.graph.name)
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    copy = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    copy.producer_name, copy.producer_version = model.producer_name, model.producer_version
    copy.metadata_props.extend(model.metadata_props)
    saved = 0
    with holder.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        ranges = raw_data_ranges(data)
        for tensor in model.graph.initializer:
            start, end = ranges.get(tensor.name, (0, 0))
            if len(tensor.raw_data) < MIN_BYTES or data[start:end] != tensor.raw_data:
                copy.graph.initializer.append(tensor)
                continue
            saved += end - start
            shared = copy.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            shared.data_location = TensorProto.EXTERNAL
            for key, value in (("location", holder.name), ("offset", str(start)), ("length", str(end - start))):
                shared.external_data.add(key=key, value=value)
        if saved:
            digest = hashlib.sha256(data).hexdigest()
            for key, value in ((WEIGHTS_FILE, holder.name), (WEIGHTS_SHA256, digest)):
                copy.metadata_props.add(key=key, value=value)
    return copy, saved


def raw_data_ranges(data: mmap.mmap | bytes) -> dict[str, tuple[int, int]]:
    """Where the raw bytes of each initialiser lie in an ONNX file: start and end by name.

    The protobuf library gives contents, not places, so the wire format is read here
    (https://protobuf.dev/programming-guides/encoding/).

    Raises:
        ExportError: The bytes are no ONNX file.
    """
    ranges = {}
    try:
        for graph, low, high in _fields(data, 0, len(data)):
            for number, start, end in _fields(data, low, high) if graph == _GRAPH else ():
                if number != _INITIALIZER:
                    continue
                parts = {field: (a, b) for field, a, b in _fields(data, start, end)}
                if _NAME in parts and _RAW_DATA in parts:
                    name = bytes(data[slice(*parts[_NAME])]).decode()
                    ranges[name] = parts[_RAW_DATA]
    except (IndexError, ValueError) as error:
        raise ExportError("The file to share weights with is no ONNX file.", "Please report this.") from error
    return ranges


def _fields(data: mmap.mmap | bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Length-delimited fields of one message: number, start and end of the contents."""
    position = start
    while position < end:
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            _, position = _varint(data, position)
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        elif kind == _BYTES:
            length, position = _varint(data, position)
            if position + length > end:
                raise ValueError("a field reaches beyond its message")
            yield tag >> 3, position, position + length
            position += length
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: mmap.mmap | bytes, position: int) -> tuple[int, int]:
    """A variable-length integer and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
