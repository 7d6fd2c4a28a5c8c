"""Small Grounding DINO checkpoints with seeded weights that matter, and tokenisers that need no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, ResNetConfig, SwinConfig

from pixano_edge.engine.contracts import grounding_dino as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.contracts.grounding_dino import GroundingDinoConstants
from pixano_edge.engine.models.grounding_dino.detector import GroundingDinoDetector
from pixano_edge.engine.runtime import open_device, open_session


def small_config(**changes: Any) -> GroundingDinoConfig:
    """Swin with two blocks per stage, so that windows shift, and 2 + 2 layers of width 64."""
    values: dict[str, Any] = {
        "backbone_config": SwinConfig(
            embed_dim=16,
            depths=[2, 2, 2, 2],
            num_heads=[1, 2, 2, 4],
            window_size=7,
            out_features=["stage2", "stage3", "stage4"],
        ),
        "text_config": BertConfig(
            vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        ),
        "d_model": 64,
        "num_queries": 60,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "disable_custom_kernels": True,
    }
    return GroundingDinoConfig(**(values | changes))


def small_resnet_config(**changes: Any) -> GroundingDinoConfig:
    """As `small_config`, with a ResNet whose last two stages, strides 16 and 32, are taken."""
    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 2, 1, 1],
        layer_type="basic",
        out_features=["stage3", "stage4"],
    )
    return small_config(**({"backbone_config": backbone, "num_feature_levels": 3, "num_queries": 12} | changes))


def swin_tiny_config() -> GroundingDinoConfig:
    """The architecture of ``IDEA-Research/grounding-dino-tiny``."""
    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        out_features=["stage2", "stage3", "stage4"],
    )
    return GroundingDinoConfig(backbone_config=backbone, text_config=BertConfig(), disable_custom_kernels=True)


def sharpened(config: GroundingDinoConfig, seed: int = 0) -> GroundingDinoForObjectDetection:
    """A model whose random weights make every part of the input matter.

    As initialised, zeros and gains of 1e-4 hide mistakes: position tables, sampling offsets and box heads give the
    same answer whatever they read.
    """
    torch.manual_seed(seed)
    model = GroundingDinoForObjectDetection(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embeddings" not in name and "level_embed" not in name:
                fan_in = parameter[0].numel()
                nn.init.normal_(parameter, std=1.0 / fan_in**0.5)
            if "relative_position_bias_table" in name or ("embeddings" in name and parameter.ndim > 1):
                nn.init.normal_(parameter, std=1.0)
            elif name.endswith(("vision_param", "text_param")):
                nn.init.uniform_(parameter, 0.5, 1.0)
            elif parameter.ndim == 1 and name.endswith("bias") and "sampling_offsets" not in name:
                nn.init.normal_(parameter, std=0.1)
            if "sampling_offsets.weight" in name:
                parameter.mul_(1.5)
            if "bbox_embed" in name and name.endswith("layers.2.weight"):
                parameter.mul_(0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                nn.init.normal_(buffer, std=0.3)
            elif name.endswith("running_var"):
                nn.init.uniform_(buffer, 0.5, 2.0)
            elif "normalization" in name:
                nn.init.normal_(buffer, mean=float(name.endswith("weight")), std=0.2)
        # Logits of a few units: probabilities that saturate at 1 would tie.
        model.model.decoder.layer_norm.weight.mul_(0.25)
    return model


def plain(config: GroundingDinoConfig, seed: int = 0) -> GroundingDinoForObjectDetection:
    """A model as transformers starts it, with values where it has zeros.

    Of 900 sharpened queries some always tie, and each that changes ranks moves all others a little, since they look at
    each other: at real size that hides what is to be compared. Mistakes are what `sharpened` small models are for.
    """
    torch.manual_seed(seed)
    model = GroundingDinoForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        model.model.decoder.layer_norm.weight.mul_(0.1)  # logits of a few units, as in `sharpened`
    return model


WORDS = (
    "a an the red green blue cat dog remote control controller person bed lamp pillow chair table cup plate coffee "
    "spoon book picture window wall floor striped circle square triangle on of with st bernard very long name "
)


def small_vocabulary() -> dict[str, int]:
    """A WordPiece vocabulary with BERT's ids for what the model knows by number; letters cover other words."""
    fixed = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    letters = [chr(c) for c in (*range(ord("a"), ord("z") + 1), *range(0x430, 0x450))]
    digits = [str(d) for d in range(10)]
    others = [*"猫犬,-!()[]'", "ed", "ing"]
    tokens = [*letters, *digits, *(f"##{t}" for t in (*letters, *digits, "ed", "ing")), *others, *WORDS.split()]
    vocabulary = dict(fixed)
    taken = set(fixed.values())
    free = (i for i in range(1030, 2000) if i not in taken)
    for token in dict.fromkeys(tokens):
        if token not in vocabulary:
            vocabulary[token] = next(free)
    used = set(vocabulary.values())
    vocabulary |= {f"[unused{i}]": i for i in range(2000) if i not in used}
    return vocabulary


def small_processor(**size: int) -> Any:
    """The stock processor with a small vocabulary, in its PIL form; `size` holds shortest_edge and longest_edge."""
    from transformers import BertTokenizer, GroundingDinoImageProcessorPil, GroundingDinoProcessor

    tokenizer = BertTokenizer(vocab=small_vocabulary())
    images = GroundingDinoImageProcessorPil(size=size) if size else GroundingDinoImageProcessorPil()
    return GroundingDinoProcessor(images, tokenizer)


def tokenizer_json(processor: Any) -> str:
    """Content of ``tokenizer.json``."""
    text = processor.tokenizer.backend_tokenizer.to_str()
    assert isinstance(text, str)
    return text


@dataclass
class Exported:
    """A model, its stock processor, and its graphs as files."""

    model: GroundingDinoForObjectDetection
    processor: Any
    constants: GroundingDinoConstants
    files: dict[str, Path]

    @property
    def specs(self) -> dict[str, GraphSpec]:
        return contract.graphs(self.constants)

    def open(self, files: dict[str, Path] | None = None) -> GroundingDinoDetector:
        """A detector on the CPU."""
        device = open_device("cpu")
        sessions = {
            name: open_session((files or self.files)[name], spec, device, backend="onnxruntime", threads=1)
            for name, spec in self.specs.items()
        }
        return GroundingDinoDetector(
            sessions[contract.TEXT_ENCODER],
            sessions[contract.DETECTOR],
            self.constants,
            tokenizer_json(self.processor),
            bundle_hash="test",
            variant="fp32",
        )


def export_model(model: GroundingDinoForObjectDetection, folder: Path, **size: int) -> Exported:
    """Exports a model's graphs into a folder, with the processor of `small_processor`."""
    from pixano_edge.export.grounding_dino import graphs
    from pixano_edge.export.grounding_dino.constants import read_constants
    from pixano_edge.export.onnx_graph import export_graph

    processor = small_processor(**size)
    processor.save_pretrained(folder)
    constants = read_constants(model, folder)
    files = {}
    modules = graphs.modules(model)
    for name, spec in contract.graphs(constants).items():
        files[name] = folder / f"{name}.onnx"
        onnx.save(export_graph(modules[name], spec, graphs.example_inputs(name, constants)), files[name])
    return Exported(model, processor, constants, files)
