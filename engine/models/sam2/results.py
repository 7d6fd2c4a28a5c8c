"""What the SAM 2 predictor takes and returns: embeddings, answers, and the decoder's raw outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...contracts import sam2
from ...runtime.base import Buffer, Device
from .cache import Features


@dataclass(frozen=True, eq=False)
class Embedding:
    """Features of one image, ready for the decoder. Keeps its buffers from being recycled while it lives.

    Attributes:
        features: Buffers on the predictor's device; read only.
        original_size: (height, width) of the image.
        bundle_hash: Bundle that made the features, or None when a client sent them.
        device: Where the buffers are.
    """

    features: Features
    original_size: tuple[int, int]
    bundle_hash: str | None
    device: Device

    @property
    def image_embed(self) -> npt.NDArray[np.float32]:
        """(1, C, G, G) float32, the no-memory embedding included; a copy that the caller owns."""
        return to_host(self.device, self.features.buffers[sam2.IMAGE_EMBED])

    @property
    def high_res(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(1, C/8, 4G, 4G) and (1, C/4, 2G, 2G) float32; copies that the caller owns."""
        buffers = self.features.buffers
        return to_host(self.device, buffers[sam2.HIGH_RES_0]), to_host(self.device, buffers[sam2.HIGH_RES_1])


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


def to_host(device: Device, buffer: Buffer) -> npt.NDArray[Any]:
    """A copy of `buffer` in host memory that the caller owns."""
    if buffer.array is not None:
        return np.array(buffer.array)
    host = device.host_empty(buffer.shape, buffer.dtype)
    device.copy(host, buffer)
    device.synchronize()
    return host.host()
