"""One image mask request on one loaded model, start to end, on the model's own thread."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..models.images import ImageLimits, decode_image
from ..models.sam2.prompts import build_prompts
from .convert import read_features, read_multimask, read_prompts, rle_of
from .families import LoadedModel
from .media import MediaPolicy
from .types import ArrayData, EdgeMaskGenerationOutput, NDArrayData
from .worker import Job

# Pixels of full-size masks held at once: prompts are decoded in groups so that many prompts on a large photo do not
# need P * M * H * W bytes.
_MASK_PIXELS = 1 << 26


def segment(model: LoadedModel, request: Any, media: MediaPolicy, job: Job) -> EdgeMaskGenerationOutput:
    """Decodes the image, encodes it (or takes the request's features), decodes all prompts, packs the masks.

    Raises:
        InvalidRequestError, ImageError, PromptError, ContractError: The request is malformed.
        CancelledError: The request was abandoned.
    """
    predictor, options = model.predictor, model.options
    assert predictor is not None
    multimask = read_multimask(request)
    prompts = read_prompts(request, predictor.constants.mask_size, model.memory)
    features = read_features(request)
    limits = ImageLimits(max_bytes=options.max_image_bytes, max_pixels=options.max_image_pixels)
    # The image is decoded even when features are given: only it tells the size that the masks must have.
    with job.stage("decode_image"):
        image = decode_image(media.read(getattr(request, "image", None), options.max_image_bytes), limits)
    height, width = image.shape[:2]
    # Here only to refuse bad prompts before the encoder runs, which takes a hundred times longer than the decoder.
    build_prompts(prompts, (height, width), predictor.constants)
    job.check()
    if features is None:
        embedding = _encoded(model, image, job)
    else:
        embedding = predictor.embedding_from_arrays(*features, (height, width))
    job.check()

    want_logits = bool(getattr(request, "return_logits", False))
    data: type[NDArrayData] = ArrayData if getattr(request, "answer_arrays", False) else NDArrayData
    group = max(1, _MASK_PIXELS // (height * width * (3 if multimask else 1)))
    masks, scores, logits = [], [], []
    for start in range(0, len(prompts), group):
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
    output = EdgeMaskGenerationOutput(masks=masks, scores=data.from_array(all_scores))
    if want_logits:
        all_logits = np.concatenate(logits)
        for one, prompt_scores in zip(all_logits, all_scores):
            model.memory.note(one, prompt_scores)
        output.mask_logits = data.from_array(all_logits[0] if len(all_logits) == 1 else all_logits)
    if getattr(request, "return_image_embedding", False):
        job.check()
        with job.stage("pack"):
            output.image_embedding = data.from_array(embedding.image_embed[0])
            output.high_resolution_features = [data.from_array(f[0]) for f in embedding.high_res]
    return output


def _encoded(model: LoadedModel, image: Any, job: Job) -> Any:
    """The image's features; the time of an encoder run is told apart from that of finding them in the cache."""
    assert model.predictor is not None
    misses = None if model.cache is None else model.cache().misses
    begun = time.perf_counter()
    embedding = model.predictor.encode(image)
    cached = model.cache is not None and model.cache().misses == misses
    job.stages["cached_features" if cached else "encode"] = time.perf_counter() - begun
    return embedding
