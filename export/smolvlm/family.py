"""SmolVLM in the common pipeline, and what transformers' model and processor say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import Idefics3Processor

from pixano_edge.engine.bundle.manifest import Preprocess
from pixano_edge.engine.contracts import decoder as decoders
from pixano_edge.engine.contracts import smolvlm as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import ExportError
from pixano_edge.engine.models.smolvlm.model import image_text
from pixano_edge.engine.models.smolvlm.preprocess import Normaliser, cut
from pixano_edge.engine.models.text.messages import read_conversation
from pixano_edge.engine.models.text.prompt import encode_conversation
from pixano_edge.engine.models.text.template import ChatTemplate
from pixano_edge.engine.models.text.tokenizer import TextTokenizer
from pixano_edge.export.checkpoint import quiet
from pixano_edge.export.decoder.weights import DecoderWeights
from pixano_edge.export.differences import Arrays
from pixano_edge.export.photos import Photo
from pixano_edge.export.smolvlm.checkpoint import SmolVlmCheckpoint
from pixano_edge.export.vlm.family import Answer, GraphRun

TILES = 2
"""Of each photo, how many are compared after the vision encoder: the first, and the last, which is the whole."""


class VisionEncoder(nn.Module):
    """Full square tiles to features; names and shapes as `contract.vision_encoder`.

    Assembled from the stock submodules. transformers looks positions up by where a patch lies within what is not
    padding; in a full tile that is every position in order. Tiles of zeros alone, which it takes for padding between
    images of a batch, are encoded like any other.
    """

    position: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        vision = model.model.vision_model
        self.patch_embedding = vision.embeddings.patch_embedding
        self.layers = vision.encoder.layers
        self.post_norm = vision.post_layernorm
        self.connector = model.model.connector
        self.register_buffer("position", vision.embeddings.position_embedding.weight.detach()[None].clone())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns `features`."""
        hidden = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            hidden = layer(hidden, None)
        features: Tensor = self.connector(self.post_norm(hidden))
        return features


