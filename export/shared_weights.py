"""One set of weights for several graphs: a later one names byte ranges of an earlier ONNX file as its external data.

External data of ONNX is a file, an offset and a length
(https://onnx.ai/onnx/repo-docs/ExternalData.html), and the weights of an ordinary ONNX file lie in it as plain bytes.
So a changed graph beside its original costs its nodes alone, some 50 kB, however large the model. TensorRT's parser
and ONNX Runtime read it like any other external data; both refuse paths outside the graph's own folder, so the
files lie side by side. Contents are compared, not names: the exporter numbers its constants anew in every graph.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from pixano_edge.engine.bundle.files import hash_file
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


@dataclass(frozen=True)
class Shared:
    """What `share_weights` made.

    Attributes:
        model: The copy.
        saved: Bytes that need not be stored twice, by the name of the file that holds them; empty when the copy
            equals the model.
    """

    model: onnx.ModelProto
    saved: dict[str, int]

    @property
    def holder(self) -> str | None:
        """Name of the file that holds most of the shared weights; None when nothing is shared."""
        return max(self.saved, key=lambda name: self.saved[name]) if self.saved else None


def share_weights(model: onnx.ModelProto, *holders: Path) -> Shared:
    """A copy whose initialisers refer to other files wherever one of those has the same bytes.

    Args:
        model: Weights inside; left as it is.
        holders: ONNX files in one folder, asked in this order. What they refer to themselves is referred to where it
            lies. None of these files may change afterwards, and the copy must be saved beside them.

    Raises:
        ExportError: A holder is not an ONNX file.
    """
    places = _places(holders)
    # Field by field, so that weights which are shared are never copied.
    graph = onnx.GraphProto(name=model.graph.name)
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    copy = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    copy.producer_name, copy.producer_version = model.producer_name, model.producer_version
    # A model that was read from shared files has their names; what counts is what the copy refers to.
    copy.metadata_props.extend(p for p in model.metadata_props if p.key not in (WEIGHTS_FILE, WEIGHTS_SHA256))
    saved: dict[str, int] = {}
    for tensor in model.graph.initializer:
        place = places.get(_digest(tensor.raw_data)) if len(tensor.raw_data) >= MIN_BYTES else None
        if place is None:
            copy.graph.initializer.append(tensor)
            continue
        saved[place.path.name] = saved.get(place.path.name, 0) + place.length
        shared = copy.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        shared.data_location = TensorProto.EXTERNAL
        entries = {"location": place.path.name, "offset": str(place.offset), "length": str(place.length)}
        for key, value in entries.items():
            shared.external_data.add(key=key, value=value)
    if saved:
        folder = holders[0].parent
        digests = [hash_file(folder / name) for name in sorted(saved)]
        digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        for key, value in ((WEIGHTS_FILE, ", ".join(sorted(saved))), (WEIGHTS_SHA256, digest)):
            copy.metadata_props.add(key=key, value=value)
    return Shared(copy, saved)


@dataclass(frozen=True)
class _Place:
    """Bytes in a file."""

    path: Path
    offset: int
    length: int


def _places(holders: Sequence[Path]) -> dict[bytes, _Place]:
    """Where the contents of initialisers lie, by their hash; the first holder wins."""
    found: dict[bytes, _Place] = {}
    for holder in holders:
        with holder.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for start, end in raw_data_ranges(data).values():
                if end - start >= MIN_BYTES:
                    found.setdefault(_digest(data[start:end]), _Place(holder, start, end - start))
        for tensor in onnx.load(holder, load_external_data=False).graph.initializer:
            entries = {e.key: e.value for e in tensor.external_data}
            if tensor.data_location == TensorProto.EXTERNAL and entries:
                place = _Place(holder.parent / entries["location"], int(entries["offset"]), int(entries["length"]))
                with place.path.open("rb") as file:
                    file.seek(place.offset)
                    found.setdefault(_digest(file.read(place.length)), place)
    return found


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


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
