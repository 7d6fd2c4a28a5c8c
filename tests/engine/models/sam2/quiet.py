"""A predictor on the CPU device whose graphs write in place, so that what the predictor allocates can be counted."""

from __future__ import annotations

from typing import Any

from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.runtime import Array, Binding, Buffer, CpuDevice, Session, Shape
from tests.engine.models.sam2.fake import CONSTANTS, SPECS


class QuietSession(Session):
    """Leaves its outputs as they are, or fills them with a ramp; no allocation per run."""

    backend = "quiet"

    def _prepare_impl(self, shapes: dict[str, Shape], outputs: dict[str, Shape]) -> Binding:
        return Binding(self, shapes, outputs)

    def _bind_impl(self, binding: Binding, name: str, buffer: Buffer) -> None:
        pass

    def _write_impl(self, buffer: Buffer, source: Array) -> None:
        buffer.host()[...] = source

    def _run_impl(self, binding: Binding) -> None:
        for buffer in binding.outputs.values():
            buffer.host()[...] = 1.0

    def _read_impl(self, buffer: Buffer) -> Array:
        return buffer.host()

    def info(self) -> dict[str, Any]:
        return {}


def quiet_predictor() -> Sam2ImagePredictor:
    device = CpuDevice()
    return Sam2ImagePredictor(
        QuietSession(SPECS[sam2.IMAGE_ENCODER], device),
        QuietSession(SPECS[sam2.MASK_DECODER], device),
        CONSTANTS,
        bundle_hash="quiet",
        variant="fp32",
    )
