"""Qwen2.5-VL: an image keeps its shape, becomes windows of patches, and its tokens have positions in three directions.

Reference: transformers' ``Qwen2_5_VLForConditionalGeneration`` with ``Qwen2_5_VLProcessor``. Images only, no videos.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ...contracts import qwen2_5_vl as contract
from ...contracts.qwen2_5_vl import QwenVlConstants
from ...runtime.base import Session
from ..decoder.base import Rgb
from ..decoder.model import DecoderModel, ImagePart, Prompt
from ..decoder.session import Floats, image_keys
from ..sam2.cache import pixel_digest
from ..smolvlm.preprocess import Normaliser
from ..text.messages import Conversation
from ..text.prompt import encode_conversation
from .preprocess import rope_positions, unit_grid, windows


class Qwen2_5VlModel(DecoderModel):
    """Answers about images with one bundle on one device. Thread-safe; see `decoder.base.VisionLanguageModel`.

    Make it with `open`; the constructor takes sessions that are open already and leaves closing them to its caller.

    Args:
        sessions: By graph name.
        constants: Of the checkpoint.
        tokenizer: Content of its ``tokenizer.json``.
        template: Content of its chat template.
        options: More arguments of `DecoderModel`.

    Attributes:
        constants: Of the checkpoint.
    """

    contract: ClassVar[Any] = contract
    constants_type: ClassVar[Any] = QwenVlConstants

    def __init__(
        self,
        sessions: Mapping[str, Session],
        constants: QwenVlConstants,
        tokenizer: str | bytes,
        template: str | bytes,
        **options: Any,
    ) -> None:
        super().__init__(sessions, constants.decoder, tokenizer, template, **options)
        self.constants = constants
        self._vision = sessions[contract.VISION_ENCODER]
        self._normaliser = Normaliser(constants.mean, constants.std, constants.rescale)

    def prepare(self, conversation: Conversation, images: Sequence[Rgb]) -> Prompt:
        """See `DecoderModel.prepare`; raises ImageError for an image that is too thin."""
        c = self.constants
        grids = [unit_grid(image.shape[0], image.shape[1], c) for image in images]
        texts = [c.image_token * (rows * columns) for rows, columns in grids]
        ids = np.array(
            encode_conversation(conversation, self.template, self.tokenizer, c.image_token, texts.__getitem__),
            np.int32,
        )
        places = np.flatnonzero(ids == c.image_token_id)
        keys, parts, at = ids.astype(np.int64), [], 0
        for image, (rows, columns) in zip(images, grids):
            slots = places[at : at + rows * columns]
            digest = pixel_digest(image)
            keys[slots] = image_keys(digest, len(slots))
            parts.append(ImagePart(slots, partial(self._encode, image, digest)))
            at += len(slots)
        positions, following = rope_positions(len(ids), [int(part.slots[0]) for part in parts], grids)
        return Prompt(ids, keys, tuple(parts), positions, following)

    def _encode(self, image: Rgb, digest: bytes) -> Generator[None, None, Floats]:
        """(units, D) features of an image, in one step."""
        self._check_open()
        yield None
        return self.image_cache.get_or_create(digest, partial(self._run_vision, image))

    def warm_vision(self) -> None:
        """See `DecoderModel.warm_vision`."""
        side = self.constants.patch_size * self.constants.merge_size
        self._run_vision(np.zeros((side, side, 3), np.uint8))

    def _run_vision(self, image: Rgb) -> Floats:
        made = windows(image, self.constants, self._normaliser)
        with self._vision.lock:
            self._check_open()
            binding = self._vision.prepare({"W": len(made.pixels)})
            binding.write(contract.PIXEL_VALUES, made.pixels)
            binding.write(contract.PATCH_POSITIONS, made.positions)
            binding.write(contract.VALID, made.valid)
            binding.run()
            self._encoded += 1
            features: Floats = binding.read(contract.FEATURES)
            return features.reshape(-1, features.shape[-1])[made.order]
