"""What the SAM 2 predictor takes and returns: embeddings, answers, and the decoder's raw outputs."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...contracts import sam2
from ...errors import PromptError
from ...runtime.base import Device
from .cache import EmbeddingKey, Features


@dataclass(frozen=True, eq=False)
class Embedding:
    """Features of one image, ready for the decoder. Keeps its buffers from being recycled while it lives.

    Attributes:
        features: Buffers on the predictor's device; read only.
        original_size: (height, width) of the image.
        bundle_hash: Bundle that made the features, or None when a client sent them.
        device: Where the buffers are.
        lock: Held while the device's stream is used.
        key: What the features depend on; None when a client sent them, or where they were not to be cached.
    """

    features: Features
    original_size: tuple[int, int]
    bundle_hash: str | None
    device: Device
    lock: AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext, repr=False)
    key: EmbeddingKey | None = None

    @property
    def image_embed(self) -> npt.NDArray[np.float32]:
        """(1, C, G, G) float32, the no-memory embedding included; a copy that the caller owns."""
        (embed,) = self._to_host(sam2.IMAGE_EMBED)
        return embed

    @property
    def high_res(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(1, C/8, 4G, 4G) and (1, C/4, 2G, 2G) float32; copies that the caller owns."""
        first, second = self._to_host(sam2.HIGH_RES_0, sam2.HIGH_RES_1)
        return first, second

    def _to_host(self, *names: str) -> list[npt.NDArray[Any]]:
        """Copies of some buffers in host memory that the caller owns; one wait for all."""
        buffers = [self.features.buffers[name] for name in names]
        with self.lock:
            self.features.await_on(self.device)
            copies = []
            for buffer in buffers:
                if buffer.array is None:
                    host = self.device.host_empty(buffer.shape, buffer.dtype)
                    self.device.copy(host, buffer)
                    copies.append(host.host())
            self.device.synchronize()
        staged = iter(copies)
        return [np.array(next(staged) if b.array is None else b.array) for b in buffers]


@dataclass(frozen=True, eq=False)
class Sam2Prediction:
    """Answers to P prompts with M masks each. All arrays belong to the caller.

    Attributes:
        masks: (P, M, H, W) bool at the size of the original image.
        scores: (P, M) float32, the model's own estimate of each mask's IoU.
        object_scores: (P,) float32 logits; negative means that the model sees no object.
        mask_indices: (P, M) int8, which of the decoder's four masks each one is.
        low_res_logits: (P, M, m, m) float32 within ±32, usable as `Prompt.mask_input`; None unless asked for.
    """

    masks: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float32]
    object_scores: npt.NDArray[np.float32]
    mask_indices: npt.NDArray[np.int8]
    low_res_logits: npt.NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class RawOutputs:
    """What the decoder returned for one batch: views, valid inside the `with` that gave them.

    Attributes:
        masks: (P, 4, m, m) float32 logits.
        scores: (P, 4) float32.
        object_scores: (P, 1) float32 logits.
    """

    masks: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    object_scores: npt.NDArray[np.float32]


def answer_masks(
    shape: tuple[int, int, int, int], out: npt.NDArray[np.bool_] | None, max_bytes: int
) -> npt.NDArray[np.bool_]:
    """The array for the masks: the caller's, or a new one of at most `max_bytes`.

    Raises:
        PromptError: `out` does not fit, or the new array would be too large.
    """
    if out is not None:
        if out.shape != shape or out.dtype != np.bool_ or not out.flags.c_contiguous or not out.flags.writeable:
            raise PromptError(
                f"'out' must be a writable C-contiguous bool{list(shape)}, got {out.dtype}{list(out.shape)}.",
                "Leave it out to get a new array.",
            )
        return out
    if int(np.prod(shape, dtype=np.int64)) > max_bytes:
        raise PromptError(
            f"The masks would take {np.prod(shape, dtype=np.int64) / (1 << 30):.1f} GiB ({list(shape)}).",
            "Ask for fewer prompts at a time, or pass 'out'.",
        )
    return np.empty(shape, np.bool_)
