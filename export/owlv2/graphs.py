"""The two graphs of OWLv2 and OWL-ViT as modules that export cleanly.

Both are assembled from the submodules of transformers' `Owlv2ForObjectDetection` / `OwlViTForObjectDetection`, so the
weights and the attention are the stock ones. What differs:

* image and text part ways: the image encoder ends at what scores need (see the contract), since the product with the
  text embeddings is one matrix product that any number of classes shares;
* position embeddings and the bias of the boxes, which depend on the image size alone, are constants;
* the text's causal mask is one constant; of the padding nothing is masked, since it comes after the end token;
* the end token is found with comparisons and a small matrix product instead of ArgMax over ids, which ONNX Runtime's
  CUDA provider does not take, and GatherND.

Architecture: Minderer et al., "Simple Open-Vocabulary Object Detection with Vision Transformers" (2022) and "Scaling
Open-Vocabulary Object Detection" (2023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from pixano_edge.engine.contracts import owlv2 as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.contracts.owlv2 import OwlConstants
from pixano_edge.export.differences import Arrays
from pixano_edge.export.tensorrt_graph import HEAD

BLOCKED = -1e4
"""Added to the scores of tokens that may not be seen: exp of it is 0 in float32 as in float16, which holds it."""
EPSILON = 1e-6
"""Added to lengths before dividing, as upstream does."""


def backbone(model: Any) -> Any:
    """The `Owlv2Model` or `OwlViTModel` inside."""
    return model.owlv2 if hasattr(model, "owlv2") else model.owlvit


class ImageEncoder(nn.Module):
    """Normalised pixels to boxes and their scores' parts; names and shapes as `contract.image_encoder`."""

    position: Tensor
    first: Tensor
    box_bias: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        vision = backbone(model).vision_model
        self.patch_embedding = vision.embeddings.patch_embedding
        self.pre_norm = vision.pre_layernorm
        self.layers = vision.encoder.layers
        self.post_norm = vision.post_layernorm
        self.merged_norm = model.layer_norm
        self.box_head = model.box_head
        self.class_head = model.class_head
        self.objectness_head = getattr(model, "objectness_head", None)
        grid = int(model.config.vision_config.image_size) // int(model.config.vision_config.patch_size)
        with torch.no_grad():
            position = vision.embeddings.position_embedding.weight.detach()
            # The class token never changes before the first layer.
            first = vision.embeddings.class_embedding.detach().reshape(1, 1, -1) + position[:1]
            self.register_buffer("position", position[None, 1:].clone())
            self.register_buffer("first", first.clone())
            self.register_buffer("box_bias", model.compute_box_bias(grid, grid).clone())

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Returns `boxes`, `class_embeds`, `logit_shift`, `logit_scale` and, of OWLv2, `objectness`."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.position
        hidden = self.pre_norm(torch.cat([self.first, patches], dim=1))
        for layer in self.layers:
            hidden = layer(hidden, None)
        tokens = self.post_norm(hidden)
        # Every token of a patch takes the class token in by multiplication.
        features = self.merged_norm(tokens[:, 1:] * tokens[:, :1])
        head = self.class_head
        found = (
            torch.sigmoid(self.box_head(features) + self.box_bias),
            head.dense0(features),
            head.logit_shift(features),
            head.elu(head.logit_scale(features)) + 1,
        )
        if self.objectness_head is None:
            return found
        return (*found, self.objectness_head(features).squeeze(-1))


class TextEncoder(nn.Module):
    """C class names to unit vectors; names and shapes as `contract.text_encoder`."""

    position: Tensor
    causal: Tensor
    before: Tensor

    def __init__(self, model: Any, end_token: int) -> None:
        super().__init__()
        text = backbone(model).text_model
        self.tokens = text.embeddings.token_embedding
        self.layers = text.encoder.layers
        self.final_norm = text.final_layer_norm
        self.projection = backbone(model).text_projection
        self.end_token = end_token
        length = int(model.config.text_config.max_position_embeddings)
        ones = torch.ones(length, length)
        with torch.no_grad():
            self.register_buffer("position", text.embeddings.position_embedding.weight.detach()[None].clone())
        self.register_buffer("causal", (ones.triu(1) * BLOCKED)[None, None])
        self.register_buffer("before", ones.triu(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns `text_embeds`."""
        hidden = self.tokens(input_ids) + self.position
        for layer in self.layers:
            hidden = layer(hidden, self.causal)
        hidden = self.final_norm(hidden)
        ends = (input_ids == self.end_token).to(hidden.dtype)
        # Only the first: a tokeniser may pad with the end token.
        first = ends * (ends @ self.before < 0.5).to(hidden.dtype)
        pooled = self.projection((first[:, None] @ hidden)[:, 0])
        return unit(unit(pooled, 0.0), EPSILON)


def unit(x: Tensor, epsilon: float) -> Tensor:
    """Vectors of length 1. Upstream normalises text twice: without epsilon, and with it in the class head."""
    return x / ((x * x).sum(-1, keepdim=True).sqrt() + epsilon)


def modules(model: Any, constants: OwlConstants) -> dict[str, nn.Module]:
    """The graphs of a loaded model, by contract name, in eval mode."""
    return {
        contract.IMAGE_ENCODER: ImageEncoder(model).eval(),
        contract.TEXT_ENCODER: TextEncoder(model, constants.end_token).eval(),
    }


def example_inputs(graph: str, constants: OwlConstants) -> tuple[Tensor, ...]:
    """Tensors to trace `graph` with."""
    spec = contract.graphs(constants)[graph]
    feeds = random_feeds(spec, {"C": 3}, 0, constants)
    return tuple(torch.from_numpy(feeds[t.name]) for t in spec.inputs)


def random_feeds(spec: GraphSpec, sizes: Any, seed: int, constants: OwlConstants) -> Arrays:
    """Inputs for `spec` by name, deterministic in `seed`: pixels, or texts of several lengths with their end."""
    rng = np.random.default_rng(seed)
    if spec.name == contract.IMAGE_ENCODER:
        shape = spec.inputs[0].shape(sizes)
        return {contract.PIXEL_VALUES: rng.standard_normal(shape).astype(np.float32)}
    return {contract.INPUT_IDS: random_ids(int(sizes["C"]), rng, constants)}


def random_ids(count: int, rng: np.random.Generator, constants: OwlConstants) -> npt.NDArray[np.int32]:
    """(count, max_tokens) ids: a start, some tokens, the end, padding."""
    length = constants.max_tokens
    ids = np.full((count, length), constants.pad_token, np.int32)
    for row in ids:
        end = int(rng.integers(2, length))
        row[:end] = rng.integers(0, constants.end_token, end)
        row[end] = constants.end_token
    return ids


def kept_in_fp32(graph: str, model: onnx.ModelProto) -> dict[str, str]:
    """Nodes that stay in fp32 in fp16 graphs: the last layer of each small head, and the text's normalisation.

    A box in fp16 is no better than 1/2000 of the picture, shift and scale act on every score of their box, and squares
    of a text embedding may overflow. Class embeddings, which are compared by direction, stay in fp16.
    """
    made_by = {output: node for node in model.graph.node for output in node.output}
    pending = [made_by[o.name] for o in model.graph.output if o.name != contract.CLASS_EMBEDS]
    kept: dict[str, str] = {}
    while pending:
        node = pending.pop()
        if node.name in kept:
            continue
        kept[node.name] = HEAD
        # Back to the product that the head ends with.
        if node.op_type not in ("MatMul", "Gemm"):
            pending += [made_by[name] for name in node.input if name in made_by]
    return kept
