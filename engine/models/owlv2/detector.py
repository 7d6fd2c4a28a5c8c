"""OWLv2 and OWL-ViT: find objects by name, or like an example; text and image are encoded apart and kept.

References: transformers' ``Owlv2ForObjectDetection`` and ``OwlViTForObjectDetection`` with their processors. Steps:
`Tokenizer` and the text encoder turn class names into unit vectors, kept per class list; `preprocess` writes the image
encoder's bound input, whose outputs are kept per picture, so that a second question about the same picture runs no
graph at all; `scores` compares the two.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import Bundle
from ...contracts import owlv2 as contract
from ...contracts.owlv2 import OwlConstants
from ...runtime.base import Array, Session
from ..detection.base import BOX_THRESHOLD, TEXT_THRESHOLD, Detections, check_request
from ..detection.sessions import SessionDetector, take_over
from ..detection.text_cache import TEXT_BYTES, FeatureCache, TextCache
from ..detection.tokenizer import require_tokenizers
from ..resampling import Scratch
from ..sam2.cache import pixel_digest
from ..sam2.diagnosis import PREPROCESSING
from ..sam2.preprocess import check_image
from ..verdicts import VerdictStore
from .preprocess import preprocess
from .scores import Floats, ImageFeatures, class_logits, example_query, find, find_like
from .text import Tokenizer

IMAGE_BYTES = 64 << 20
"""Default budget for image features: 8 pictures of OWLv2 base (7.5 MB each)."""
MAX_KEPT_BYTES = 32 << 20
"""Work memory kept between calls; logits of 1000 classes take half of it."""
LIKE_NMS = 0.3
"""Of detections like an example; upstream's default."""
LIKE_NAME = "example"
WARM_UP_CLASS = "object"
LOGITS = "logits"
"""Name of (Q, C) logits in `Owlv2Detector.trace`: what the host computes from both graphs' outputs."""


