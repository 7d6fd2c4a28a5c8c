"""GridSample written out with Gather: bilinear sampling that every TensorRT computes alike.

GridSample as defined by ONNX (https://onnx.ai/onnx/operators/onnx__GridSample.html). TensorRT deviates twice: since
opset 20 the mode is called ``linear`` and the parser, not knowing the word, samples the nearest pixel
(github.com/NVIDIA/TensorRT/issues/4646, mended by github.com/onnx/onnx-tensorrt/pull/1060, seen with 11.1 and
TensorRT for RTX 1.5); and strongly typed networks gave wrong values since 10.14.1
(github.com/pytorch/TensorRT/issues/4074). The rewrite takes opset 16 operators alone.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper

from pixano_edge.export.graph_edit import GraphEditor, attribute

SAMPLE = "sample"
"""Part of the names of all nodes made here, by which the fp16 conversion keeps them in fp32."""
_PADDINGS = ("zeros", "border")


def grid_sample_to_gather(edit: GraphEditor) -> int:
    """Bilinear GridSample over four dimensions becomes four Gathers and their weighted sum.

    Taken: modes ``bilinear`` and ``linear``, padding ``zeros`` and ``border``, both `align_corners`. Other modes are
    left as they are. Coordinates stay in the grid's element type, and so does the weighting: a grid in fp16 places
    samples no better than 1/1000 of the picture, so keep it in fp32.
    """
    changes = 0
    for node in edit.nodes("GridSample"):
        bilinear = attribute(node, "mode", "bilinear") in ("bilinear", "linear")
        if bilinear and attribute(node, "padding_mode", "zeros") in _PADDINGS and _is_flat(edit, node):
            changes += edit.replace(node.output[0], _Sampler(edit, node).build())
    return changes


def _is_flat(edit: GraphEditor, node: NodeProto) -> bool:
    return all(len(edit.shapes.get(name, ())) == 4 for name in node.input[:2])


class _Sampler:
    """Builds the nodes for one GridSample of image (N, C, H, W) and grid (N, h, w, 2)."""

    def __init__(self, edit: GraphEditor, node: NodeProto) -> None:
        self.edit = edit
        self.image, self.grid = node.input[0], node.input[1]
        self.kind = edit.types.get(self.grid, TensorProto.FLOAT)
        self.dtype = helper.tensor_dtype_to_np_dtype(self.kind)
        self.align = bool(attribute(node, "align_corners", 0))
        self.border = attribute(node, "padding_mode", "zeros") == "border"

    def build(self) -> str:
        """Name of the tensor (N, C, h, w) that replaces the node's output."""
        height, width = self._size(2), self._size(3)
        x, y = (self._pixels(axis, size) for axis, size in ((0, width), (1, height)))
        left, top = self._op("Floor", x), self._op("Floor", y)
        right_share, lower_share = self._op("Sub", x, left), self._op("Sub", y, top)
        one = self._float(1.0)
        columns = [(left, self._op("Sub", one, right_share)), (self._op("Add", left, one), right_share)]
        rows = [(top, self._op("Sub", one, lower_share)), (self._op("Add", top, one), lower_share)]
        flat = self._op("Reshape", self.image, self._ints([0, 0, -1]))
        corners = [
            self._corner(flat, row, column, self._op("Mul", row_share, column_share), height, width)
            for row, row_share in rows
            for column, column_share in columns
        ]
        total = corners[0]
        for corner in corners[1:]:
            total = self._op("Add", total, corner)
        # (N, C, h * w) to (N, C, h, w): sizes from image and grid, whichever of them are dynamic.
        image, grid = self._op("Shape", self.image), self._op("Shape", self.grid)
        head = self._op("Slice", image, self._ints([0]), self._ints([2]))
        tail = self._op("Slice", grid, self._ints([1]), self._ints([3]))
        return self._op("Reshape", total, self._op("Concat", head, tail, axis=0))

    def _corner(self, flat: str, row: str, column: str, share: str, height: str, width: str) -> str:
        """One of the four neighbours times its share, (N, C, h * w)."""
        inside_row, inside_column = self._clamp(row, height), self._clamp(column, width)
        if not self.border:
            # A clamped neighbour is a wrong pixel: outside the picture counts as zero.
            kept = self._op("And", self._op("Equal", inside_row, row), self._op("Equal", inside_column, column))
            share = self._op("Where", kept, share, self._float(0.0))
        # Integers before the product: a float loses whole numbers above 2**24, fp16 above 2048.
        index = self._op(
            "Add", self._op("Mul", self._whole(inside_row), self._whole(width)), self._whole(inside_column)
        )
        index = self._op("Reshape", index, self._ints([0, 1, -1]))
        image = self._op("Shape", self.image)
        channels = self._op("Slice", image, self._ints([1]), self._ints([2]))
        shape = self._op("Concat", self._ints([1]), channels, self._ints([1]), axis=0)
        pixels = self._op("GatherElements", flat, self._op("Expand", index, shape), axis=2)
        weights = self._op("Reshape", share, self._ints([0, 1, -1]))
        kind = self.edit.types.get(self.image, TensorProto.FLOAT)
        if kind != self.kind:
            weights = self._op("Cast", weights, to=kind)
        return self._op("Mul", pixels, weights)

    def _pixels(self, axis: int, size: str) -> str:
        """Coordinate -1..1 to pixels, (N, h, w)."""
        place = self._op("Gather", self.grid, self._ints(axis), axis=3)
        shifted = self._op("Add", place, self._float(1.0))
        half = self._float(0.5)
        if self.align:
            extent = self._op("Sub", size, self._float(1.0))
            pixels = self._op("Mul", self._op("Mul", shifted, half), extent)
        else:
            pixels = self._op("Sub", self._op("Mul", self._op("Mul", shifted, size), half), half)
        # Clamped before the weighting, or a border sample would extrapolate.
        return self._clamp(pixels, size) if self.border else pixels

    def _size(self, axis: int) -> str:
        """Height or width of the image as a single number of the grid's type."""
        dims = self.edit.shapes[self.image]
        size = dims[axis]
        if isinstance(size, int):
            return self._float(float(size))
        found = self._op("Gather", self._op("Shape", self.image), self._ints(axis), axis=0)
        return self._op("Cast", found, to=self.kind)

    def _clamp(self, value: str, size: str) -> str:
        last = self._op("Sub", size, self._float(1.0))
        return self._op("Max", self._op("Min", value, last), self._float(0.0))

    def _whole(self, value: str) -> str:
        return self._op("Cast", value, to=TensorProto.INT64)

    def _float(self, value: float) -> str:
        return self.edit.add_constant(np.array(value, self.dtype), "number")

    def _ints(self, value: list[int] | int) -> str:
        return self.edit.add_constant(np.array(value, np.int64), "ints")

    def _op(self, op: str, *inputs: str, **attributes: int) -> str:
        return self.edit.add_node(op, inputs, f"{SAMPLE}_{op.lower()}", **attributes)
