"""SAM 2 image predictor: encode an image once, then answer prompts with the mask decoder alone.

Reference: upstream ``sam2/sam2_image_predictor.py`` and transformers' ``Sam2Model``. Steps: `preprocess` writes the
encoder's bound input, the encoder writes the buffers of a cache entry, the decoder binds those same buffers, and
`postprocess` writes the chosen masks at the size of the original image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle
from ...contracts import sam2
from ...contracts.base import TensorSpec
from ...contracts.sam2 import Sam2Constants
from ...errors import BundleError, DeviceError, PromptError
from ...runtime.base import Array, Binding, Buffer, Session
from .cache import EmbeddingCache, EmbeddingKey, Features, bound, pixel_digest
from .postprocess import LOGIT_CLAMP, choose_masks, mask_count, write_mask
from .preprocess import Scratch, check_image, preprocess
from .prompts import DEFAULT_BATCH, Prompt, PromptBatch, build_prompts
from .results import Embedding, RawOutputs, Sam2Prediction

__all__ = ["Embedding", "RawOutputs", "Sam2ImagePredictor", "Sam2Prediction", "choose_precision"]

MAX_KEPT_BYTES = 128 << 20
"""Work memory kept between clicks; a photo of 33 megapixels needs as much."""
MAX_ANSWER_BYTES = 2 << 30
"""Largest `Sam2Prediction.masks` that is allocated for the caller."""

_FEATURES = (sam2.IMAGE_EMBED, sam2.HIGH_RES_0, sam2.HIGH_RES_1)


class Sam2ImagePredictor:
    """Segments images with one bundle on one device. Thread-safe: each session takes one call at a time.

    Make it with `open`; the constructor takes sessions that are open already and leaves closing them to its caller.

    Args:
        encoder: Session of the image encoder.
        decoder: Session of the mask decoder.
        constants: Constants of the checkpoint.
        bundle_hash: `Bundle.hash`.
        variant: Name of the variant that the sessions run.
        cache: Shared or own; never closed here.
        description: Facts for `info`.
    """

    def __init__(
        self,
        encoder: Session,
        decoder: Session,
        constants: Sam2Constants,
        *,
        bundle_hash: str,
        variant: str,
        cache: EmbeddingCache | None = None,
        description: dict[str, Any] | None = None,
    ) -> None:
        self.constants = constants
        self.cache = cache if cache is not None else EmbeddingCache()
        self._encoder = encoder
        self._decoder = decoder
        self._device = encoder.device
        self._bundle_hash = bundle_hash
        self._variant = variant
        self._description = description or {}
        self._closed = False
        self._opened = contextlib.ExitStack()
        # Each is used under the lock of its session only.
        self._encoder_scratch = Scratch()
        self._decoder_scratch = Scratch()

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        *,
        device: str = "auto",
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        cache: EmbeddingCache | None = None,
        check: Callable[[], None] | None = None,
    ) -> Sam2ImagePredictor:
        """Opens both graphs of a bundle.

        Args:
            bundle: An open bundle or its folder.
            device: ``auto``, ``cpu`` or ``cuda:N``.
            backend: ``auto`` or a back end's name.
            precision: ``auto`` (fp32 where the bundle has it, since other precisions are not faster on every CPU)
                or a variant's name.
            threads: Threads of one call; None leaves it to the back end.
            cache: Embedding cache to share; None makes an own one.
            check: Called before each graph is opened; what it raises ends the opening and closes what is open.

        Raises:
            BundleError: Not a SAM 2 bundle, damaged, or without the precision.
            DeviceError: Device or back end is missing or did not load.
            ContractError: A graph does not have the inputs and outputs of the contract.
        """
        from ...runtime import open_device, open_session

        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        if bundle.manifest.family != sam2.FAMILY:
            raise BundleError(
                f"Bundle '{bundle.manifest.name}' holds '{bundle.manifest.family}', not '{sam2.FAMILY}'.",
                "Open it with its own model class.",
            )
        constants = Sam2Constants.from_dict(bundle.manifest.constants)
        specs = sam2.graphs(constants)
        variant, reason = choose_precision(bundle, precision)
        with contextlib.ExitStack() as opened:
            on = open_device(device)
            opened.callback(on.close)
            sessions: dict[str, Session] = {}
            for name, spec in specs.items():
                if check is not None:
                    check()
                path = bundle.graph_path(name, variant)
                sessions[name] = open_session(path, spec, on, backend=backend, threads=threads)
                opened.callback(sessions[name].close)
            predictor = cls(
                sessions[sam2.IMAGE_ENCODER],
                sessions[sam2.MASK_DECODER],
                constants,
                bundle_hash=bundle.hash,
                variant=variant,
                cache=cache,
                description={
                    "bundle": bundle.manifest.name,
                    "architecture": bundle.manifest.source.architecture,
                    "precision_reason": reason,
                },
            )
            predictor._opened = opened.pop_all()
        return predictor

    def encode(self, image: npt.NDArray[np.uint8]) -> Embedding:
        """Features of an image, computed at the first call for these pixels and then taken from the cache.

        Args:
            image: (H, W, 3) uint8 RGB; not kept.

        Raises:
            ImageError: Not such an array.
            DeviceError: The predictor is closed, or the back end failed.
        """
        check_image(image)
        self._check_open()
        key = EmbeddingKey(
            self._bundle_hash, self._variant, f"{self._encoder.backend}@{self._device.name}", pixel_digest(image)
        )
        features = self.cache.get_or_create(key, self._feature_bytes, lambda: self._run_encoder(image))
        return Embedding(features, (image.shape[0], image.shape[1]), self._bundle_hash, self._device)

    def predict(
        self,
        source: npt.NDArray[np.uint8] | Embedding,
        prompts: Sequence[Prompt],
        *,
        multimask: bool = True,
        return_logits: bool = False,
        max_batch: int = DEFAULT_BATCH,
        out: npt.NDArray[np.bool_] | None = None,
    ) -> Sam2Prediction:
        """Masks for prompts on one image.

        Args:
            source: An image (H, W, 3) uint8 RGB, or what `encode` or `embedding_from_arrays` returned.
            prompts: At least one; ``[Prompt()]`` asks without a prompt.
            multimask: True: three masks per prompt in model order (not sorted by score). False: one mask, with
                upstream's fallback when it is unstable.
            return_logits: Also return the low-resolution logits of the chosen masks.
            max_batch: Most prompts per decoder call.
            out: (P, M, H, W) bool, C-contiguous, for the masks; it is returned as `Sam2Prediction.masks`.

        Raises:
            PromptError: See `build_prompts`; also an embedding of another bundle, a misfitting `out`, or an answer
                larger than `MAX_ANSWER_BYTES`.
            ImageError: See `encode`.
            DeviceError: The predictor is closed, or the back end failed.
        """
        if not isinstance(source, Embedding):
            check_image(source)
        size = source.original_size if isinstance(source, Embedding) else (source.shape[0], source.shape[1])
        batches = build_prompts(prompts, size, self.constants, max_batch)
        count = mask_count(multimask)
        masks = _answer((len(prompts), count, *size), out)
        embedding = source if isinstance(source, Embedding) else self.encode(source)
        scores = np.empty((len(prompts), count), np.float32)
        object_scores = np.empty(len(prompts), np.float32)
        chosen = np.empty((len(prompts), count), np.int8)
        side = self.constants.mask_size
        logits = np.empty((len(prompts), count, side, side), np.float32) if return_logits else None
        for batch in batches:
            with self.decode(embedding, batch) as raw:
                for row, index in enumerate(batch.indices):
                    picks = choose_masks(
                        raw.masks[row], raw.scores[row], multimask, self.constants, self._decoder_scratch
                    )
                    chosen[index] = picks
                    scores[index] = raw.scores[row][picks]
                    object_scores[index] = raw.object_scores[row, 0]
                    for slot, pick in enumerate(picks):
                        low = raw.masks[row, pick]
                        write_mask(low, self.constants.mask_threshold, masks[index, slot], self._decoder_scratch)
                        if logits is not None:
                            np.clip(low, -LOGIT_CLAMP, LOGIT_CLAMP, out=logits[index, slot])
        with self._decoder.lock:
            self._decoder_scratch.trim(MAX_KEPT_BYTES)
        return Sam2Prediction(masks, scores, object_scores, chosen, logits)

    @contextlib.contextmanager
    def decode(self, embedding: Embedding, batch: PromptBatch) -> Iterator[RawOutputs]:
        """Runs the decoder on one batch; the outputs are the session's own buffers, held until the `with` ends.

        Raises:
            PromptError: The embedding comes from another bundle or device.
            DeviceError: The predictor is closed, or the back end failed.
        """
        if embedding.bundle_hash not in (None, self._bundle_hash) or embedding.device.name != self._device.name:
            raise PromptError(
                "The embedding was made by another model or on another device.",
                "Encode the image with this predictor.",
            )
        with self._decoder.lock:
            self._check_open()
            with bound(self._decoder.prepare(batch.sizes, _FEATURES), embedding.features) as binding:
                binding.write(sam2.POINT_COORDS, batch.point_coords)
                binding.write(sam2.POINT_LABELS, batch.point_labels)
                self._write_masks(binding, batch.masks)
                binding.run()
                yield RawOutputs(
                    binding.read(sam2.MASKS), binding.read(sam2.IOU_SCORES), binding.read(sam2.OBJECT_SCORE_LOGITS)
                )

    def embedding_from_arrays(
        self, image_embed: Array, high_res: Sequence[Array], original_size: tuple[int, int]
    ) -> Embedding:
        """Features that a client kept, for example from an earlier answer. They never enter the cache.

        Args:
            image_embed: (C, G, G) or (1, C, G, G) float32.
            high_res: The two finer maps (C/8, 4G, 4G) and (C/4, 2G, 2G), batch dimension optional, float32.
                C-contiguous arrays on the CPU are used in place: leave them unchanged while the embedding lives.
            original_size: (height, width) of the image they belong to.

        Raises:
            PromptError: A wrong number of arrays, a wrong shape or dtype, NaN or infinity, or no image size.
        """
        if not isinstance(high_res, Sequence) or len(high_res) != 2:
            given = len(high_res) if isinstance(high_res, Sequence) else type(high_res).__name__
            raise PromptError(
                f"SAM 2 needs 2 high-resolution feature maps, got {given}.",
                "Send both maps of the earlier answer, or none of the features.",
            )
        if len(original_size) != 2 or min(original_size) < 1:
            raise PromptError(f"An image size is (height, width), got {original_size}.", "Send the size in pixels.")
        arrays = {sam2.IMAGE_EMBED: image_embed, sam2.HIGH_RES_0: high_res[0], sam2.HIGH_RES_1: high_res[1]}
        buffers = {spec.name: self._borrow(spec, arrays[spec.name]) for spec in self._encoder.spec.outputs}
        return Embedding(Features(buffers), (int(original_size[0]), int(original_size[1])), None, self._device)

    def info(self) -> dict[str, Any]:
        """Bundle, device, back end, precision and why, cache counters; JSON-ready."""
        stats = self.cache.stats()
        return {
            **self._description,
            "family": sam2.FAMILY,
            "bundle_hash": self._bundle_hash,
            "image_size": self.constants.image_size,
            "precision": self._variant,
            "device": self._device.name,
            "backend": self._encoder.backend,
            "image_encoder": self._encoder.info(),
            "mask_decoder": self._decoder.info(),
            "cache": {"entries": stats.entries, "bytes": stats.bytes, "max_bytes": stats.max_bytes},
        }

    @property
    def runs(self) -> tuple[int, int]:
        """Launches of the encoder and of the decoder so far."""
        return self._encoder.runs, self._decoder.runs

    def close(self) -> None:
        """Waits for calls under way, then frees what `open` opened; later calls raise DeviceError."""
        with self._encoder.lock, self._decoder.lock:
            if self._closed:
                return
            self._closed = True
            self._opened.close()

    def __enter__(self) -> Sam2ImagePredictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _feature_bytes(self) -> int:
        return sum(int(np.prod(s.shape())) * s.np_dtype.itemsize for s in self._encoder.spec.outputs)

    def _run_encoder(self, image: npt.NDArray[np.uint8]) -> Features:
        with self._encoder.lock:
            self._check_open()
            features = self.cache.pool.take(self._device, self._encoder.spec.outputs)
            with bound(self._encoder.prepare(borrowed=_FEATURES), features) as binding:
                target = binding.inputs[sam2.PIXEL_VALUES].array
                if target is not None:
                    preprocess(image, self.constants, target, self._encoder_scratch)
                else:
                    staged = self._encoder_scratch.take("staged", binding.inputs[sam2.PIXEL_VALUES].shape)
                    preprocess(image, self.constants, staged, self._encoder_scratch)
                    binding.write(sam2.PIXEL_VALUES, staged)
                binding.run()
                self._device.synchronize()
            return features

    def _write_masks(self, binding: Binding, masks: Sequence[npt.NDArray[np.float32] | None]) -> None:
        """Fills `mask_input` in place; rows without one are zeroed, since NaN times 0 would still be NaN."""
        buffer = binding.inputs[sam2.MASK_INPUT]
        rows = buffer.array if buffer.array is not None else self._decoder_scratch.take("staged", buffer.shape)
        for row, mask in zip(rows, masks, strict=True):
            row[0] = 0.0 if mask is None else mask
        if buffer.array is None:
            binding.write(sam2.MASK_INPUT, rows)
        binding.write(sam2.HAS_MASK_INPUT, np.array([mask is not None for mask in masks], np.float32))

    def _borrow(self, spec: TensorSpec, array: Array) -> Buffer:
        """A client's array as a buffer on the device: in place where the device can read it, else one copy."""
        shape = spec.shape()
        if not isinstance(array, np.ndarray) or array.dtype != spec.np_dtype or array.shape not in (shape, shape[1:]):
            given = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise PromptError(
                f"'{spec.name}' must be {spec.dtype}{list(shape[1:])}, got {given}.",
                "Send the features of this model as they were returned.",
            )
        if not np.isfinite(array.sum(dtype=np.float64)):
            raise PromptError(f"'{spec.name}' holds NaN or infinity.", "Send the features as they were returned.")
        array = np.ascontiguousarray(array).reshape(shape)
        if self._device.kind == "cpu" and array.flags.aligned:
            return self._device.wrap(array)
        host = self._device.host_empty(shape, spec.np_dtype)
        np.copyto(host.host(), array)
        buffer = self._device.empty(shape, spec.np_dtype)
        self._device.copy(buffer, host)
        self._device.synchronize()
        return buffer

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError("The predictor is closed.", "Open the bundle again.")


