"""SmolVLM, SmolVLM2 and Idefics3: checkpoint to bundle. Needs the extra `pixano-edge[export]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["export_smolvlm"]


def export_smolvlm(
    checkpoint: str | Path,
    destination: Path | str,
    *,
    revision: str | None = None,
    licence: str | None = None,
    **options: Any,
) -> Path:
    """Exports SmolVLM and proves it equal to PyTorch.

    Args:
        checkpoint: Folder in transformers' format, or hub id.
        destination: Folder of the bundle; made only when everything has passed.
        revision: Branch, tag or commit of a hub id.
        licence: SPDX identifier that overrides what the checkpoint says.
        options: See `pixano_edge.export.vlm.export.export_vlm`.

    Returns:
        The bundle's folder.

    Raises:
        ExportError: See `export_vlm`.
    """
    # torch and transformers take seconds to import, so nothing is imported before it is used.
    from pixano_edge.export.vlm.export import export_vlm

    from .checkpoint import load
    from .family import SmolVlmFamily

    return export_vlm(
        lambda: SmolVlmFamily(load(checkpoint, revision=revision, licence=licence)), destination, **options
    )
