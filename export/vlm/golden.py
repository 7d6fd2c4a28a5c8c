"""Golden samples of vision-language models: a picture, a question and PyTorch's greedy answer.

Keys of each ``golden/<name>.npz`` (N tokens of the prompt, M of the answer; little-endian, no pickles):

====================  =============  =====================================================================
key                   shape, dtype   meaning
====================  =============  =====================================================================
original_size         (2,) int32     height and width of the picture
question              () <U          the user's text; the picture stands before it
input_ids             (N,) int32     tokens of the prompt, image tokens expanded
pixel_values_index    (K,) int64     flat C-order positions in everything the vision encoder sees
pixel_values_values   (K,) float32   values there
features_index        (K,) int64     flat C-order positions in (F, D), the features in prompt order
features_values       (K,) float32   values there
tokens                (M,) int32     PyTorch's greedy answer; tokens that would end it do not
margins               (M,) float32   how far PyTorch's best logit is above the next, at each step
logits_index          (K,) int64     positions in a row of logits, the same for every step
logits_values         (M, K) f32     values there
logits_scale          () float32     largest magnitude of any logit, which errors are relative to
====================  =============  =====================================================================
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixano_edge.engine.bundle.manifest import GoldenSample
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.export.photos import Photo, reduce
from pixano_edge.export.vlm.family import Answer, VlmFamily

SAMPLES = 2
VALUES = 512
MAX_SIDE = 384
TOKENS = 32


def add_golden(
    writer: BundleWriter, family: VlmFamily, photos: Sequence[Photo], questions: Sequence[str]
) -> list[GoldenSample]:
    """Writes `SAMPLES` golden samples into the bundle, each with a question of its own."""
    samples = []
    for index, photo in enumerate(photos[:SAMPLES]):
        small = Photo(photo.name, reduce(photo.pixels, MAX_SIDE), photo.origin)
        name = f"golden-{index}"
        buffer = io.BytesIO()
        # PNG: every decoder gives the same pixels, which JPEG does not promise.
        Image.fromarray(small.pixels).save(buffer, format="PNG", optimize=True)
        writer.add_file(f"golden/{name}.png", buffer.getvalue())
        stored = io.BytesIO()
        arrays: dict[str, Any] = make_sample(family.ask(small, questions[index % len(questions)], TOKENS))
        np.savez_compressed(stored, **arrays)
        writer.add_file(f"golden/{name}.npz", stored.getvalue())
        samples.append(GoldenSample(name=name, image=f"golden/{name}.png", tensors=f"golden/{name}.npz"))
    return samples


def make_sample(answer: Answer) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one golden sample."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "original_size": np.array(answer.photo.size, np.int32),
        "question": np.array(answer.question),
        "input_ids": answer.input_ids.astype(np.int32),
        "tokens": answer.tokens.astype(np.int32),
        "margins": answer.margins,
        "logits_scale": np.float32(np.abs(answer.logits).max()).reshape(()),
    }
    for name, value in (("pixel_values", answer.pixel_values), ("features", answer.features)):
        arrays[f"{name}_index"] = index = _spread(value.size)
        arrays[f"{name}_values"] = value.reshape(-1)[index].astype(np.float32)
    arrays["logits_index"] = index = _spread(answer.logits.shape[1])
    arrays["logits_values"] = np.ascontiguousarray(answer.logits[:, index])
    return arrays


def _spread(size: int) -> npt.NDArray[np.int64]:
    return np.linspace(0, size - 1, min(VALUES, size)).astype(np.int64)
