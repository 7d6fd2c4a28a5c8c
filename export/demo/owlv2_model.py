"""The small OWLv2 of the demo: its configuration, its start values, and the differentiable path from image to boxes.

The architecture is the one of ``transformers`` (CLIP's vision and text towers, box, class and objectness heads), only
narrower and shallower: the checkpoint is an ordinary ``owlv2`` folder for ``Owlv2ForObjectDetection``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Owlv2Config, Owlv2ForObjectDetection

IMAGE_SIZE = 256
PATCH = 16
GRID = IMAGE_SIZE // PATCH
TEXT_WIDTH = 128
REACHES = (1, 1, 1, 2, 2, 3)
"""How far the attention of each layer looks at first, in cells."""
# OWLv2's own mean and deviation of an image, those of CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def tiny_config(vocabulary: int, width: int = 192, layers: int = 6, heads: int = 6) -> Owlv2Config:
    """The configuration for a tokenizer of ``vocabulary`` tokens whose last two are start and end of a text."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
    }
    return Owlv2Config(text_config=text, vision_config=vision, projection_dim=TEXT_WIDTH)


def cosine_patches(count: int, patch: int = PATCH) -> NDArray[np.float32]:
    """``count`` orthogonal filters (count, 3, patch, patch): the cosine transform of a patch, low frequencies first.

    Three filters in five see the brightness, one the difference of red and blue, one that of green and the others. The
    content of the scenes falls with frequency f about as (1 + f) ** -1.85, and filters are scaled by the inverse, so
    that all of a token's values start with about one size.
    """
    k, n = np.mgrid[0:patch, 0:patch]
    basis = np.cos(np.pi * k * (2 * n + 1) / (2 * patch)) * np.where(k == 0, 1 / patch, 2 / patch) ** 0.5
    order = sorted((i * i + j * j, i, j) for i in range(patch) for j in range(patch))
    axes = np.array([[1, 1, 1], [1, 0, -1], [-0.5, 1, -0.5]]) / np.sqrt([[3], [2], [1.5]])
    counts = [count - 2 * (count // 5), count // 5, count // 5]
    filters = []
    for axis, part, gain in zip(axes, counts, (0.75, 2.2, 2.4), strict=True):
        for _, i, j in order[:part]:
            scale = gain * (1 + np.hypot(i, j)) ** 1.85 / patch
            filters.append(scale * axis[:, None, None] * np.outer(basis[i], basis[j]))
    return np.array(filters, np.float32)


WAVES = np.pi * 2.0 ** np.linspace(-4, 0, 8)
"""Angular frequencies of the code of places, in cells; the slowest goes round once on 32 cells."""
CODE = 4 * len(WAVES)


def grid_code(grid: int = GRID) -> NDArray[np.float32]:
    """A code of each cell's place (grid * grid, CODE): sin x, cos x, sin y, cos y at the frequencies ``WAVES``."""
    y, x = np.mgrid[0:grid, 0:grid].reshape(2, -1, 1)
    parts = [np.sin(x * WAVES), np.cos(x * WAVES), np.sin(y * WAVES), np.cos(y * WAVES)]
    return np.concatenate(parts, 1).astype(np.float32)


def shifted_code(dx: float, dy: float) -> NDArray[np.float32]:
    """The matrix (CODE, CODE) that takes the code of (x, y) to the one of (x + dx, y + dy)."""
    out = np.zeros((4, len(WAVES), 4, len(WAVES)), np.float32)
    waves = range(len(WAVES))
    for first, step in ((0, dx), (2, dy)):
        c, s = np.cos(step * WAVES), np.sin(step * WAVES)
        for row, column, value in ((0, 0, c), (0, 1, s), (1, 0, -s), (1, 1, c)):
            out[first + row, waves, first + column, waves] = value
    return out.reshape(CODE, CODE)


SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))


def start_attention(attention: nn.Module, reach: float) -> None:
    """Lets four heads look ``reach`` cells left, right, up and down, and the others at what is like the place itself.

    The last ``CODE`` channels of a token start as the code of its place. A query that is this code, shifted, is most
    like the key of the place it is shifted to: the layer starts as a convolution (as in ConViT, d'Ascoli et al. 2021),
    which finds shapes from far fewer pictures than attention that starts anywhere.
    """
    query, key = attention.q_proj.weight, attention.k_proj.weight
    key.mul_(0.8)
    query.copy_(key)
    size = attention.head_dim
    for head, (dx, dy) in enumerate(SIDES):
        rows = slice(head * size, head * size + CODE)
        for weight, shift in ((query, (dx * reach, dy * reach)), (key, (0.0, 0.0))):
            weight[rows].mul_(0.1)
            weight[rows, -CODE:] = 1.5 * torch.from_numpy(shifted_code(*shift))


