"""Clicks on a CPU: what an image settles is computed once, and a click runs the rest (contract: `sam2.click_graphs`).

The answers are those of the mask decoder but for rounding. Prompts that these graphs are not made for go to the mask
decoder (`Clicks.suits`), and a bundle without them has it alone.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ...contracts import sam2
from ...runtime.base import Array, Binding, Buffer, Session
from ...runtime.memory import MemoryUse, model_memory
from ..chain import Chain
from .cache import EmbeddingCache, Features
from .prompts import PromptBatch

GRAPHS = (sam2.IMAGE_PREPARE, sam2.MASK_PREPARE, sam2.CLICK_DECODER)

KEPT_IMAGES = 4
"""Images whose prepared tensors are kept at most (23 MB each at 1024 pixels); preparing one anew costs a fraction of a
click with the mask decoder. One image's are work memory, those of more images come out of the cache's budget."""


class Clicks:
    """The three graphs of clicks on one device. Use it under the lock of the model's decoder.

    Args:
        sessions: Open, by the names in `GRAPHS`.
        chain: Of the model.
        cache: Whose budget holds what is kept of more than one image.

    Attributes:
        prepared: How often an image was prepared.
    """

    def __init__(self, sessions: Mapping[str, Session], chain: Chain, cache: EmbeddingCache) -> None:
        self.prepared = 0
        self._image, self._mask, self._decoder = (sessions[name] for name in GRAPHS)
        self._chain = chain
        self._cache = cache
        self._kept: OrderedDict[int, tuple[Callable[[], Features | None], dict[str, Buffer]]] = OrderedDict()
        self._nbytes = sum(math.prod(s.shape()) * s.np_dtype.itemsize for s in self._image.spec.outputs)

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
        key = id(features)
        held = self._kept.get(key)
        if held is None or held[0]() is not features:
            buffers = held[1] if held is not None else self._buffers()
            self._kept[key] = _nobodys, buffers  # as long as the run may fail
            binding = self._image.prepare(borrowed=(*features.buffers, *buffers))
            with _bound(binding, {**features.buffers, **buffers}):
                self._chain.launch(binding)
            self.prepared += 1
            held = self._kept[key] = weakref.ref(features), buffers
        self._kept.move_to_end(key)
        return held[1]

    def _buffers(self) -> dict[str, Buffer]:
        """Memory for one more image: that of one whose features are gone, new where the budget has it, else that of the
        image clicked on longest ago."""
        for key, (whose, buffers) in self._kept.items():
            if whose() is None:
                del self._kept[key]
                return buffers
        lent = bool(self._kept)
        if lent and (len(self._kept) >= KEPT_IMAGES or not self._cache.lend(self._nbytes)):
            return self._kept.popitem(last=False)[1][1]
        made = False
        try:
            device = self._chain.device
            buffers = {s.name: device.empty(s.shape(), s.np_dtype) for s in self._image.spec.outputs}
            made = True
            return buffers
        finally:
            if lent and not made:
                self._cache.take_back(self._nbytes)

    def memory(self) -> MemoryUse:
        """Bytes that the sessions and what is kept take now."""
        count = len(self._kept)
        kept = MemoryUse(bindings=min(count, 1) * self._nbytes, caches=max(count - 1, 0) * self._nbytes)
        return model_memory((self._image, self._mask, self._decoder)) + kept

    def info(self) -> dict[str, Any]:
        """Which prompts run here, and counters; JSON-ready."""
        return {
            "rule": f"prompts of at most {sam2.MAX_CLICK_POINTS} points, padding included, and mask inputs one prompt "
            f"at a time; others run {sam2.MASK_DECODER}",
            "runs": self.runs,
            "images_prepared": self.prepared,
            "images_kept": len(self._kept),
            "bytes_kept": len(self._kept) * self._nbytes,
            sam2.CLICK_DECODER: self._decoder.info(),
        }

    def forget(self) -> None:
        """Lets go of what is kept."""
        self._cache.take_back(max(len(self._kept) - 1, 0) * self._nbytes)
        self._kept.clear()


def _nobodys() -> None:
    """Stands for the reference to features of buffers whose content is unknown."""


@contextlib.contextmanager
def _bound(binding: Binding, buffers: Mapping[str, Buffer]) -> Iterator[None]:
    """Binds buffers for one run."""
    try:
        for name, buffer in buffers.items():
            binding.bind(name, buffer)
        yield
    finally:
        binding.release(*buffers)
