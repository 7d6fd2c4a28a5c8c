"""The small Grounding DINO of the demo: configuration, tokenizer, start values, and how training and judging run it.

The architecture is the one of ``transformers`` with a ResNet (basic blocks) as backbone: the checkpoint is an ordinary
``grounding-dino`` folder. Convolutions know from the start that neighbouring pixels belong together, which a plain
vision transformer has to learn; names of shapes are learned several times faster (docs/demo-detector.md).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    ResNetConfig,
)

from pixano_edge.engine.contracts.grounding_dino import GroundingDinoConstants
from pixano_edge.engine.models.grounding_dino.postprocess import find, merge
from pixano_edge.engine.models.grounding_dino.text import Captioner
from pixano_edge.export.demo.words import vocabulary

IMAGE_SIZE = 256
"""Shorter side of what the model sees."""
FIRST_SIZE = 192
"""Shorter side in the first part of training: most is learned as well from fewer pixels, and sooner."""
STRIDES = (16, 32, 64)
WIDTH = 128
CHANNELS = 128
"""Of the backbone's finest map that is taken."""
QUERIES = 40
MAX_TOKENS = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIXED_TOKENS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
"""Ids that transformers' model knows by number."""
VOCABULARY = 1400


def tiny_config() -> GroundingDinoConfig:
    """About 3 million parameters: a ResNet of 18 convolutions, one encoder and two decoder layers, two of BERT."""
    kind: Any = ResNetConfig  # its annotations leave out `out_features`
    backbone = kind(
        embedding_size=32,
        hidden_sizes=[32, 64, CHANNELS, 192],
        depths=[1, 2, 4, 2],
        layer_type="basic",
        out_features=["stage3", "stage4"],
    )
    text = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=WIDTH,
        num_queries=QUERIES,
        num_feature_levels=len(STRIDES),
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_text_len=MAX_TOKENS,
        decoder_bbox_embed_share=False,
        dropout=0.0,
        fusion_droppath=0.0,
        disable_custom_kernels=True,
    )


def build_tokenizer() -> BertTokenizer:
    """BERT's WordPiece in which every known word is one token; letters, also Greek and Cyrillic, spell all others."""
    letters = [*string.ascii_lowercase, *string.digits]
    letters += [chr(code) for code in (*range(0x3B1, 0x3CA), *range(0x430, 0x450))]
    marks = [mark for mark in string.punctuation if mark not in ".?"]
    tokens = [*letters, *(f"##{letter}" for letter in letters), *marks, *vocabulary()]
    ids = dict(FIXED_TOKENS)
    free = (number for number in range(1030, VOCABULARY))
    for token in dict.fromkeys(tokens):
        ids.setdefault(token, -1)
        if ids[token] < 0:
            ids[token] = next(free)
    used = set(ids.values())
    ids |= {f"[unused{number}]": number for number in range(VOCABULARY) if number not in used}
    return BertTokenizer(vocab=ids)


def build_processor(tokenizer: BertTokenizer) -> GroundingDinoProcessor:
    """The processor whose files belong into the checkpoint's folder."""
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": IMAGE_SIZE, "longest_edge": 2 * IMAGE_SIZE})
    return GroundingDinoProcessor(images, tokenizer)


def constants() -> GroundingDinoConstants:
    """What the engine has to know of the model."""
    return GroundingDinoConstants(
        shortest_edge=IMAGE_SIZE,
        longest_edge=2 * IMAGE_SIZE,
        hidden_dim=WIDTH,
        num_queries=QUERIES,
        num_levels=len(STRIDES),
        first_stride=STRIDES[0],
        max_text_len=MAX_TOKENS,
    )


