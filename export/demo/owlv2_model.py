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
# OWLv2's own mean and deviation of an image, those of CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def tiny_config(vocabulary: int, width: int = 192, layers: int = 6, heads: int = 4) -> Owlv2Config:
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


def cosine_patches(width: int, patch: int = PATCH) -> NDArray[np.float32]:
    """``width`` orthonormal filters (width, 3, patch, patch): the cosine transform of a patch, low frequencies first.

    Three filters in five (or all that there are) see the brightness, the others the difference of red and blue and that
    of green and both. A picture's content falls with frequency about as 1/f, so each filter is scaled by its frequency:
    tokens then start with values of about one size.
    """
    k, n = np.mgrid[0:patch, 0:patch]
    basis = np.cos(np.pi * k * (2 * n + 1) / (2 * patch)) * np.where(k == 0, 1 / patch, 2 / patch) ** 0.5
    order = sorted((i * i + j * j, i, j) for i in range(patch) for j in range(patch))
    axes = np.array([[1, 1, 1], [1, 0, -1], [-0.5, 1, -0.5]]) / np.array([[3], [2], [1.5]]) ** 0.5
    bright = min(patch * patch, width - 2 * (width // 5))
    counts = [bright, (width - bright + 1) // 2, (width - bright) // 2]
    filters = []
    for axis, count, gain in zip(axes, counts, (1.0, 2.0, 2.0), strict=True):
        for _, i, j in order[:count]:
            plane = np.outer(basis[i], basis[j])
            scale = gain * (1 + np.hypot(i, j)) / patch
            filters.append(scale * axis[:, None, None] * plane)
    return np.array(filters, np.float32)


def grid_code(width: int, grid: int = GRID) -> NDArray[np.float32]:
    """A code of each cell's place (grid * grid, width): sines and cosines of x and of y at rising frequencies.

    Codes of near places are alike, so attention whose queries equal its keys starts out local.
    """
    waves = np.pi * 2.0 ** np.linspace(-4.5, 0, width // 4)
    y, x = np.mgrid[0:grid, 0:grid].reshape(2, -1, 1)
    return np.concatenate([np.sin(x * waves), np.cos(x * waves), np.sin(y * waves), np.cos(y * waves)], 1).astype(
        np.float32
    )


@torch.no_grad()
def initialise(model: Owlv2ForObjectDetection) -> None:
    """Start values suited to a narrow network trained from scratch, drawn from torch's global generator."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = 0.3 if name.endswith(("out_proj", "fc2")) else 1.0
            module.weight.normal_(std=gain * module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
    for name, module in model.named_modules():
        if name.endswith("self_attn"):  # each place first looks at what is like it
            module.k_proj.weight.mul_(0.8)
            module.q_proj.weight.copy_(module.k_proj.weight)
    vision, text = model.owlv2.vision_model, model.owlv2.text_model
    width = model.layer_norm.normalized_shape[0]
    vision.embeddings.patch_embedding.weight.copy_(torch.from_numpy(cosine_patches(width)))
    vision.embeddings.class_embedding.normal_(std=0.5)
    code = torch.from_numpy(grid_code(width))
    vision.embeddings.position_embedding.weight.copy_(0.7 * torch.cat([torch.zeros(1, width), code]))
    # Every token is multiplied with the class token: with both near one, the product starts as their sum.
    vision.post_layernorm.weight.fill_(0.5)
    vision.post_layernorm.bias.fill_(1.0)
    text.embeddings.token_embedding.weight.normal_(std=0.5)
    text.embeddings.position_embedding.weight.normal_(std=0.1)
    # The start of the scores: few objects. Of the boxes: four cells wide, not one.
    head = model.class_head
    for module, bias in ((head.logit_scale, 15.0), (head.logit_shift, -0.5), (model.objectness_head.dense2, -4.0)):
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
    grid = model.image_embedder(pixels)[0]
    with torch.autocast("cpu", enabled=False):  # the heads are small, and bfloat16 would round cosines and cells
        grid = grid.float()
        features = grid.flatten(1, 2)
        logits = model.class_predictor(features, texts.float().expand(len(pixels), -1, -1))[0]
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
