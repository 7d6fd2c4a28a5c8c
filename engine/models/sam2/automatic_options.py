"""Settings of automatic mask generation, with the names and defaults of upstream's ``SAM2AutomaticMaskGenerator``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...contracts.sam2 import MAX_PROMPTS
from ...errors import PromptError
from .crops import point_grid
from .prompts import DEFAULT_BATCH

MAX_POINTS_PER_SIDE = 256
MAX_CROP_LAYERS = 4
"""341 crops; each one runs the encoder."""


@dataclass(frozen=True, eq=False)
class AutomaticOptions:
    """Where to click, and which masks to keep.

    Attributes:
        points_per_side: Every crop of layer 0 has its square of clicks.
        points_per_batch: Clicks per decoder call.
        pred_iou_thresh: Masks whose predicted IoU is not above it go; 0 keeps all.
        stability_score_thresh: Masks below it go; 0 keeps all.
        stability_score_offset: Logits by which the mask's border is moved in and out for the stability score.
        mask_threshold: Logit of the mask's border; None takes the checkpoint's.
        box_nms_thresh: Within a crop, a mask goes whose box overlaps a mask of higher predicted IoU by a larger IoU.
        crop_n_layers: Also looks at crops of the image: layer n has 4**n. Finds small objects.
        crop_nms_thresh: Like `box_nms_thresh` between crops, where masks of smaller crops go first.
        crop_overlap_ratio: Overlap of the crops of layer 1, in short sides of the image; later layers have less.
        crop_n_points_downscale_factor: Layer n has `points_per_side` divided by this to the power of n.
        point_grids: (N, 2) x, y each, fractions of the crop's width and height, one per layer from 0 on; they
            replace the square grids.
        min_mask_region_area: Holes and islands of fewer pixels are filled and removed; 0 leaves masks as they are.
        min_area: Masks of fewer pixels go. Not an option upstream.
        use_m2m: Asks again with each mask's low-resolution logits as mask input before filtering.
        multimask_output: Three masks per click; False takes the single-mask output.
    """

    points_per_side: int = 32
    points_per_batch: int = DEFAULT_BATCH
    pred_iou_thresh: float = 0.8
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    mask_threshold: float | None = None
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: Sequence[npt.ArrayLike] | None = None
    min_mask_region_area: int = 0
    min_area: int = 0
    use_m2m: bool = False
    multimask_output: bool = True

    def check(self) -> list[npt.NDArray[np.float64]]:
        """Checks every setting and makes the grid of every layer: (N, 2) x, y as fractions of the crop.

        Raises:
            PromptError: A setting is out of range, or a layer has no click.
        """
        _whole("points_per_side", self.points_per_side, 1, MAX_POINTS_PER_SIDE)
        _whole("points_per_batch", self.points_per_batch, 1, MAX_PROMPTS)
        _whole("crop_n_layers", self.crop_n_layers, 0, MAX_CROP_LAYERS)
        _whole("crop_n_points_downscale_factor", self.crop_n_points_downscale_factor, 1, MAX_POINTS_PER_SIDE)
        for name in ("min_mask_region_area", "min_area"):
            _whole(name, getattr(self, name), 0, None)
        for name in (
            "pred_iou_thresh",
            "stability_score_thresh",
            "box_nms_thresh",
            "crop_nms_thresh",
            "crop_overlap_ratio",
        ):
            _real(name, getattr(self, name), 0.0, 1.0)
        _real("stability_score_offset", self.stability_score_offset, 0.0, math.inf)
        if self.mask_threshold is not None:
            _real("mask_threshold", self.mask_threshold, -math.inf, math.inf)
        return self._square_grids() if self.point_grids is None else self._own_grids(self.point_grids)

    def clicks(self) -> int:
        """Clicks on an image whose crops all have pixels."""
        return sum(len(grid) * 4**layer for layer, grid in enumerate(self.check()))

    def _square_grids(self) -> list[npt.NDArray[np.float64]]:
        grids = []
        for layer in range(self.crop_n_layers + 1):
            side = int(self.points_per_side / self.crop_n_points_downscale_factor**layer)
            if side < 1:
                raise PromptError(
                    f"Crop layer {layer} has no click: points_per_side is {self.points_per_side}, divided by "
                    f"crop_n_points_downscale_factor {self.crop_n_points_downscale_factor} once per layer.",
                    "Take more points, a smaller factor, or fewer crop layers.",
                )
            grids.append(point_grid(side))
        return grids

    def _own_grids(self, given: Sequence[npt.ArrayLike]) -> list[npt.NDArray[np.float64]]:
        if len(given) != self.crop_n_layers + 1:
            raise PromptError(
                f"point_grids holds {len(given)} grid(s), {self.crop_n_layers} crop layer(s) need "
                f"{self.crop_n_layers + 1}.",
                "Pass one grid for the whole image, then one per crop layer.",
            )
        grids = []
        for layer, points in enumerate(given):
            try:
                grid = np.asarray(points, np.float64)
            except (TypeError, ValueError) as error:
                raise PromptError(
                    f"point_grids[{layer}] cannot be read as numbers: {error}.", "Pass [[x, y], ...]."
                ) from error
            # Written so that NaN fails.
            if grid.ndim != 2 or grid.shape[1] != 2 or len(grid) == 0 or not ((grid >= 0) & (grid <= 1)).all():
                raise PromptError(
                    f"point_grids[{layer}] must be (N, 2) with N >= 1 and values 0 to 1, got shape {list(grid.shape)}.",
                    "Divide x by the width and y by the height of the image.",
                )
            grids.append(grid)
        return grids


def _whole(name: str, value: Any, least: int, most: int | None) -> None:
    """Refuses what is no whole number within the limits."""
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if number and value >= least and (most is None or value <= most):
        return
    span = f"{least} or more" if most is None else f"{least} to {most}"
    raise PromptError(f"{name} must be a whole number, {span}, got {value!r}.", f"Choose {span}.")


def _real(name: str, value: Any, least: float, most: float) -> None:
    """Refuses what is no finite number within the limits."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if number and math.isfinite(value) and least <= value <= most:
        return
    span = f"{least:g} to {most:g}" if math.isfinite(most) else "0 or more" if least == 0 else "a finite number"
    raise PromptError(f"{name} must be {span}, got {value!r}.", "Choose another value.")
