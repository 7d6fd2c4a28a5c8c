"""SAM 2 image predictor: encode an image once, then answer prompts with the mask decoder alone.

Reference: upstream ``sam2/sam2_image_predictor.py`` and transformers' ``Sam2Model``. Steps: `preprocess` writes the
encoder's input, the encoder writes the buffers of a cache entry, the decoder reads those same buffers, and
`postprocess` writes the chosen masks at the size of the original image.

On a GPU everything from the upload of the pixels to the download of the masks is queued on one stream without a wait
between (see `Chain`): features stay on the device, and the host waits once per batch of prompts, for its answer.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle
from ...contracts import sam2
from ...contracts.sam2 import Sam2Constants
from ...errors import DeviceError, DeviceMemoryError, PromptError
from ...runtime.base import Array, Binding, Session
from ...runtime.memory import MemoryUse, model_memory
from ..chain import Chain
from ..verdicts import VerdictStore
from .cache import EmbeddingCache, EmbeddingKey, Features, FixedFeatures, bound, pixel_digest
from .clicks import Clicks
from .encoding import FEATURES, ImageEncoder
from .postprocess import LOGIT_CLAMP, choose_masks, mask_count, write_mask
from .preprocess import Scratch, check_image
from .prompts import DEFAULT_BATCH, Prompt, PromptBatch, build_prompts
from .results import Embedding, RawOutputs, Sam2Prediction, answer_masks

__all__ = ["Embedding", "RawOutputs", "Sam2ImagePredictor", "Sam2Prediction"]

MAX_KEPT_BYTES = 128 << 20
"""Work memory kept between clicks; a photo of 33 megapixels needs as much."""
MAX_ANSWER_BYTES = 2 << 30
"""Largest `Sam2Prediction.masks` that is allocated for the caller."""

WARM_UP_POINTS = (2, 3)
"""Points of the prompts that `Sam2ImagePredictor.warm_up` runs, padding included: one click; a box, or two clicks."""

_ANSWERS = (sam2.MASKS, sam2.IOU_SCORES, sam2.OBJECT_SCORE_LOGITS)


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
        description: Facts for `info`; its ``warnings`` stay in front.
        capture: Record launches and replay them where device and sessions can.
        clicks: Sessions of the graphs of `clicks`; without them the decoder answers every prompt.
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
        capture: bool = True,
        clicks: Mapping[str, Session] | None = None,
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
        self._chain = Chain(self._device, capture=capture)
        self._images = ImageEncoder(encoder, self._chain, self.cache, constants)
        self._clicks = Clicks(clicks, self._chain, self.cache) if clicks else None
        self._blank: weakref.WeakSet[Binding] = weakref.WeakSet()  # bindings whose mask input holds zeros only
        self._warm_up: dict[str, Any] | None = None
        self._halved = 0
        self._decoder_scratch = Scratch()  # used under the decoder's lock only

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
        force: bool = False,
        prove: bool = True,
        warm_up: bool | None = None,
        capture: bool = True,
        verdicts: VerdictStore | None = None,
    ) -> Sam2ImagePredictor:
        """Opens both graphs of a bundle, in the asked combination or the fastest one that is proven here.

        Args:
            bundle: An open bundle or its folder.
            device: ``auto``, ``cpu`` or ``cuda:N``.
            backend: ``auto`` or a back end's name.
            precision: ``auto`` or a variant's name. See `opening` for what ``auto`` picks.
            threads: Threads of one call; None leaves it to the back end.
            cache: Embedding cache to share; None makes an own one.
            check: Called between the steps; what it raises ends the opening and closes what is open.
            force: Take the asked back end and precision although their check on this device failed.
            prove: False opens without a verdict, for the check itself.
            warm_up: Call `warm_up`; None: on devices with a stream.
            capture: See the class.
            verdicts: Where verdicts are kept; None for the user's own store.

        Raises:
            BundleError: Not a SAM 2 bundle, damaged, without the precision, or without engines for this device.
            DeviceError: Device or back end is missing or did not load, or the combination failed its check here.
            ContractError: A graph does not have the inputs and outputs of the contract.
        """
        from ..opening import Asked
        from .opening import open_predictor

        asked = Asked(device, backend, precision, threads, force, prove)
        predictor = open_predictor(cls, bundle, asked, cache=cache, check=check, capture=capture, verdicts=verdicts)
        if warm_up or (warm_up is None and predictor._device.stream):
            with contextlib.ExitStack() as failed:
                failed.callback(predictor.close)
                if check is not None:
                    check()
                predictor.warm_up()
                failed.pop_all()
        return predictor

    def warm_up(self) -> float:
        """Runs the encoder on a blank image and the decoder on usual prompt shapes, until their launches are recorded.

        Opening does this on a GPU, so that no user waits for lazy initialisation. The cache is not touched.

        Returns:
            Seconds it took, also in `info`.
        """
        start = time.perf_counter()
        side = self.constants.image_size
        blank = np.zeros((side, side, 3), np.uint8)
        with self._encoder.lock, self._decoder.lock:
            for _ in range(self._chain.warm_runs(self._encoder)):
                features = self._images.run(blank)
            embedding = self._embedding(features, (side, side), self._bundle_hash)
            for points in WARM_UP_POINTS:
                coords = np.zeros((1, points, 2), np.float32)
                labels = np.full((1, points), sam2.LABEL_PAD, np.int32)
                for _ in range(self._chain.warm_runs(self._decoder)):
                    with self.decode(embedding, PromptBatch([0], coords, labels, [None])):
                        pass
        seconds = time.perf_counter() - start
        self._warm_up = {"seconds": seconds, "shapes": [f"P=1, N={points}" for points in WARM_UP_POINTS]}
        return seconds

    def encode(self, image: npt.NDArray[np.uint8], *, wait: bool = False, cached: bool = True) -> Embedding:
        """Features of an image, computed at the first call for these pixels and then taken from the cache.

        Args:
            image: (H, W, 3) uint8 RGB; not kept.
            wait: Return when the features are computed, for timing. Otherwise, on a GPU, the work may still be
                queued; whatever uses the embedding comes after it by itself.
            cached: False computes them without asking or filling the cache: the frames of a clip come once.

        Raises:
            ImageError: Not such an array.
            DeviceMemoryError: No room on the device, also after the cache was emptied; the predictor still works.
            DeviceError: The predictor is closed, or the back end failed.
        """
        check_image(image)
        self._check_open()
        key = None
        if cached:
            key = self.key(pixel_digest(image))
            features = self.cache.get_or_create(key, self._images.nbytes, lambda: self._run_encoder(image))
        else:
            features = self._run_encoder(image)
        embedding = self._embedding(features, (image.shape[0], image.shape[1]), self._bundle_hash, key)
        if wait:
            self._chain.wait()
        return embedding

    def key(self, digest: bytes) -> EmbeddingKey:
        """What the features of an image depend on here; `digest` is its `pixel_digest`."""
        return EmbeddingKey(self._bundle_hash, self._variant, f"{self._encoder.backend}@{self._device.name}", digest)

    def recall(self, digest: bytes, size: tuple[int, int]) -> Embedding | None:
        """Features of an image that was encoded before, without its pixels; None when they are not in the cache.

        Args:
            digest: Its `pixel_digest`.
            size: Its (height, width).

        Raises:
            DeviceError: The predictor is closed.
        """
        self._check_open()
        key = self.key(digest)
        features = self.cache.find(key)
        return None if features is None else self._embedding(features, size, self._bundle_hash, key)

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
            max_batch: Most prompts per decoder call; halved where the device has no room for it.
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
        masks = answer_masks((len(prompts), count, *size), out, MAX_ANSWER_BYTES)
        embedding = source if isinstance(source, Embedding) else self.encode(source)
        scores = np.empty((len(prompts), count), np.float32)
        object_scores = np.empty(len(prompts), np.float32)
        chosen = np.empty((len(prompts), count), np.int8)
        side = self.constants.mask_size
        logits = np.empty((len(prompts), count, side, side), np.float32) if return_logits else None
        pending = batches[::-1]
        while pending:
            batch = pending.pop()
            try:
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
            except DeviceMemoryError as error:
                pending += self.halve(batch, error)[::-1]
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
        with self._decoder.lock, contextlib.ExitStack() as held:
            self._check_open()
            with self._chain.lock:
                if self._clicks is not None and self._clicks.suits(batch):
                    outputs = self._clicks.run(embedding.features, batch, _ANSWERS)
                else:
                    outputs = self._run_decoder(embedding.features, batch, held)
            yield RawOutputs(*(outputs[name] for name in _ANSWERS))

    def _run_decoder(self, features: Features, batch: PromptBatch, held: contextlib.ExitStack) -> dict[str, Array]:
        """Outputs of the mask decoder; `held` keeps the features bound as long as those are read."""
        binding = self._decoder.prepare(batch.sizes, FEATURES)
        features.await_on(self._device)
        if self._chain.captures(self._decoder):
            fixed = self._images.fixed()
            fixed.bind(binding)
            fixed.load(features)
        else:
            held.enter_context(bound(binding, features))
        self._chain.write(binding, sam2.POINT_COORDS, batch.point_coords)
        self._chain.write(binding, sam2.POINT_LABELS, batch.point_labels)
        self._write_masks(binding, batch.masks)
        self._chain.launch(binding)
        return self._chain.fetch(binding, _ANSWERS)

    def halve(self, batch: PromptBatch, error: DeviceMemoryError) -> list[PromptBatch]:
        """Two halves of a batch that the device had no room for, in order; `info` counts them.

        Raises:
            DeviceMemoryError: `error`, when the batch is a single prompt.
        """
        if len(batch.indices) == 1:
            raise error
        self._halved += 1
        return batch.halves()

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
        if len(original_size) != 2 or min(original_size) < 1:
            raise PromptError(f"An image size is (height, width), got {original_size}.", "Send the size in pixels.")
        features = self._images.take(image_embed, high_res)
        return self._embedding(features, (int(original_size[0]), int(original_size[1])), None)

    def info(self) -> dict[str, Any]:
        """Bundle, device, back end, precision and why, warnings, warm-up, counters; JSON-ready.

        ``warm_up`` has its seconds, or is None where it did not run; ``stream`` counts launches, replays and waits.
        """
        stats = self.cache.stats()
        short = {"cache emptied": self._images.memory_retries, "batch halved": self._halved}
        notes = [f"The device was short of memory: {what} {n} time(s)." for what, n in short.items() if n]
        graphs = (self._encoder.info(), self._decoder.info())
        told = (self._description, {"warnings": (*self._chain.warnings.values(), *notes)}, *graphs)
        return {
            **self._description,
            "warnings": list(dict.fromkeys(w for one in told for w in one.get("warnings", ()))),
            "warm_up": self._warm_up,
            "stream": self._chain.info(),
            "family": sam2.FAMILY,
            "bundle_hash": self._bundle_hash,
            "image_size": self.constants.image_size,
            "precision": self._variant,
            "device": self._device.name,
            "backend": self._encoder.backend,
            "image_encoder": graphs[0],
            "mask_decoder": graphs[1],
            "clicks": self._clicks.info() if self._clicks is not None else None,
            "cache": {"entries": stats.entries, "bytes": stats.bytes, "max_bytes": stats.max_bytes},
        }

    def memory(self) -> MemoryUse:
        """Bytes that sessions, buffers of recorded graphs and cached features take now."""
        fixed = MemoryUse(bindings=self._images.fixed_bytes)
        use = model_memory((self._encoder, self._decoder), self.cache.stats().bytes) + fixed
        return use if self._clicks is None else use + self._clicks.memory()

    def shrink(self) -> None:
        """Drops what is kept between requests and can be computed again."""
        self.cache.clear()
        if self._clicks is not None:
            with self._decoder.lock:
                self._clicks.forget()

    @property
    def chain(self) -> Chain:
        """The stream's work, for other graphs that run on the features; hold its lock as it says."""
        return self._chain

    def fixed_features(self) -> FixedFeatures:
        """The features' buffers for recorded graphs; under the lock of `chain`."""
        return self._images.fixed()

    @property
    def runs(self) -> tuple[int, int]:
        """Launches of the encoder and of the decoder, whichever of its forms, so far."""
        return self._encoder.runs, self._decoder.runs + (self._clicks.runs if self._clicks is not None else 0)

    def close(self) -> None:
        """Waits for calls under way, then frees what `open` opened; later calls raise DeviceError."""
        with self._encoder.lock, self._decoder.lock:
            if self._closed:
                return
            self._closed = True
            with self._opened:  # frees in this order, and all of it whatever fails
                self._opened.callback(self.cache.forget, self._device)
                self._opened.callback(self._chain.close)
                self._opened.callback(self._images.close)
                if self._clicks is not None:
                    self._opened.callback(self._clicks.forget)
                self._chain.wait()

    def __enter__(self) -> Sam2ImagePredictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _embedding(
        self, features: Features, size: tuple[int, int], bundle_hash: str | None, key: EmbeddingKey | None = None
    ) -> Embedding:
        return Embedding(features, size, bundle_hash, self._device, self._chain.lock, key)

    def _run_encoder(self, image: npt.NDArray[np.uint8]) -> Features:
        with self._encoder.lock:
            self._check_open()
            return self._images.run(image)

    def _write_masks(self, binding: Binding, masks: Sequence[npt.NDArray[np.float32] | None]) -> None:
        """Fills `mask_input`; rows without one are zeroed, since NaN times 0 would still be NaN.

        Zeros that are there already are not sent again: most clicks come without a mask.
        """
        given = np.array([mask is not None for mask in masks], np.float32)
        if given.any() or binding not in self._blank:
            self._blank.discard(binding)
            for row, mask in zip(self._chain.stage(binding, sam2.MASK_INPUT), masks, strict=True):
                row[0] = 0.0 if mask is None else mask
            self._chain.send(binding, sam2.MASK_INPUT)
            if not given.any():
                self._blank.add(binding)
        self._chain.write(binding, sam2.HAS_MASK_INPUT, given)

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError("The predictor is closed.", "Open the bundle again.")
