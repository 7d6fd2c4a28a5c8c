"""Opening a bundle of any detector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...bundle import Bundle
from ...contracts import owlv2
from ...errors import BundleError
from .base import Detector

GROUNDING_DINO = "grounding-dino"
FAMILIES = (*owlv2.FAMILIES, GROUNDING_DINO)
"""What `open_detector` opens."""


def open_detector(
    bundle: Bundle | Path | str,
    *,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    check: Callable[[], None] | None = None,
    force: bool = False,
    **options: Any,
) -> Detector:
    """Opens a detector of whatever family the bundle holds.

    Args:
        bundle: An open bundle or its folder.
        device: See `Sam2ImagePredictor.open`, as the next five.
        backend: Back end.
        precision: Variant.
        threads: Threads of one call.
        check: Called between the steps.
        force: Use a combination although it failed its check here.
        options: More arguments of the family's `open`, such as ``prove`` and ``warm_up``.

    Raises:
        BundleError: The bundle holds no detector; or as the family's `open`.
        DeviceError, ContractError: As the family's `open`.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    return _model(bundle).open(  # type: ignore[no-any-return]
        bundle,
        device=device,
        backend=backend,
        precision=precision,
        threads=threads,
        check=check,
        force=force,
        **options,
    )


def _model(bundle: Bundle) -> Any:
    """The class that runs a bundle; imported here, since a box needs one of them."""
    family = bundle.manifest.family
    if family in owlv2.FAMILIES:
        from ..owlv2.detector import Owlv2Detector

        return Owlv2Detector
    raise BundleError(
        f"Bundle '{bundle.manifest.name}' holds '{family}', which is no detector.",
        f"Detectors are {', '.join(FAMILIES)}.",
    )
