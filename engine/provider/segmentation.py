"""One image mask request on one loaded model, start to end, on the model's own thread."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.images import ImageLimits, decode_image
from ..models.sam2.cache import EmbeddingKey, pixel_digest
from ..models.sam2.prompts import build_prompts
from .convert import read_array, read_features, read_multimask, read_prompts, rle_of
from .errors import InvalidRequestError
from .families import LoadedModel
from .media import MediaPolicy
from .seen import Seen, SeenImages, handle_of
from .types import ArrayData, EdgeMaskGenerationOutput, NDArrayData
from .worker import Job

# Pixels of full-size masks held at once: prompts are decoded in groups so that many prompts on a large photo do not
# need P * M * H * W bytes.
_MASK_PIXELS = 1 << 26
_GROUP = 256
"""Prompts decoded until the next look at whether anybody still waits for them."""


class _Picture:
    """The image of a request, decoded only when it did not come before or its features are gone."""

    def __init__(self, model: LoadedModel, request: Any, media: MediaPolicy) -> None:
        assert model.predictor is not None
        self._model = model
        self._predictor = model.predictor
        options = model.options
        self._limits = ImageLimits(max_bytes=options.max_image_bytes, max_pixels=options.max_image_pixels)
        self._media = media
        source = getattr(request, "image", None)
        self._source: str | bytes
        if isinstance(source, str) and source[:5].lower() == "data:":
            self._source = source
        else:  # a file is read in any case: its content may have changed
            self._source = media.read(source, options.max_image_bytes)
        self._identity = SeenImages.identity(self._source)
        self._pixels: npt.NDArray[np.uint8] | None = None
        self._seen = model.seen.find(self._identity)
        # The image is decoded even when features are given: only it tells the size that the masks must have.
        self.size = self._seen.size if self._seen is not None else self._decoded().shape[:2]

    def has(self, key: EmbeddingKey) -> bool:
        """Whether features of this key are those of this image by this model."""
        if self._seen is None or self._seen.digest is None:
            self._seen = Seen(self.size, pixel_digest(self._decoded()))
        assert self._seen.digest is not None
        return key == self._predictor.key(self._seen.digest)

    def embedding(self) -> Any:
        """Its features, from the cache or computed now."""
        if self._seen is not None and self._seen.digest is not None:
            found = self._predictor.recall(self._seen.digest, self.size)
            if found is not None:
                return found
        return self._predictor.encode(self._decoded())

    def note(self, key: EmbeddingKey | None) -> None:
        """Remembers the image, now that it was accepted."""
        digest = key.digest if key is not None else None if self._seen is None else self._seen.digest
        self._model.seen.note(self._identity, Seen(self.size, digest))

    def _decoded(self) -> npt.NDArray[np.uint8]:
        if self._pixels is None:
            self._pixels = decode_image(self._media.read(self._source, self._limits.max_bytes), self._limits)
        return self._pixels


def segment(model: LoadedModel, request: Any, media: MediaPolicy, job: Job) -> EdgeMaskGenerationOutput:
    """Decodes the image, encodes it (or takes the request's features), decodes all prompts, packs the masks.

    Raises:
        InvalidRequestError, ImageError, PromptError, ContractError: The request is malformed.
        CancelledError: The request was abandoned.
    """
    predictor = model.predictor
    assert predictor is not None
    multimask = read_multimask(request)
    prompts = read_prompts(request, predictor.constants.mask_size, model.memory)
    echoed = getattr(request, "echoed", None)
    features = read_features(request) if echoed is None else None
    with job.stage("decode_image"):
        picture = _Picture(model, request, media)
    # Here only to refuse bad prompts before the encoder runs, which takes a hundred times longer than the decoder.
    build_prompts(prompts, picture.size, predictor.constants)
    job.check()
    if echoed is not None and not picture.has(echoed.key):
        embedding, finer = echoed.arrays()
        features = (
            read_array(embedding, "image_embedding"),
            [read_array(f, f"high_resolution_features[{i}]") for i, f in enumerate(finer)],
        )
    if features is None:
        embedding = _encoded(model, picture, job)
    else:
        embedding = predictor.embedding_from_arrays(*features, picture.size)
    key = getattr(embedding, "key", None)
    picture.note(key)
    handle = getattr(request, "embedding_handle", None)
    if handle is not None and (key is None or handle != handle_of(key)):
        raise InvalidRequestError(
            "The features' handle stands for another image or another model.",
            "Send the request again without image_embedding and high_resolution_features, and with "
            "return_image_embedding true.",
        )
    job.check()
    height, width = picture.size

    want_logits = bool(getattr(request, "return_logits", False))
    data: type[NDArrayData] = ArrayData if getattr(request, "answer_arrays", False) else NDArrayData
    group = min(max(1, _MASK_PIXELS // (height * width * (3 if multimask else 1))), _GROUP)
    masks, scores, logits = [], [], []
    for start in range(0, len(prompts), group):
        job.check()
        chunk = prompts[start : start + group]
        with job.stage("decode_masks"):
            found = predictor.predict(embedding, chunk, multimask=multimask, return_logits=want_logits)
        scores.append(np.array(found.scores))
        with job.stage("pack"):
            for prompt_masks in found.masks:
                job.check()
                masks.append([rle_of(mask) for mask in prompt_masks])
        if want_logits:
            logits.append(np.array(found.low_res_logits))
    all_scores = np.concatenate(scores)
    output = EdgeMaskGenerationOutput(masks=masks, scores=data.from_array(all_scores), embedding_key=key)
    if want_logits:
        all_logits = np.concatenate(logits)
        for one, prompt_scores in zip(all_logits, all_scores):
            model.memory.note(one, prompt_scores)
        output.mask_logits = data.from_array(all_logits[0] if len(all_logits) == 1 else all_logits)
    wanted = getattr(request, "wants_embedding", None)
    if getattr(request, "return_image_embedding", False) and (wanted is None or key is None or wanted(key)):
        job.check()
        with job.stage("pack"):
            output.image_embedding = data.from_array(embedding.image_embed[0])
            output.high_resolution_features = [data.from_array(f[0]) for f in embedding.high_res]
    return output


def _encoded(model: LoadedModel, picture: _Picture, job: Job) -> Any:
    """The image's features; the time of an encoder run is told apart from that of finding them in the cache."""
    misses = None if model.cache is None else model.cache().misses
    begun = time.perf_counter()
    embedding = picture.embedding()
    cached = model.cache is not None and model.cache().misses == misses
    job.stages["cached_features" if cached else "encode"] = time.perf_counter() - begun
    return embedding
