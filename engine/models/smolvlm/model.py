"""SmolVLM, SmolVLM2 and Idefics3: an image becomes tiles, each tile L features in the places of L image tokens.

Reference: transformers' ``SmolVLMForConditionalGeneration`` with ``SmolVLMProcessor``. `preprocess.cut` makes the
tiles, `image_text` the tokens around them; features are kept per tile, so an image that comes again is not encoded.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ...contracts import smolvlm as contract
from ...contracts.smolvlm import SmolVlmConstants
from ...runtime.base import Session
from ..decoder.base import Rgb
from ..decoder.model import DecoderModel, ImagePart, Prompt
from ..decoder.session import Floats, image_keys
from ..sam2.cache import pixel_digest
from ..text.messages import Conversation
from ..text.prompt import encode_conversation
from .preprocess import Normaliser, Tiles, cut, tile_grid


class SmolVlmModel(DecoderModel):
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
    constants_type: ClassVar[Any] = SmolVlmConstants

    def __init__(
        self,
        sessions: Mapping[str, Session],
        constants: SmolVlmConstants,
        tokenizer: str | bytes,
        template: str | bytes,
        **options: Any,
    ) -> None:
        super().__init__(sessions, constants.decoder, tokenizer, template, **options)
        self.constants = constants
        self._vision = sessions[contract.VISION_ENCODER]
        self._normaliser = Normaliser(constants.mean, constants.std, constants.rescale)
        self._resample = Image.Resampling[constants.resample.upper()]

    def prepare(self, conversation: Conversation, images: Sequence[Rgb]) -> Prompt:
        """See `DecoderModel.prepare`."""
        c = self.constants
        grids = [tile_grid(image.shape[0], image.shape[1], c.longest_edge, c.image_size, c.split) for image in images]
        texts = [image_text(c, rows, columns) for rows, columns in grids]
        ids = np.array(
            encode_conversation(conversation, self.template, self.tokenizer, c.image_token, texts.__getitem__),
            np.int32,
        )
        places = np.flatnonzero(ids == c.image_token_id)
        keys, parts, at = ids.astype(np.int64), [], 0
        for image, (rows, columns) in zip(images, grids):
            count = (rows * columns + 1) * c.image_seq_len
            slots = places[at : at + count]
            digest = pixel_digest(image)
            keys[slots] = image_keys(digest, count)
            parts.append(ImagePart(slots, partial(self._encode, image, digest, rows * columns + 1)))
            at += count
        return Prompt(ids, keys, tuple(parts))

    def _encode(self, image: Rgb, digest: bytes, count: int) -> Generator[None, None, Floats]:
        """(count * L, D) features of an image, a tile at a time."""
        tiles: list[Tiles] = []

        def run(index: int) -> Floats:
            if not tiles:
                c = self.constants
                tiles.append(cut(image, c.longest_edge, c.image_size, split=c.split, resample=self._resample))
            return self._run_vision(tiles[0].squares[index])

        found = []
        for index in range(count):
            if index:
                yield None
            self._check_open()
            found.append(self.image_cache.get_or_create((digest, index), partial(run, index)))
        return np.concatenate(found)

    def warm_vision(self) -> None:
        """See `DecoderModel.warm_vision`."""
        side = self.constants.image_size
        self._run_vision(np.zeros((side, side, 3), np.uint8))

    def _run_vision(self, square: Rgb) -> Floats:
        """(L, D) features of one tile; a copy."""
        with self._vision.lock:
            self._check_open()
            binding = self._vision.prepare({"T": 1})
            pixels = binding.inputs[contract.PIXEL_VALUES]
            if pixels.array is not None and self.device.kind == "cpu":
                self._normaliser.write(square, pixels.array[0])
            else:
                host = np.empty(pixels.shape, np.float32)
                self._normaliser.write(square, host[0])
                binding.write(contract.PIXEL_VALUES, host)
            binding.run()
            self._encoded += 1
            features: Floats = binding.read(contract.FEATURES)[0].copy()
            return features


def image_text(c: SmolVlmConstants, rows: int, columns: int) -> str:
    """What stands in the prompt for an image of so many tiles, as transformers' ``get_image_prompt_string``."""
    features = c.image_token * c.image_seq_len
    whole = f"{c.fake_token}{c.global_token}{features}{c.fake_token}"
    if not rows:
        return whole
    lines = (
        "".join(f"{c.fake_token}{c.tile_token.format(row=r + 1, col=k + 1)}{features}" for k in range(columns))
        for r in range(rows)
    )
    return "".join(f"{line}\n" for line in lines) + f"\n{whole}"
