"""The options of `segment --auto`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import PromptError
from ..models.sam2.automatic_options import AutomaticOptions

PANEL = "Automatic segmentation (--auto)"
_DEFAULTS = AutomaticOptions()
FLAGS = {
    "points_per_side": "--points-per-side",
    "points_per_batch": "--points-per-batch",
    "pred_iou_thresh": "--pred-iou",
    "stability_score_thresh": "--stability",
    "stability_score_offset": "--stability-offset",
    "mask_threshold": "--mask-threshold",
    "box_nms_thresh": "--box-nms",
    "crop_n_layers": "--crop-layers",
    "crop_nms_thresh": "--crop-nms",
    "crop_overlap_ratio": "--crop-overlap",
    "crop_n_points_downscale_factor": "--crop-points-downscale",
    "min_mask_region_area": "--min-region",
    "min_area": "--min-area",
    "use_m2m": "--refine",
    "multimask_output": "--single-mask",
}
"""Command-line flag of every option of `AutomaticOptions` that has one."""


def _option(name: str, text: str) -> Any:
    default = getattr(_DEFAULTS, name)
    return typer.Option(
        FLAGS[name],
        help=text if default is None else f"{text} Default: {default:.3g}.",
        rich_help_panel=PANEL,
        show_default=False,
    )


def _switch(name: str, text: str) -> Any:
    return typer.Option(FLAGS[name], help=text, rich_help_panel=PANEL, show_default=False)


PointsPerSide = Annotated[int | None, _option("points_per_side", "Clicks per side of the grid.")]
PointsPerBatch = Annotated[
    int | None, _option("points_per_batch", "Clicks per decoder call; fewer take less device memory.")
]
PredIou = Annotated[float | None, _option("pred_iou_thresh", "Least predicted IoU, 0 to 1.")]
Stability = Annotated[float | None, _option("stability_score_thresh", "Least stability score, 0 to 1.")]
StabilityOffset = Annotated[
    float | None, _option("stability_score_offset", "Logits by which the stability score moves the border.")
]
MaskThreshold = Annotated[
    float | None, _option("mask_threshold", "Logit of the mask's border. Default: the checkpoint's.")
]
BoxNms = Annotated[
    float | None, _option("box_nms_thresh", "IoU of boxes above which the weaker mask is a duplicate, 0 to 1.")
]
CropLayers = Annotated[
    int | None,
    _option("crop_n_layers", "Also look at 4, 16, ... crops of the image, for small objects; 1 or 2 will do."),
]
CropNms = Annotated[float | None, _option("crop_nms_thresh", "Like --box-nms, between crops.")]
CropOverlap = Annotated[
    float | None, _option("crop_overlap_ratio", "Overlap of crops in short sides of the image, 0 to 1.")
]
CropPointsDownscale = Annotated[
    int | None, _option("crop_n_points_downscale_factor", "Divides --points-per-side from one crop layer to the next.")
]
MinRegion = Annotated[
    int | None, _option("min_mask_region_area", "Fill holes and remove islands of fewer pixels in every mask.")
]
MinArea = Annotated[int | None, _option("min_area", "Drop masks of fewer pixels.")]
Refine = Annotated[bool, _switch("use_m2m", "Ask again with every mask as a hint: three more decoder passes.")]
SingleMask = Annotated[bool, _switch("multimask_output", "One mask per click instead of three.")]


def automatic_options(auto: bool, given: dict[str, Any]) -> AutomaticOptions | None:
    """The options of ``--auto``, checked; None without it.

    Args:
        auto: Whether ``--auto`` was given.
        given: Values by name of `AutomaticOptions`; None where the flag was not given.

    Raises:
        typer.BadParameter: A flag without ``--auto``, or a value out of range.
    """
    set_here = {name: value for name, value in given.items() if value is not None}
    if not auto:
        if set_here:
            flags = ", ".join(FLAGS[name] for name in set_here)
            raise typer.BadParameter(f"{flags} works with --auto only: add it, or leave {flags} out.")
        return None
    options = AutomaticOptions(**set_here)
    try:
        options.check()
    except PromptError as error:
        text = str(error)
        for name in sorted(FLAGS, key=len, reverse=True):
            text = text.replace(name, FLAGS[name])
        raise typer.BadParameter(text) from error
    return options
