"""Qwen2.5-VL in the common pipeline, and what transformers' model and processor say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from pixano_edge.engine.bundle.manifest import Preprocess
from pixano_edge.engine.contracts import decoder as decoders
from pixano_edge.engine.contracts import qwen2_5_vl as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import ExportError
from pixano_edge.engine.models.text.messages import read_conversation
from pixano_edge.engine.models.text.prompt import encode_conversation
from pixano_edge.engine.models.text.template import ChatTemplate
from pixano_edge.engine.models.text.tokenizer import TextTokenizer
from pixano_edge.export.checkpoint import quiet
from pixano_edge.export.decoder.weights import DecoderWeights
from pixano_edge.export.differences import Arrays
from pixano_edge.export.photos import Photo
from pixano_edge.export.qwen2_5_vl.checkpoint import QwenVlCheckpoint, mrope_section
from pixano_edge.export.qwen2_5_vl.vision import VisionEncoder, arrange, kept_in_fp32, random_feeds
from pixano_edge.export.smolvlm.family import greedy
from pixano_edge.export.vlm.family import Answer, GraphRun


class QwenVlFamily:
    """A `VlmFamily`; see there.

    Args:
        loaded: The checkpoint.
    """

    def __init__(self, loaded: QwenVlCheckpoint) -> None:
        c = loaded.constants
        self.loaded, self.decoder = loaded, c.decoder
        self.family = contract.FAMILY
        self.source, self.licence, self.notes = loaded.source, loaded.licence, loaded.notes
        self.constants = c.to_dict()
        self.preprocess = Preprocess(resize="patches", image_size=c.factor, mean=c.mean, std=c.std)
        self.files: Mapping[str, bytes] = {
            decoders.TOKENIZER: loaded.tokenizer,
            decoders.CHAT_TEMPLATE: loaded.template.encode(),
        }
        text = loaded.model.model.language_model
        self.weights = DecoderWeights(text, loaded.model.lm_head, c.decoder, mrope_section(text.config))
        vision = contract.vision_encoder(c)
        self.specs: Mapping[str, GraphSpec] = {vision.name: vision}
        kind = type(loaded.model).__name__
        self.reference = f"transformers {transformers.__version__} {kind}, torch {torch.__version__}, fp32, cpu"
        self._tokenizer = TextTokenizer(loaded.tokenizer)
        self._template = ChatTemplate(loaded.template)

    def modules(self) -> Mapping[str, nn.Module]:
        return {contract.VISION_ENCODER: VisionEncoder(self.loaded.model, self.loaded.constants).eval()}

    def example(self, graph: str) -> tuple[Tensor, ...]:
        feeds = random_feeds(3, 0, self.loaded.constants)
        return tuple(torch.from_numpy(feeds[t.name]) for t in self.specs[graph].inputs)

    def keep(self, graph: str, model: onnx.ModelProto) -> dict[str, str]:
        return kept_in_fp32(model)

    def feeds(self, spec: GraphSpec, sizes: Mapping[str, int], seed: int) -> Arrays:
        return random_feeds(int(sizes["W"]), seed, self.loaded.constants)

    def ask(self, photo: Photo, question: str, tokens: int) -> Answer:
        model, c = self.loaded.model, self.loaded.constants
        with quiet():
            seen = self.loaded.images([Image.fromarray(photo.pixels)], return_tensors="pt")
        pixels, grid = seen["pixel_values"], seen["image_grid_thw"]
        count = int(grid[0].prod()) // c.merge_size**2
        ids = self._prompt(question, count)
        if len(ids) + tokens > c.decoder.max_length:
            raise ExportError(
                f"A question about '{photo.name}' has {len(ids)} tokens, and the model takes {c.decoder.max_length}.",
                "Give smaller --photos.",
            )
        self._check_engine(photo, question, ids, count)
        given = torch.from_numpy(ids)[None]
        kinds = (given == c.image_token_id).int()
        with torch.no_grad(), quiet():
            features = model.model.get_image_features(pixels, grid, return_dict=True).pooler_output
            features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
            embed = model.get_input_embeddings()
            embeds = embed(given)
            embeds[given == c.image_token_id] = features
            model.model.rope_deltas = None
            made = greedy(
                model,
                tokens,
                input_ids=given,
                attention_mask=torch.ones_like(given),
                pixel_values=pixels,
                image_grid_thw=grid,
                mm_token_type_ids=kinds,
            )
            rows = embed(made.sequences[0, -tokens:])
            positions, _ = model.model.get_rope_index(given, kinds, image_grid_thw=grid)
        prompt = positions[:, 0].numpy()
        after = prompt.max() + 1 + np.arange(tokens)
        feeds, places = arrange(pixels.numpy(), (int(grid[0, 1]), int(grid[0, 2])), c)
        return Answer(
            photo=photo,
            question=question,
            input_ids=ids,
            embeds=embeds.numpy(),
            tokens=made.sequences[0, -tokens:].numpy(),
            logits=torch.cat(made.logits).float().numpy(),
            token_embeds=rows.numpy(),
            runs=[GraphRun(contract.VISION_ENCODER, feeds, {contract.FEATURES: features.numpy()}, places)],
            pixel_values=pixels.numpy(),
            features=features.numpy(),
            positions=np.concatenate([prompt, np.broadcast_to(after, (3, tokens))], axis=1).astype(np.int32),
        )

    def _prompt(self, question: str, count: int) -> Any:
        """(N,) tokens of the original template and tokeniser, the image token repeated as the processor does."""
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        c = self.loaded.constants
        with quiet():
            text = self.loaded.text.apply_chat_template(
                said, chat_template=self.loaded.template, add_generation_prompt=True, tokenize=False
            )
            text = text.replace(c.image_token, c.image_token * count)
            return np.array(self.loaded.text(text)["input_ids"], np.int64)

    def _check_engine(self, photo: Photo, question: str, ids: Any, count: int) -> None:
        """Compares the engine's tokens with the original's."""
        token = self.loaded.constants.image_token
        conversation = read_conversation(question, [photo])
        found = encode_conversation(conversation, self._template, self._tokenizer, token, lambda _: token * count)
        if list(found) != ids.tolist():
            raise ExportError(
                f"The engine's tokens of '{photo.name}' are not the original tokeniser's.",
                "Please report this with the checkpoint's name.",
            )
