"""Grounding DINO detector: captions of the asked classes are encoded once and kept, images run the detector graph.

Reference: transformers' ``GroundingDinoForObjectDetection`` with its processor. Steps: `Captioner` makes captions
of the classes, the text encoder's features of each are taken from the cache or computed, `preprocess` writes the
detector's bound input, and `postprocess` turns logits and boxes into detections. A list of classes with more tokens
than one caption holds runs the detector once per caption.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle
from ...contracts import grounding_dino as contract
from ...contracts.grounding_dino import GroundingDinoConstants
from ...runtime.base import Array, Binding, Session
from ..detection.base import BOX_THRESHOLD, TEXT_THRESHOLD, Detections, check_request
from ..detection.nms import nms as suppress
from ..detection.sessions import SessionDetector, take_over
from ..detection.text_cache import TEXT_BYTES, TextCache
from ..detection.tokenizer import require_tokenizers
from ..sam2.diagnosis import PREPROCESSING
from ..sam2.preprocess import check_image
from ..verdicts import VerdictStore
from .postprocess import find, merge
from .preprocess import preprocess, resized_size
from .text import Caption, Captioner

Floats = npt.NDArray[np.float32]

_ANSWERS = (contract.LOGITS, contract.BOXES)
WARM_UP_CLASS = "object"


class GroundingDinoDetector(SessionDetector):
    """Finds objects by name with one bundle on one device. Thread-safe: each session takes one call at a time.

    Make it with `open`; the constructor takes sessions that are open already and leaves closing them to its caller.

    Args:
        text_encoder: Session of the text encoder.
        detector: Session of the detector, on the same device object.
        constants: Constants of the checkpoint.
        tokenizer: Content of its ``tokenizer.json``.
        bundle_hash: `Bundle.hash`.
        variant: Name of the variant that the sessions run.
        description: Facts for `info`; its ``warnings`` stay in front.
        capture: Record launches and replay them where device and sessions can.

    Attributes:
        constants: Constants of the checkpoint.
        text_cache: Features by caption.
    """

    def __init__(
        self,
        text_encoder: Session,
        detector: Session,
        constants: GroundingDinoConstants,
        tokenizer: str | bytes,
        *,
        bundle_hash: str,
        variant: str,
        text_cache: TextCache | None = None,
        description: dict[str, Any] | None = None,
        capture: bool = True,
    ) -> None:
        super().__init__(
            (text_encoder, detector),
            {"text_cache": text_cache if text_cache is not None else TextCache()},
            bundle_hash=bundle_hash,
            variant=variant,
            description=description,
            capture=capture,
        )
        self.constants = constants
        self.captioner = Captioner(tokenizer, constants)
        self._text_encoder = text_encoder
        self._detector = detector

    @classmethod
    def open(
        cls,
        bundle: Bundle | Path | str,
        *,
        device: str = "auto",
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        check: Callable[[], None] | None = None,
        force: bool = False,
        cache_bytes: int = TEXT_BYTES,
        prove: bool = True,
        warm_up: bool | None = None,
        capture: bool = True,
        verdicts: VerdictStore | None = None,
    ) -> GroundingDinoDetector:
        """Opens both graphs of a bundle, in the asked combination or the fastest one that is proven here.

        Args and errors as `Sam2ImagePredictor.open`, and:

        Args:
            cache_bytes: Budget of the text features kept, at most `TEXT_BYTES`; 0 keeps none.
        """
        from ..opening import Asked, open_family, open_graphs

        bundle = open_family(bundle, contract.FAMILY)
        constants = GroundingDinoConstants.from_dict(bundle.manifest.constants)
        require_tokenizers()
        tokenizer = bundle.file(contract.TOKENIZER).read_bytes()
        found = open_graphs(
            bundle,
            Asked(device, backend, precision, threads, force, prove),
            contract.graphs(constants),
            check=check,
            capture=capture,
            verdicts=verdicts,
        )
        return take_over(
            found,
            lambda: cls(
                found.sessions[contract.TEXT_ENCODER],
                found.sessions[contract.DETECTOR],
                constants,
                tokenizer,
                bundle_hash=bundle.hash,
                variant=found.precision,
                text_cache=TextCache(min(TEXT_BYTES, cache_bytes)),
                description=found.description,
                capture=capture,
            ),
            warm_up,
            check,
        )

    def warm_up(self) -> float:
        """Runs both graphs on a blank image of the usual shape until their launches are recorded.

        Opening does this on a GPU. Other sizes of image and caption are prepared at their first call.

        Returns:
            Seconds it took, also in `info`.
        """
        start = time.perf_counter()
        caption = self.captioner.captions([WARM_UP_CLASS])[0]
        height, width = (self._detector.spec.ranges[d][1] for d in ("H", "W"))
        blank = np.zeros((height, width, 3), np.uint8)
        with self._text_encoder.lock, self._detector.lock:
            for _ in range(self._chain.warm_runs(self._text_encoder)):
                features = self._encode(caption)
            for _ in range(self._chain.warm_runs(self._detector)):
                with self._run(blank, caption, features):
                    pass
        seconds = time.perf_counter() - start
        self._warm_up = {"seconds": seconds, "shapes": [f"H={height}, W={width}, T={len(caption)}"]}
        return seconds

    def detect(
        self,
        image: npt.NDArray[np.uint8],
        classes: Sequence[str],
        *,
        box_threshold: float = BOX_THRESHOLD,
        text_threshold: float = TEXT_THRESHOLD,
        nms: float | None = None,
        limit: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> Detections:
        """Boxes of the classes on an image; see `Detector.detect` for arguments and errors.

        Of equal class names the first gets the boxes. See `postprocess` for what the thresholds mean.

        Raises:
            PromptError: Also a class without a word, or with more tokens than one caption holds.
            ImageError: Also an image too narrow for the model.
        """
        wanted = check_request(classes, box_threshold, text_threshold, nms, limit)
        check_image(image)
        resized_size(image.shape[0], image.shape[1], self.constants)
        captions = self.captioner.captions(wanted)
        parts = []
        for caption in captions:
            if check is not None:
                check()
            with self.run(image, caption) as (logits, boxes):
                size = (image.shape[0], image.shape[1])
                parts.append(find(logits, boxes, caption.labels, caption.edges, size, box_threshold, text_threshold))
        found = merge(parts)
        kept: Any = slice(None)
        if nms is not None:
            kept = suppress(found.boxes, found.scores, found.labels, nms)
        boxes, scores, labels = (values[kept][:limit].copy() for values in (found.boxes, found.scores, found.labels))
        return Detections(boxes, scores, labels, wanted)

    @contextlib.contextmanager
    def run(self, image: npt.NDArray[np.uint8], caption: Caption) -> Iterator[tuple[Floats, Floats]]:
        """The detector's logits (Q, T) and boxes (Q, 4) for one caption: the session's own buffers, held until the
        `with` ends.

        Raises:
            ImageError: The image is too narrow for the model.
            DeviceError: The detector is closed, or the back end failed.
        """
        features = self.text_features(caption)
        with self._detector.lock:
            self._check_open()
            with self._run(image, caption, features) as raw:
                yield raw

    def text_features(self, caption: Caption) -> Floats:
        """(1, T, D) features of a caption, computed once and then taken from the cache; do not change them."""
        return self.text_cache.get_or_create(
            (self._bundle_hash, self._variant, caption.ids), lambda: self._first_features(caption)
        )

    def info(self) -> dict[str, Any]:
        """As `SessionDetector.info`, with family and image size."""
        edges = [self.constants.shortest_edge, self.constants.longest_edge]
        return {**super().info(), "family": contract.FAMILY, "image_size": edges}

    @property
    def traced(self) -> dict[str, str]:
        """Tensors of `trace` in pipeline order, and the graph that makes each.

        None of the detector's: two of its queries may change ranks on another device, and then answer from other
        places, without anybody being wrong. Its detections are what is checked.
        """
        names = (contract.PIXEL_VALUES, contract.INPUT_IDS, contract.POSITION_IDS, contract.TEXT_SELF_ATTENTION_MASK)
        return {**dict.fromkeys(names, PREPROCESSING), contract.TEXT_FEATURES: contract.TEXT_ENCODER}

    def trace(self, image: npt.NDArray[np.uint8], classes: Sequence[str]) -> dict[str, Array]:
        """The tensors of `traced` for an image and class names; of several captions the first one's."""
        caption = self.captioner.captions(classes)[0]
        pixels = np.empty((1, 3, *resized_size(image.shape[0], image.shape[1], self.constants)), np.float32)
        preprocess(image, self.constants, pixels)
        return {
            contract.PIXEL_VALUES: pixels,
            contract.INPUT_IDS: caption.input_ids,
            contract.POSITION_IDS: caption.position_ids,
            contract.TEXT_SELF_ATTENTION_MASK: caption.mask,
            contract.TEXT_FEATURES: self.text_features(caption),
        }

    def _first_features(self, caption: Caption) -> Floats:
        with self._text_encoder.lock:
            self._check_open()
            return self._encode(caption)

    def _encode(self, caption: Caption) -> Floats:
        """Features of a caption in memory of their own; under the text encoder's lock."""
        with self._chain.lock:
            binding = self._text_encoder.prepare({"T": len(caption)})
            self._chain.write(binding, contract.INPUT_IDS, caption.input_ids)
            self._write_caption(binding, caption)
            self._chain.launch(binding)
            features: Floats = self._chain.fetch(binding, (contract.TEXT_FEATURES,))[contract.TEXT_FEATURES].copy()
        features.flags.writeable = False
        return features

    @contextlib.contextmanager
    def _run(self, image: npt.NDArray[np.uint8], caption: Caption, features: Floats) -> Iterator[tuple[Floats, Floats]]:
        """One run of the detector; under its lock."""
        height, width = resized_size(image.shape[0], image.shape[1], self.constants)
        with self._chain.lock:
            binding = self._detector.prepare({"H": height, "W": width, "T": len(caption)})
        preprocess(image, self.constants, self._chain.stage(binding, contract.PIXEL_VALUES))
        with self._chain.lock:
            self._chain.send(binding, contract.PIXEL_VALUES)
            self._chain.write(binding, contract.TEXT_FEATURES, features)
            self._write_caption(binding, caption)
            self._chain.launch(binding)
            outputs = self._chain.fetch(binding, _ANSWERS)
        yield outputs[contract.LOGITS][0], outputs[contract.BOXES][0]

    def _write_caption(self, binding: Binding, caption: Caption) -> None:
        self._chain.write(binding, contract.POSITION_IDS, caption.position_ids)
        self._chain.write(binding, contract.TEXT_SELF_ATTENTION_MASK, caption.mask)
