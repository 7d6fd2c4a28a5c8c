"""SAM 2 / SAM 2.1 image segmentation: checkpoint to bundle. Needs the extra `pixano-edge[export]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export import export_sam2

__all__ = ["export_sam2"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, so nothing is imported before it is used.
    if name == "export_sam2":
        from .export import export_sam2

        return export_sam2
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
