"""Where automatic mask generation looks: overlapping crops of an image, and the grid of clicks on each.

Follows ``generate_crop_boxes``, ``build_all_layer_point_grids`` and ``is_box_near_crop_edge`` of upstream's
``sam2/utils/amg.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Box = tuple[int, int, int, int]

EDGE_TOLERANCE = 20
"""Pixels within which a box touches an edge, as upstream has it."""


@dataclass(frozen=True)
class Crop:
    """A part of an image.

    Attributes:
        box: x1, y1, x2, y2 in pixels; x2 and y2 are the first ones outside.
        layer: 0 is the whole image; layer n cuts it into 2**n by 2**n parts.
    """

    box: Box
    layer: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        x1, y1, x2, y2 = self.box
        return y2 - y1, x2 - x1

    @property
    def area(self) -> int:
        height, width = self.size
        return height * width


def crop_image(size: tuple[int, int], layers: int, overlap_ratio: float) -> list[Crop]:
    """The whole image, then the crops layer by layer, column by column.

    The crops of layer 1 overlap by `overlap_ratio` of the image's short side, those of layer n by that divided by
    2**(n - 1). Crops without pixels, which images of a few pixels give, and repeated ones are left out.

    Args:
        size: (height, width) of the image.
        layers: Layers below the whole image.
        overlap_ratio: 0 to 1.
    """
    height, width = size
    crops = [Crop((0, 0, width, height), 0)]
    boxes = {crops[0].box}
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / count))
        long = [math.ceil((overlap * (count - 1) + side) / count) for side in (width, height)]
        for i in range(count):
            for j in range(count):
                x, y = (long[0] - overlap) * i, (long[1] - overlap) * j
                box = (x, y, min(x + long[0], width), min(y + long[1], height))
                if box[0] < box[2] and box[1] < box[3] and box not in boxes:
                    boxes.add(box)
                    crops.append(Crop(box, layer))
    return crops


def point_grid(points_per_side: int) -> npt.NDArray[np.float64]:
    """(n * n, 2) x, y as fractions of width and height: centres of an even grid, row by row."""
    steps = (np.arange(points_per_side) + 0.5) / points_per_side
    x, y = np.meshgrid(steps, steps)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def touches_inner_edge(box: Box, crop: Crop, size: tuple[int, int]) -> bool:
    """Whether a box ends at an edge of the crop that is not near the same edge of the image: its object goes on there.

    Args:
        box: x1, y1, x2, y2 in pixels of the image.
        crop: Where the box was found.
        size: (height, width) of the image.
    """
    outer = (0, 0, size[1], size[0])
    return any(
        abs(side - inner) <= EDGE_TOLERANCE < abs(side - edge) for side, inner, edge in zip(box, crop.box, outer)
    )
