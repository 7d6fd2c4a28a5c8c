"""Variants that were made by calibration: what they were proven on, and what is asked of them on golden pictures.

Such a variant met a budget that its user set, on the user's own data (`CalibrationEntry`). Golden pictures are a few
that came with the bundle, often of another kind, so that they cannot repeat that judgement; they tell whether this
machine computes what the calibration saw. So the bar there is what the calibrating machine measured, or follows from
the budget where that is not known, instead of from the precision's name.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle.manifest import CalibrationEntry, Manifest

GOLDEN_SLACK = 3.0
"""How many times the budget's allowance may be missing on golden pictures: a budget of 0.98 asks for 0.94."""
GOLDEN_TOLERANCE = 0.02
"""What may be missing to the golden figure of the machine that published the variant: another CPU or GPU rounds
elsewhere."""
TRACKING_METRIC = "j"
"""Of calibrations that were judged on clips."""


def calibrations_of(manifest: Manifest, precision: str) -> list[CalibrationEntry]:
    """What is told about the variant that runs at a precision; empty for one that was exported."""
    return [
        entry
        for entry in manifest.calibrations
        if any(manifest.graphs[g].variants[entry.variant].precision == precision for g in entry.graphs)
    ]


def golden_bar(entries: Sequence[CalibrationEntry], *, clip: bool = False) -> float | None:
    """Lowest mean agreement with PyTorch on golden pictures that passes: near what it was when the variant was
    published, where that is known; else what the budget says.

    Args:
        entries: Of the variant.
        clip: For the golden clip. What was judged on clips counts for it alone, unless there is nothing else.

    Returns:
        None where no entry says anything: then the precision's own bar holds.
    """
    measured = [entry.golden for entry in entries if entry.golden is not None]
    if measured:
        return max(0.0, min(measured) - GOLDEN_TOLERANCE)
    same = [entry for entry in entries if (entry.metric == TRACKING_METRIC) == clip] or list(entries)
    if not same:
        return None
    return max(0.0, 1 - GOLDEN_SLACK * (1 - min(entry.budget for entry in same)))


def calibration_text(entries: Sequence[CalibrationEntry]) -> str:
    """``calibrated: mask_iou 0.9873 on 12 held-out samples (budget 0.98)``."""
    told = [
        f"{e.metric} {e.held_out:.4f} on {e.held_out_samples} held-out samples of {e.data} (budget {e.budget:g})"
        for e in entries
    ]
    return f"calibrated: {'; '.join(told)}"
