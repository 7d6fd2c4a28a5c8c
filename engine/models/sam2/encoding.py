"""From pixels, or from what a client kept, to features on the device: the half of the predictor before the prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...contracts import sam2
from ...contracts.base import TensorSpec
from ...contracts.sam2 import Sam2Constants
from ...errors import DeviceMemoryError, PromptError
from ...runtime.base import Array, Session
from ..chain import Chain
from .cache import EmbeddingCache, Features, FixedFeatures, bound
from .preprocess import Scratch, preprocess

FEATURES = (sam2.IMAGE_EMBED, sam2.HIGH_RES_0, sam2.HIGH_RES_1)


class ImageEncoder:
    """Queues the encoder graph and owns the buffers that recorded graphs share.

    Args:
        session: Of the image encoder.
        chain: Of the model.
        cache: Whose pool the features come from.
        constants: Constants of the checkpoint.

    Attributes:
        memory_retries: How often the cache was emptied for want of memory.
    """

    def __init__(self, session: Session, chain: Chain, cache: EmbeddingCache, constants: Sam2Constants) -> None:
        self.memory_retries = 0
        self._session = session
        self._chain = chain
        self._cache = cache
        self._constants = constants
        self._scratch = Scratch()  # used under the session's lock only
        self._fixed: FixedFeatures | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one image's features."""
        return sum(int(np.prod(s.shape())) * s.np_dtype.itemsize for s in self._session.spec.outputs)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the buffers for recorded graphs."""
        return self._fixed.nbytes if self._fixed is not None else 0

    def fixed(self) -> FixedFeatures:
        """The buffers for recorded graphs, allocated at the first call."""
        with self._chain.lock:
            if self._fixed is None:
                self._fixed = FixedFeatures(self._chain.device, self._session.spec.outputs)
            return self._fixed

    def close(self) -> None:
        """Lets go of the buffers."""
        self._fixed = None

    def run(self, image: npt.NDArray[np.uint8]) -> Features:
        """Features of an image. On a GPU the work is only queued; the host waits at most for earlier work that still
        reads the staging memory. Short of memory, it runs once more without the cached features of other images.

        Use it under the session's lock.

        Raises:
            DeviceMemoryError: No room, also with an empty cache.
            DeviceError: The back end failed.
        """
        try:
            return self._run(image)
        except DeviceMemoryError:
            self.memory_retries += 1
            self._cache.clear()
        try:
            return self._run(image)
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"No room on {self._chain.device.name} for encoding an image: {error.message}",
                "Unload another model or end another process on this device; what is loaded still works.",
            ) from error

    def _run(self, image: npt.NDArray[np.uint8]) -> Features:
        chain = self._chain
        with chain.lock:
            features = self._cache.pool.take(chain.device, self._session.spec.outputs)
            binding = self._session.prepare(borrowed=FEATURES)
            fixed = self.fixed() if chain.captures(self._session) else None
        preprocess(image, self._constants, chain.stage(binding, sam2.PIXEL_VALUES), self._scratch)
        with chain.lock:
            if fixed is not None:
                fixed.bind(binding)
                fixed.invalidate()
            with bound(binding, features) if fixed is None else contextlib.nullcontext():
                chain.send(binding, sam2.PIXEL_VALUES)
                chain.launch(binding)
            if fixed is not None:
                fixed.store(features)
            features.mark()
        return features

    def take(self, image_embed: Array, high_res: Sequence[Array]) -> Features:
        """Features that a client kept; see `Sam2ImagePredictor.embedding_from_arrays`."""
        if not isinstance(high_res, Sequence) or len(high_res) != 2:
            given = len(high_res) if isinstance(high_res, Sequence) else type(high_res).__name__
            raise PromptError(
                f"SAM 2 needs 2 high-resolution feature maps, got {given}.",
                "Send both maps of the earlier answer, or none of the features.",
            )
        sent = dict(zip(FEATURES, (image_embed, *high_res), strict=True))
        checked = {s.name: _checked(s, sent[s.name]) for s in self._session.spec.outputs}
        device = self._chain.device
        if device.kind == "cpu" and all(array.flags.aligned for array in checked.values()):
            return Features({name: device.wrap(array) for name, array in checked.items()})
        with self._chain.lock:
            features = self._cache.pool.take(device, self._session.spec.outputs)
            for name, array in checked.items():
                device.upload(features.buffers[name], array)
            features.mark()
        return features


def _checked(spec: TensorSpec, array: Array) -> Array:
    """A client's array in the shape of the contract; no copy where it is C-contiguous."""
    shape = spec.shape()
    if not isinstance(array, np.ndarray) or array.dtype != spec.np_dtype or array.shape not in (shape, shape[1:]):
        given = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise PromptError(
            f"'{spec.name}' must be {spec.dtype}{list(shape[1:])}, got {given}.",
            "Send the features of this model as they were returned.",
        )
    if not np.isfinite(array.sum(dtype=np.float64)):
        raise PromptError(f"'{spec.name}' holds NaN or infinity.", "Send the features as they were returned.")
    return np.ascontiguousarray(array).reshape(shape)
