"""One file of weights for several graphs.

A decoder of a few hundred million parameters does not fit into an ONNX file, which ends at 2 GiB, and its two targets,
its token embedding and its tied head hold the same matrices. So these lie once in a file of their own that the graphs
name as external data (https://onnx.ai/onnx/repo-docs/ExternalData.html).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from pixano_edge.engine.bundle.files import hash_file, os_errors
from pixano_edge.export.shared_weights import MIN_BYTES, WEIGHTS_FILE, WEIGHTS_SHA256

ALIGNMENT = 4096
"""Of every tensor in the file; a page, so that a runtime can map it instead of reading it."""


class WeightStore:
    """Writes tensors to a file, each content once. A context manager; graphs are finished with `seal` afterwards.

    Args:
        path: The new file; graphs that use it lie in the same folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, tuple[int, int]] = {}
        self._size = 0
        self._file: Any = None

    def __enter__(self) -> WeightStore:
        with os_errors(f"writing '{self.path.name}'"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def tensor(self, name: str, values: npt.NDArray[Any]) -> TensorProto:
        """An initialiser with these values, inside the graph where they are small, else in the file."""
        if values.nbytes < MIN_BYTES:
            return numpy_helper.from_array(values, name)
        data = np.ascontiguousarray(values)
        digest = hashlib.sha256(data.data).digest()
        place = self._places.get(digest)
        if place is None:
            with os_errors(f"writing '{self.path.name}'"):
                self._file.write(b"\0" * (-self._size % ALIGNMENT))
                start = self._file.tell()
                self._file.write(data)
            place = self._places[digest] = (start, data.nbytes)
            self._size = start + data.nbytes
        tensor = TensorProto(
            name=name, data_type=helper.np_dtype_to_tensor_dtype(data.dtype), dims=data.shape
        )  # fmt: skip
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", str(place[0])), ("length", str(place[1]))):
            tensor.external_data.add(key=key, value=value)
        return tensor

    def seal(self, *models: onnx.ModelProto) -> None:
        """Puts the closed file's name and hash into graphs: two models of one architecture have equal nodes, and a
        cache of engines knows a graph by the hash of its file."""
        digest = hash_file(self.path)
        for model in models:
            for key, value in ((WEIGHTS_FILE, self.path.name), (WEIGHTS_SHA256, digest)):
                model.metadata_props.add(key=key, value=value)
