"""Qwen2.5-VL: checkpoint to bundle. Needs the extra `pixano-edge[export]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["export_qwen_vl"]


def export_qwen_vl(
    checkpoint: str | Path,
    destination: Path | str,
    *,
    revision: str | None = None,
    licence: str | None = None,
    **options: Any,
) -> Path:
    """Exports Qwen2.5-VL and proves it equal to PyTorch.

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
    from .family import QwenVlFamily

    return export_vlm(
        lambda: QwenVlFamily(load(checkpoint, revision=revision, licence=licence)), destination, **options
    )
