"""What each family is judged by: its own pipeline in the engine, run on given graph files."""

from __future__ import annotations

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.errors import CalibrationError

from .base import Task, TaskOptions


def open_task(bundle: Bundle, options: TaskOptions) -> Task:
    """The task of a bundle's family.

    Raises:
        CalibrationError: There is none, or `options` lack what the family needs.
    """
    from pixano_edge.engine.models.decoder.opening import FAMILIES as TEXT
    from pixano_edge.engine.models.detection.opening import FAMILIES as DETECTORS

    family = bundle.manifest.family
    if family == "sam2":
        from .sam2 import Sam2Task
        from .sam2_video import Sam2VideoTask

        return Sam2VideoTask(bundle, options) if options.video else Sam2Task(bundle, options)
    if options.video:
        raise CalibrationError(f"Bundles of the family '{family}' do not track.", "Leave --video out.")
    if family in DETECTORS:
        from .detector import DetectorTask

        return DetectorTask(bundle, options)
    if family in TEXT:
        from .text import TextTask

        return TextTask(bundle, options)
    raise CalibrationError(f"The family '{family}' cannot be calibrated.", "Update pixano-edge.")