def choose_precision(bundle: Bundle, precision: str) -> tuple[str, str]:
    """The variant to run and why.

    Raises:
        BundleError: The bundle has no such precision, or no variant that all graphs share.
    """
    known = bundle.variants()
    if precision == "auto":
        if "fp32" in known:
            return "fp32", "auto: fp32 is the variant proven equal to the original on every device"
        if known:
            return known[0], "auto: the only precision that every graph has"
    if precision not in known:
        raise BundleError(
            f"Bundle '{bundle.manifest.name}' has no precision '{precision}' for every graph.", f"Known: {known}."
        )
    return precision, "asked for"


def _answer(shape: tuple[int, int, int, int], out: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.bool_]:
    """The array for the masks: the caller's or a new one."""
    if out is not None:
        if out.shape != shape or out.dtype != np.bool_ or not out.flags.c_contiguous or not out.flags.writeable:
            raise PromptError(
                f"'out' must be a writable C-contiguous bool{list(shape)}, got {out.dtype}{list(out.shape)}.",
                "Leave it out to get a new array.",
            )
        return out
    if int(np.prod(shape, dtype=np.int64)) > MAX_ANSWER_BYTES:
        raise PromptError(
            f"The masks would take {np.prod(shape, dtype=np.int64) / (1 << 30):.1f} GiB ({list(shape)}).",
            "Ask for fewer prompts at a time, or pass 'out'.",
        )
    return np.empty(shape, np.bool_)
