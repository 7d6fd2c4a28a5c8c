"""OWLv2 and OWL-ViT: checkpoint to bundle. Needs the extra `pixano-edge[export]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["export_owl"]


def export_owl(
    checkpoint: str | Path,
    destination: Path | str,
    family: str = "owlv2",
    *,
    revision: str | None = None,
    licence: str | None = None,
    **options: Any,
) -> Path:
    """Exports OWLv2 or OWL-ViT and proves it equal to PyTorch.

    Args:
        checkpoint: Folder in transformers' format, or hub id.
        destination: Folder of the bundle; made only when everything has passed.
        family: ``owlv2`` or ``owlvit``.
        revision: Branch, tag or commit of a hub id.
        licence: SPDX identifier that overrides what the checkpoint says.
        options: See `pixano_edge.export.detection.export.export_detector`.

    Returns:
        The bundle's folder.

    Raises:
        ExportError: See `export_detector`.
    """
    # torch and transformers take seconds to import, so nothing is imported before it is used.
    from pixano_edge.export.detection.export import export_detector

    from .checkpoint import load
    from .family import OwlFamily

    return export_detector(
        lambda: OwlFamily(load(checkpoint, family, revision=revision, licence=licence)), destination, **options
    )
