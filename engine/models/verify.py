"""Checking a bundle of any family on this box against PyTorch's answers stored in it (golden samples)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..bundle import Bundle
from ..contracts import sam2
from ..errors import BundleError
from .decoder.opening import FAMILIES as VLMS
from .detection.opening import FAMILIES as DETECTORS
from .verdicts import Verdict, VerdictKey, VerdictStore

Progress = Callable[[int, int], None]


class Report(Protocol):
    """What the check of any family tells; `sam2.verify.VerifyReport` has the fields of SAM 2."""

    bundle: str
    device: str
    backend: str
    precision: str
    samples: int
    mean_iou: float
    min_iou: float
    seconds: float
    problems: list[str]
    product: str
    compute_capability: str | None
    driver: str | None
    warnings: list[str]
    key: VerdictKey | None
    tensors: list[Any]
    """`sam2.verify.TensorError`, or what has its fields."""
    suspect: Any

    def figures(self) -> list[str]:
        """How far whole answers are from PyTorch's, a line each."""

    @property
    def passed(self) -> bool: ...

    def to_dict(self) -> dict[str, Any]: ...


def verify_bundle(
    bundle: Bundle | Path | str,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Runs the golden samples of a bundle on a device, as its family does; stored verdicts stay out of it.

    Args:
        bundle: An open bundle or its folder.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        backend: ``auto`` or a back end's name.
        precision: ``auto`` or a variant's name.
        threads: Threads of one call; None leaves it to the back end.
        progress: Called with (samples done, samples in all).

    Raises:
        BundleError: No golden samples, or damaged ones; an unknown family; or as the family's `open`.
        DeviceError, ContractError: As the family's `open`.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    if bundle.manifest.family == sam2.FAMILY:
        from .sam2 import verify as of_sam2

        return of_sam2.verify_bundle(bundle, device, backend, precision, threads=threads, progress=progress)
    if bundle.manifest.family in DETECTORS:
        from .detection import verify as of_detectors

        return of_detectors.verify_bundle(bundle, device, backend, precision, threads=threads, progress=progress)
    if bundle.manifest.family in VLMS:
        from .decoder import verify as of_vlms

        return of_vlms.verify_bundle(bundle, device, backend, precision, threads=threads, progress=progress)
    raise BundleError(
        f"Bundle '{bundle.manifest.name}' is of a family that this version does not run: '{bundle.manifest.family}'.",
        "Update pixano-edge.",
    )


def record_verdict(report: Report, store: VerdictStore | None = None, forced: bool = False) -> Verdict:
    """Keeps what a run said: later loads refuse a combination that failed here, unless it is `forced`.

    Args:
        report: Of `verify_bundle`.
        store: Where; None for the user's own.
        forced: Let a combination that failed be used all the same.
    """
    assert report.key is not None  # `verify_bundle` fills it
    verdict = Verdict.of(report.key, report, forced=forced)
    (store if store is not None else VerdictStore()).put(verdict)
    return verdict