class SmolVlmFamily:
    """A `VlmFamily`; see there.

    Args:
        loaded: The checkpoint.
    """

    def __init__(self, loaded: SmolVlmCheckpoint) -> None:
        c = loaded.constants
        self.loaded, self.decoder = loaded, c.decoder
        self.family = contract.FAMILY
        self.source, self.licence, self.notes = loaded.source, loaded.licence, loaded.notes
        self.constants = c.to_dict()
        self.preprocess = Preprocess(
            resize="tiles", image_size=c.image_size, longest_edge=c.longest_edge, mean=c.mean, std=c.std
        )
        self.files: Mapping[str, bytes] = {
            decoders.TOKENIZER: loaded.tokenizer,
            decoders.CHAT_TEMPLATE: loaded.template.encode(),
        }
        self.weights = DecoderWeights(loaded.model.model.text_model, loaded.model.lm_head, c.decoder)
        vision = contract.vision_encoder(c)
        self.specs: Mapping[str, GraphSpec] = {vision.name: vision}
        kind = type(loaded.model).__name__
        self.reference = f"transformers {transformers.__version__} {kind}, torch {torch.__version__}, fp32, cpu"
        with quiet():
            # SmolVLMProcessor asks for packages that only videos need; for images the two are the same.
            self._processor = Idefics3Processor(
                loaded.images, loaded.text, image_seq_len=c.image_seq_len, chat_template=loaded.template
            )
        self._tokenizer = TextTokenizer(loaded.tokenizer)
        self._template = ChatTemplate(loaded.template)

    def modules(self) -> Mapping[str, nn.Module]:
        return {contract.VISION_ENCODER: VisionEncoder(self.loaded.model).eval()}

    def example(self, graph: str) -> tuple[Tensor, ...]:
        feeds = self.feeds(self.specs[graph], {"T": 2}, 0)
        return tuple(torch.from_numpy(feeds[t.name]) for t in self.specs[graph].inputs)

    def keep(self, graph: str, model: onnx.ModelProto) -> dict[str, str]:
        return {}

    def feeds(self, spec: GraphSpec, sizes: Mapping[str, int], seed: int) -> Arrays:
        shape = spec.inputs[0].shape(sizes)
        return {spec.inputs[0].name: np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)}

    def ask(self, photo: Photo, question: str, tokens: int) -> Answer:
        model, c = self.loaded.model, self.loaded.constants
        said: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        ]
        with quiet():
            text = self._processor.apply_chat_template(said, add_generation_prompt=True)
            inputs = self._processor(text=text, images=[[Image.fromarray(photo.pixels)]], return_tensors="pt")
        names = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
        given = {name: inputs[name] for name in names}
        ids = given["input_ids"][0].numpy()
        if len(ids) + tokens > c.decoder.max_length:
            raise ExportError(
                f"A question about '{photo.name}' has {len(ids)} tokens, and the model takes {c.decoder.max_length}.",
                "Give smaller --photos.",
            )
        pixels = given["pixel_values"][0]
        self._check_engine(photo, question, ids, pixels.numpy())
        with torch.no_grad(), quiet():
            features = model.model.get_image_features(
                given["pixel_values"], given["pixel_attention_mask"].bool(), return_dict=True
            ).pooler_output
            features = torch.cat(list(features))
            embed = model.get_input_embeddings()
            embeds = embed(given["input_ids"])
            embeds[given["input_ids"] == c.image_token_id] = features
            made = greedy(model, tokens, **given)
            rows = embed(made.sequences[0, -tokens:])
        chosen = sorted({0, len(pixels) - 1})[:TILES]
        per_tile = features.reshape(len(pixels), c.image_seq_len, -1)
        run = GraphRun(
            contract.VISION_ENCODER,
            {contract.PIXEL_VALUES: np.ascontiguousarray(pixels.numpy()[chosen])},
            {contract.FEATURES: per_tile.numpy()[chosen]},
        )
        return Answer(
            photo=photo,
            question=question,
            input_ids=ids,
            embeds=embeds.numpy(),
            tokens=made.sequences[0, -tokens:].numpy(),
            logits=torch.cat(made.logits).float().numpy(),
            token_embeds=rows.numpy(),
            runs=[run],
            pixel_values=pixels.numpy(),
            features=features.numpy(),
        )

    def _check_engine(self, photo: Photo, question: str, ids: Any, pixels: Any) -> None:
        """Compares the engine's tokens and tiles with the original processor's."""
        c = self.loaded.constants
        tiles = cut(photo.pixels, c.longest_edge, c.image_size, split=c.split, resample=_filter(c.resample))
        expanded = image_text(c, tiles.rows, tiles.columns)
        conversation = read_conversation(question, [photo])
        found = encode_conversation(conversation, self._template, self._tokenizer, c.image_token, lambda _: expanded)
        same = list(found) == ids.tolist()
        normalise = Normaliser(c.mean, c.std, c.rescale)
        mine = np.empty((len(tiles.squares), 3, c.image_size, c.image_size), np.float32)
        for out, square in zip(mine, tiles.squares):
            normalise.write(square, out)
        # One unit in the last place of pixels near 1.
        equal = mine.shape == pixels.shape and float(np.abs(mine - pixels).max()) <= 1e-6
        if not same or not equal:
            what = "pixels" if same else "tokens"
            raise ExportError(
                f"The engine's {what} of '{photo.name}' are not the original processor's.",
                "Please report this with the checkpoint's name.",
            )


def greedy(model: Any, tokens: int, **given: Any) -> Any:
    """transformers' greedy answer of so many tokens, with the logits of every step; no token ends it."""
    return model.generate(
        **given,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )


def _filter(name: str) -> int:
    return int(Image.Resampling[name.upper()])