class Owlv2Detector(SessionDetector):
    """Finds objects with one bundle on one device. Thread-safe: each session takes one call at a time.

    Make it with `open`; the constructor takes sessions that are open already and leaves closing them to its caller.

    Args:
        image_encoder: Session of the image encoder.
        text_encoder: Session of the text encoder, on the same device object.
        constants: Constants of the checkpoint.
        tokenizer: Content of its ``tokenizer.json``.
        bundle_hash: `Bundle.hash`.
        variant: Name of the variant that the sessions run.
        text_cache: Text features to share; None makes an own cache.
        image_bytes: Budget of the image features kept; 0 keeps none.
        description: Facts for `info`; its ``warnings`` stay in front.
        capture: Record launches and replay them where device and sessions can.

    Attributes:
        constants: Constants of the checkpoint.
        text_cache: Text features by class list.
        image_cache: Image features by picture.
    """

    def __init__(
        self,
        image_encoder: Session,
        text_encoder: Session,
        constants: OwlConstants,
        tokenizer: str | bytes,
        *,
        bundle_hash: str,
        variant: str,
        text_cache: TextCache | None = None,
        image_bytes: int = IMAGE_BYTES,
        description: dict[str, Any] | None = None,
        capture: bool = True,
    ) -> None:
        self.image_cache: FeatureCache[ImageFeatures] = FeatureCache(image_bytes)
        super().__init__(
            (image_encoder, text_encoder),
            {
                "text_cache": text_cache if text_cache is not None else TextCache(),
                "image_cache": self.image_cache,
            },
            bundle_hash=bundle_hash,
            variant=variant,
            description=description,
            capture=capture,
        )
        self.constants = constants
        self.tokenizer = Tokenizer(tokenizer, constants)
        self._image_encoder = image_encoder
        self._text_encoder = text_encoder
        self._scratch = Scratch()  # used under the image encoder's lock only
        self._scoring = threading.Lock()  # a question about a known picture must not wait for another one's encoder
        self._score_scratch = Scratch()  # used under this lock only

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
        cache_bytes: int = TEXT_BYTES + IMAGE_BYTES,
        prove: bool = True,
        warm_up: bool | None = None,
        capture: bool = True,
        verdicts: VerdictStore | None = None,
    ) -> Owlv2Detector:
        """Opens both graphs of a bundle, in the asked combination or the fastest one that is proven here.

        Args and errors as `Sam2ImagePredictor.open`, and:

        Args:
            cache_bytes: Budget of the features kept, of text up to half of it and at most `TEXT_BYTES`, of images the
                rest; 0 keeps none.
        """
        from ..opening import Asked, open_family, open_graphs

        bundle = open_family(bundle, *contract.FAMILIES)
        constants = OwlConstants.from_dict(bundle.manifest.constants)
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
        text_bytes = min(TEXT_BYTES, cache_bytes // 2)
        return take_over(
            found,
            lambda: cls(
                found.sessions[contract.IMAGE_ENCODER],
                found.sessions[contract.TEXT_ENCODER],
                constants,
                tokenizer,
                bundle_hash=bundle.hash,
                variant=found.precision,
                text_cache=TextCache(text_bytes),
                image_bytes=cache_bytes - text_bytes,
                description=found.description,
                capture=capture,
            ),
            warm_up,
            check,
        )

    def warm_up(self) -> float:
        """Runs both graphs, on a blank image and one class, until their launches are recorded.

        Opening does this on a GPU. Other numbers of classes are prepared at their first call.

        Returns:
            Seconds it took, also in `info`.
        """
        start = time.perf_counter()
        side = self.constants.image_size
        blank = np.zeros((side, side, 3), np.uint8)
        ids = self.tokenizer.encode([WARM_UP_CLASS])
        with self._image_encoder.lock, self._text_encoder.lock:
            for _ in range(self._chain.warm_runs(self._text_encoder)):
                self._run_text_encoder(ids)
            for _ in range(self._chain.warm_runs(self._image_encoder)):
                self._run_image_encoder(blank)
        seconds = time.perf_counter() - start
        self._warm_up = {"seconds": seconds, "shapes": ["C=1"]}
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

        Each box has the class that it scores highest; of equal class names the first. `text_threshold` has no meaning
        here: one score says both that there is something and what.

        Raises:
            PromptError: Also a class with more tokens than the model takes; nothing is cut off.
        """
        wanted = check_request(classes, box_threshold, text_threshold, nms, limit)
        check_image(image)
        embeds = self.text_features(wanted, check)
        if check is not None:
            check()
        features = self.image_features(image)
        size = (image.shape[0], image.shape[1])
        with self._scoring:
            logits = class_logits(features, embeds, self._score_scratch)
            found = find(features, logits, size, self.constants, wanted, box_threshold, nms, limit)
            self._score_scratch.trim(MAX_KEPT_BYTES)
        return found

    def detect_like(
        self,
        image: npt.NDArray[np.uint8],
        example: npt.NDArray[np.uint8],
        box: Sequence[float] | None = None,
        *,
        box_threshold: float = 0.0,
        nms: float | None = LIKE_NMS,
        limit: int | None = None,
        name: str = LIKE_NAME,
    ) -> Detections:
        """Boxes of what looks like an example, for things that are easier shown than named.

        Args:
            image: (H, W, 3) uint8 RGB; not kept.
            example: (H, W, 3) uint8 RGB that shows the object; may be `image` itself.
            box: x1, y1, x2, y2 of the object on the example, in pixels. None: the likeliest object of the example
                (OWLv2) or what fills it (OWL-ViT).
            box_threshold: Least probability, 0 to 1. The scores of the answer are relative to the best box of the
                image, which has 1 even where it looks little like the example: choose a threshold where the object
                may be absent.
            nms: IoU above which the lesser of two boxes goes; None keeps both.
            limit: Most boxes returned.
            name: Of the one class of the answer.

        Raises:
            PromptError: A number out of range, or a box that is empty or outside the example.
            ImageError, DeviceMemoryError, DeviceError: See `detect`.
        """
        check_request([name], box_threshold, nms=nms, limit=limit)
        check_image(image)
        check_image(example)
        shown = self.image_features(example)
        place = None if box is None else np.asarray(box, np.float64).reshape(-1)
        query = example_query(shown, (example.shape[0], example.shape[1]), self.constants, place)
        embed = shown.class_embeds[query][None] * shown.inverse[query]
        features = self.image_features(image)
        size = (image.shape[0], image.shape[1])
        with self._scoring:
            logits = class_logits(features, embed, self._score_scratch)
            return find_like(features, logits, size, self.constants, name, box_threshold, nms, limit)

    def text_features(self, classes: Sequence[str], check: Callable[[], None] | None = None) -> Floats:
        """(C, D) unit vectors of class names, computed once per list and then taken from the cache; do not change them.

        `check` is called before each run; what it raises ends the call.

        Raises:
            PromptError: A class has more tokens than the model takes.
        """
        self._check_open()
        return self.text_cache.get_or_create(
            (self._bundle_hash, self._variant, *classes), lambda: self._encode_texts(classes, check)
        )

    def image_features(self, image: npt.NDArray[np.uint8]) -> ImageFeatures:
        """What the image encoder says of an image, computed once per picture; do not change the arrays."""
        self._check_open()
        return self.image_cache.get_or_create(pixel_digest(image), lambda: self._encode_image(image))

    @property
    def traced(self) -> dict[str, str]:
        """Tensors of `trace` in pipeline order, and the graph that makes each."""
        tensors = {contract.PIXEL_VALUES: PREPROCESSING, contract.INPUT_IDS: PREPROCESSING}
        for spec in (self._text_encoder.spec, self._image_encoder.spec):
            tensors |= {t.name: spec.name for t in spec.outputs}
        return {**tensors, LOGITS: contract.IMAGE_ENCODER}

    def trace(self, image: npt.NDArray[np.uint8], classes: Sequence[str]) -> dict[str, Array]:
        """Every tensor between an image, class names and detections, by name, for checking them one by one."""
        pixels = np.empty((1, 3, self.constants.image_size, self.constants.image_size), np.float32)
        preprocess(image, self.constants, pixels)
        features, embeds = self.image_features(image), self.text_features(classes)
        found: dict[str, Array] = {
            contract.PIXEL_VALUES: pixels,
            contract.INPUT_IDS: self.tokenizer.encode(classes),
            contract.TEXT_EMBEDS: embeds,
            contract.BOXES: features.boxes,
            contract.CLASS_EMBEDS: features.class_embeds,
            contract.LOGIT_SHIFT: features.shift,
            contract.LOGIT_SCALE: features.scale,
            LOGITS: class_logits(features, embeds, Scratch()),
        }
        if features.objectness is not None:
            found[contract.OBJECTNESS] = features.objectness
        return found

    def info(self) -> dict[str, Any]:
        """As `SessionDetector.info`, with family and image size."""
        return {**super().info(), "family": self.constants.family, "image_size": self.constants.image_size}

    def _encode_texts(self, classes: Sequence[str], check: Callable[[], None] | None) -> Floats:
        """(C, D) in memory of their own; as many runs as chunks."""
        ids = self.tokenizer.encode(classes)
        parts = []
        with self._text_encoder.lock:
            self._check_open()
            for start in range(0, len(ids), contract.CHUNK):
                if check is not None:
                    check()
                parts.append(self._run_text_encoder(ids[start : start + contract.CHUNK]))
        found = np.concatenate(parts)
        found.flags.writeable = False
        return found

    def _run_text_encoder(self, ids: npt.NDArray[np.int32]) -> Floats:
        """(C, D) of at most a chunk, in memory of their own; under the session's lock."""
        chain = self._chain
        with chain.lock:
            binding = self._text_encoder.prepare({"C": len(ids)})
            chain.write(binding, contract.INPUT_IDS, ids)
            chain.launch(binding)
            embeds: Floats = chain.fetch(binding, (contract.TEXT_EMBEDS,))[contract.TEXT_EMBEDS].copy()
            return embeds

    def _encode_image(self, image: npt.NDArray[np.uint8]) -> ImageFeatures:
        with self._image_encoder.lock:
            self._check_open()
            return self._run_image_encoder(image)

    def _run_image_encoder(self, image: npt.NDArray[np.uint8]) -> ImageFeatures:
        """Features in memory of their own; under the session's lock."""
        chain = self._chain
        with chain.lock:
            binding = self._image_encoder.prepare()
        preprocess(image, self.constants, chain.stage(binding, contract.PIXEL_VALUES), self._scratch)
        self._scratch.trim(MAX_KEPT_BYTES)
        names = [t.name for t in self._image_encoder.spec.outputs]
        with chain.lock:
            chain.send(binding, contract.PIXEL_VALUES)
            chain.launch(binding)
            found = {name: value[0].copy() for name, value in chain.fetch(binding, names).items()}
        return ImageFeatures.of(
            found[contract.BOXES],
            found[contract.CLASS_EMBEDS],
            found[contract.LOGIT_SHIFT],
            found[contract.LOGIT_SCALE],
            found.get(contract.OBJECTNESS),
        )