@torch.no_grad()
def initialise(model: Owlv2ForObjectDetection) -> None:
    """Start values suited to a narrow network trained from scratch, drawn from torch's global generator."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = 0.4 if name.endswith(("out_proj", "fc2")) else 1.0
            module.weight.normal_(std=gain * module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
    vision, text = model.owlv2.vision_model, model.owlv2.text_model
    for reach, layer in zip(REACHES, vision.encoder.layers, strict=False):
        start_attention(layer.self_attn, reach)
    for layer in text.encoder.layers:
        layer.self_attn.q_proj.weight.copy_(layer.self_attn.k_proj.weight)
    width = model.config.vision_config.hidden_size
    embeddings = vision.embeddings
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.weight[:-CODE].copy_(torch.from_numpy(cosine_patches(width - CODE)))
    embeddings.class_embedding.normal_(std=0.5)
    embeddings.position_embedding.weight.normal_(std=0.02)
    embeddings.position_embedding.weight[1:, -CODE:] = 1.4 * torch.from_numpy(grid_code())
    # Every token is multiplied with the class token: with both near one, the product starts as their sum.
    vision.post_layernorm.weight.fill_(0.5)
    vision.post_layernorm.bias.fill_(1.0)
    text.embeddings.token_embedding.weight.normal_(std=0.5)
    text.embeddings.position_embedding.weight.normal_(std=0.1)
    # The start of the scores: few objects. Of the boxes: four cells wide, not one.
    head = model.class_head
    for module, bias in ((head.logit_scale, 15.0), (head.logit_shift, -0.7), (model.objectness_head.dense2, -4.0)):
        module.weight.normal_(std=0.02)
        module.bias.fill_(bias)
    model.box_head.dense2.weight.mul_(0.3)
    model.box_head.dense2.bias.copy_(torch.tensor([0.0, 0.0, 1.6, 1.6]))


@dataclass
class Predictions:
    """For B images of N = GRID * GRID tokens: ``boxes`` (B, N, 4) float32 cx, cy, w, h in sides of the image;
    ``logits`` (B, N, K) float32, one for each of K texts; ``objectness`` (B, N) float32; ``features`` (B, N, C)."""

    boxes: Tensor
    logits: Tensor
    objectness: Tensor
    features: Tensor


def normalise(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 RGB to (B, 3, H, W) float32 with OWLv2's mean and deviation."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def encode_texts(model: Owlv2ForObjectDetection, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Text features (K, TEXT_WIDTH), padded only to the longest text: padding behind the end changes nothing."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    return model.owlv2.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output


def predict(model: Owlv2ForObjectDetection, pixels: Tensor, texts: Tensor) -> Predictions:
    """Everything that training looks at, through the stock model's own parts.

    Args:
        model: the model.
        pixels: (B, 3, S, S) float32.
        texts: (K, TEXT_WIDTH) of :func:`encode_texts`; asked of every image.
    """
    grid, _ = model.image_embedder(pixels)
    with torch.autocast("cpu", enabled=False):  # the heads are small, and bfloat16 would round cosines and cells
        grid = grid.float()
        features = grid.flatten(1, 2)
        logits, _ = model.class_predictor(features, texts.float().expand(len(pixels), -1, -1))
        objectness = model.objectness_predictor(features)
        boxes = model.box_predictor(features, grid)
    return Predictions(boxes, logits, objectness, features)


class TorchDetector:
    """Detection as OWLv2's processor does it, for one square image at a time; used to judge training.

    Every token answers with the class that it scores highest, if the score is above the threshold.
    """

    def __init__(self, model: Owlv2ForObjectDetection, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(
        self, image: NDArray[np.uint8], classes: Sequence[str], threshold: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Boxes (N, 4) xyxy pixels clipped to the image, scores (N,) best first, labels (N,) indices of classes."""
        texts = encode_texts(self.model, self.tokenizer, classes)
        out = predict(self.model, normalise(torch.from_numpy(image)[None]), texts)
        return decode(out, 0, image.shape[0], threshold)


def decode(
    out: Predictions, row: int, size: int, threshold: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Boxes, scores and labels of one image of ``out``, see :class:`TorchDetector`."""
    best, labels = out.logits[row].max(-1)
    scores = best.sigmoid()
    order = scores.argsort(descending=True)
    order = order[scores[order] > threshold]
    cx, cy, w, h = out.boxes[row][order].unbind(-1)
    boxes = (torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1) * size).clamp(0, size)
    return boxes.numpy(), scores[order].numpy(), labels[order].numpy()
