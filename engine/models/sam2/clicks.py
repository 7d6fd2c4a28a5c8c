"""Clicks on a CPU: what an image settles is computed once, and a click runs the rest (contract: `sam2.click_graphs`).

The answers are those of the mask decoder but for rounding. Prompts that these graphs are not made for go to the mask
decoder (`Clicks.suits`), and a bundle without them has it alone.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ...contracts import sam2
from ...runtime.base import Array, Binding, Buffer, Session
from ...runtime.memory import MemoryUse, model_memory
from ..chain import Chain
from .cache import Features
from .prompts import PromptBatch

GRAPHS = (sam2.IMAGE_PREPARE, sam2.MASK_PREPARE, sam2.CLICK_DECODER)

KEPT_IMAGES = 4
"""Images whose prepared tensors are kept (23 MB each at 1024 pixels); preparing one anew costs a fraction of a click
with the mask decoder."""


class Clicks:
    """The three graphs of clicks on one device. Use it under the lock of the model's decoder.

    Args:
        sessions: Open, by the names in `GRAPHS`.
        chain: Of the model.

    Attributes:
        prepared: How often an image was prepared.
    """

    def __init__(self, sessions: Mapping[str, Session], chain: Chain) -> None:
        self.prepared = 0
        self._image, self._mask, self._decoder = (sessions[name] for name in GRAPHS)
        self._chain = chain
        self._kept: OrderedDict[int, tuple[weakref.ref[Features], dict[str, Buffer]]] = OrderedDict()

    @staticmethod
    def suits(batch: PromptBatch) -> bool:
        """Whether these graphs take a batch: few points, and masks one prompt at a time."""
        prompts, points = batch.point_labels.shape
        return points <= sam2.MAX_CLICK_POINTS and (prompts == 1 or all(mask is None for mask in batch.masks))

    @property
    def runs(self) -> int:
        """Launches of the click decoder so far."""
        return self._decoder.runs

    def run(self, features: Features, batch: PromptBatch, answers: Collection[str]) -> dict[str, Array]:
        """Decodes a batch that `suits`; the outputs are valid until the next run.

        Raises:
            DeviceError: The back end failed.
        """
        chain, prepared = self._chain, self._prepare(features)
        if batch.masks[0] is not None:
            inputs = {s.name: prepared[s.name] for s in self._mask.spec.inputs if s.name != sam2.MASK_INPUT}
            mask = self._mask.prepare(borrowed=tuple(inputs))
            chain.write(mask, sam2.MASK_INPUT, batch.masks[0][None, None])
            with _bound(mask, inputs):
                chain.launch(mask)
            prepared = {**prepared, **{name: mask.outputs[sam2.MASKED + name] for name in inputs}}
        binding = self._decoder.prepare(batch.sizes, tuple(prepared))
        chain.write(binding, sam2.POINT_COORDS, batch.point_coords)
        chain.write(binding, sam2.POINT_LABELS, batch.point_labels)
        with _bound(binding, prepared):
            chain.launch(binding)
            return chain.fetch(binding, answers)

    def _prepare(self, features: Features) -> dict[str, Buffer]:
        """What clicks on an image share, computed at its first click and kept for the last few images."""
        held = self._kept.pop(id(features), None)
        if held is None or held[0]() is not features:
            if held is None and len(self._kept) >= KEPT_IMAGES:
                _, held = self._kept.popitem(last=False)
            outputs = self._image.spec.outputs
            device = self._chain.device
            buffers = held[1] if held else {s.name: device.empty(s.shape(), s.np_dtype) for s in outputs}
            binding = self._image.prepare(borrowed=(*features.buffers, *buffers))
            with _bound(binding, {**features.buffers, **buffers}):
                self._chain.launch(binding)
            self.prepared += 1
            held = (weakref.ref(features), buffers)
        self._kept[id(features)] = held
        return held[1]

    def memory(self) -> MemoryUse:
        """Bytes that the sessions and what is kept take now."""
        kept = sum(buffer.nbytes for _, buffers in self._kept.values() for buffer in buffers.values())
        return model_memory((self._image, self._mask, self._decoder), 0) + MemoryUse(bindings=kept)

    def info(self) -> dict[str, Any]:
        """Which prompts run here, and counters; JSON-ready."""
        return {
            "rule": f"prompts of at most {sam2.MAX_CLICK_POINTS} points, padding included, and mask inputs one prompt "
            f"at a time; others run {sam2.MASK_DECODER}",
            "runs": self.runs,
            "images_prepared": self.prepared,
            "images_kept": len(self._kept),
            sam2.CLICK_DECODER: self._decoder.info(),
        }

    def close(self) -> None:
        """Lets go of what is kept."""
        self._kept.clear()


@contextlib.contextmanager
def _bound(binding: Binding, buffers: Mapping[str, Buffer]) -> Iterator[None]:
    """Binds buffers for one run."""
    try:
        for name, buffer in buffers.items():
            binding.bind(name, buffer)
        yield
    finally:
        binding.release(*buffers)