def thaw(model: GroundingDinoForObjectDetection) -> None:
    """Puts batch norms that learn in the place of the backbone's frozen ones, and lets all of it be trained.

    :func:`freeze` is the way back; both kinds keep their values under the same names.
    """
    backbone = model.model.backbone.conv_encoder.model
    for parent in list(backbone.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "GroundingDinoFrozenBatchNorm2d":
                setattr(parent, name, nn.BatchNorm2d(len(child.weight)))
    model.requires_grad_(True)


def freeze(model: GroundingDinoForObjectDetection) -> GroundingDinoForObjectDetection:
    """A stock model with the weights of a thawed one, its batch statistics as constants."""
    stock = GroundingDinoForObjectDetection(model.config)
    left = stock.load_state_dict(model.state_dict(), strict=False)
    unused = [key for key in left.unexpected_keys if not key.endswith("num_batches_tracked")]
    if left.missing_keys or unused:
        raise ValueError(f"not the same model: {left.missing_keys}, {unused}")
    return stock.eval()


@torch.no_grad()
def initialise(model: GroundingDinoForObjectDetection) -> None:
    """Start values suited to a narrow network trained from scratch, drawn from torch's global generator."""
    base = model.model
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "sampling_offsets" not in name and "attention_weights" not in name:
            gain = 0.3 if name.endswith(("out_proj", "output_proj", "fc2", "output.dense")) else 1.0
            gain = 1.0 if name.endswith("encoder_attn.output_proj") else gain  # all that queries see of the image
            module.weight.normal_(std=gain * module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Conv2d) and "backbone" in name:
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    for block in base.backbone.conv_encoder.model.encoder.modules():
        if type(block).__name__ == "ResNetBasicLayer":  # each block starts near its shortcut
            block.layer[1].normalization.weight.fill_(0.3)
    text = base.text_backbone.embeddings
    text.word_embeddings.weight.normal_(std=0.5)
    text.position_embeddings.weight.normal_(std=0.2)
    text.token_type_embeddings.weight.zero_()
    base.query_position_embeddings.weight.normal_(std=0.2)
    base.level_embed.normal_(std=0.3)
    # Scores are products of normed states with normed tokens: small, and most of them "no" at the start. The states'
    # norm changes them little: the decoder moves boxes by states before it, with a head that is trained behind it.
    common = torch.randn(WIDTH)
    common *= 2 / common.norm()
    last = base.encoder.layers[-1].text_enhancer_layer.layer_norm_after
    last.weight.fill_(0.1)
    last.bias.copy_(-common)
    for norm in (base.enc_output_norm, base.decoder.layer_norm):
        norm.bias.copy_(common)
    for layer in base.encoder.layers:
        layer.fusion_layer.vision_param.fill_(0.1)
        layer.fusion_layer.text_param.fill_(0.1)
    # Boxes start about as large as objects are: the anchors of the finest level are 0.05 wide.
    head = base.encoder_output_bbox_embed.layers[-1]
    head.weight.mul_(0.1)
    head.bias.copy_(torch.tensor([0.0, 0.0, 2.3, 2.3]))
    boxes: Any = model.bbox_embed
    for box in boxes:
        box.layers[-1].weight.mul_(0.1)
        box.layers[-1].bias.zero_()


@dataclass
class Predictions:
    """For B images, N places, Q queries, D decoder layers, T tokens; boxes are cx, cy, w, h in sides of the image.

    ``logits`` (B, N, T) and ``boxes`` (B, N, 4) of all places; ``query_logits`` (D, B, Q, T) and ``query_boxes`` (D, B,
    Q, 4), which all but the last layer read from the states before the norm, since those move the next layer's
    reference points; ``hidden`` (D, B, Q, C) the decoder's normed states; ``memory`` (B, N, C) the encoder's; ``maps``
    the backbone's feature maps (B, C, h, w).
    """

    logits: Tensor
    boxes: Tensor
    query_logits: Tensor
    query_boxes: Tensor
    hidden: Tensor
    memory: Tensor
    maps: list[Tensor]

    @property
    def grid(self) -> int:
        """Places per side of the finest level. They answer for objects; the other levels give context."""
        return self.maps[0].shape[-1]


def normalise(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 RGB to (B, 3, H, W) float32, stored channels last."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def predict(model: GroundingDinoForObjectDetection, pixels: Tensor, ids: Tensor) -> Predictions:
    """Everything that training looks at, through the stock model's own parts.

    Args:
        model: the model.
        pixels: (B, 3, S, S) float32.
        ids: (B, T) int64, padded with 0.
    """
    base = model.model
    maps: list[Tensor] = []
    states: list[Tensor] = []
    hooks = [base.backbone.conv_encoder.register_forward_hook(lambda _, __, out: maps.extend(m for m, _ in out))]
    hooks += [
        layer.register_forward_hook(lambda _, __, out: states.append(out[0])) for layer in base.decoder.layers[:-1]
    ]
    try:
        out = base(pixel_values=pixels, input_ids=ids, attention_mask=(ids != 0).long())
    finally:
        for hook in hooks:
            hook.remove()
    with torch.autocast("cpu", enabled=False):  # bfloat16 would round boxes and scores
        return _answers(model, out, states, maps, ids.shape[1])


def _answers(
    model: GroundingDinoForObjectDetection, out: Any, states: list[Tensor], maps: list[Tensor], tokens: int
) -> Predictions:
    text = out.encoder_last_hidden_state_text.float()
    hidden = out.intermediate_hidden_states.transpose(0, 1).float()
    references = torch.cat(
        [out.init_reference_points[:, None], out.intermediate_reference_points[:, :-1]], 1
    ).transpose(0, 1)
    offsets = torch.special.logit(references.float(), eps=1e-5)
    read = [*(state.float() for state in states), hidden[-1]]
    boxes = torch.stack([head(state) for head, state in zip(model.bbox_embed, read, strict=True)]).float()
    return Predictions(
        logits=out.enc_outputs_class[..., :tokens].float().clamp(min=-30.0),  # padding has minus infinity
        boxes=out.enc_outputs_coord_logits.float().sigmoid(),
        query_logits=hidden @ text.transpose(1, 2)[None],
        query_boxes=(boxes + offsets).sigmoid(),
        hidden=hidden,
        memory=out.encoder_last_hidden_state_vision,
        maps=maps,
    )


class TorchDetector:
    """Detection as the engine does it, for one square image at a time; used to judge training."""

    def __init__(self, model: GroundingDinoForObjectDetection, tokenizer: BertTokenizer) -> None:
        self.model = model.eval()
        self.captioner = Captioner(tokenizer.backend_tokenizer.to_str(), constants())

    @torch.no_grad()
    def __call__(
        self, image: NDArray[np.uint8], classes: Sequence[str], threshold: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Boxes (N, 4) xyxy pixels clipped to the image, scores (N,) best first, labels (N,) indices of classes."""
        resized = np.array(Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
        pixels = normalise(torch.from_numpy(resized)[None])
        parts = []
        for caption in self.captioner.captions(classes):
            out = predict(self.model, pixels, torch.tensor([caption.ids]))
            logits, boxes = out.query_logits[-1, 0].numpy(), out.query_boxes[-1, 0].numpy()
            parts.append(find(logits, boxes, caption.labels, caption.edges, image.shape[:2], threshold, 0.0))
        found = merge(parts)
        return found.boxes, found.scores, found.labels
