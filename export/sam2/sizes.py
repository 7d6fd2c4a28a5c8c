"""The four sizes of SAM 2: what tells them apart, and their configuration.

Sizes from upstream's ``sam2/configs/sam2.1/*.yaml``; heads, windows and global blocks cannot be read from tensor
shapes, so a checkpoint must be one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Sam2Config, Sam2VideoConfig

from pixano_edge.engine.errors import ExportError


@dataclass(frozen=True)
class Size:
    """One Hiera trunk.

    Attributes:
        name: Ending of the architecture's name, for example ``hiera-tiny``.
        width: Channels of the first stage; doubles with each stage.
        heads: Attention heads of the first stage; doubles with each stage.
        blocks: Blocks per stage.
        global_blocks: Indices of the blocks without windows.
        windows: Window side per stage.
        background: Side of the stored positional embedding.
    """

    name: str
    width: int
    heads: int
    blocks: tuple[int, int, int, int]
    global_blocks: tuple[int, int, int]
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)
    background: int = 7

    def config(self) -> Sam2Config:
        """The `Sam2Config` of this size at 1024 pixels; SAM 2 and 2.1 do not differ for images."""
        widths = [self.width * 2**i for i in range(4)]
        return Sam2Config(
            vision_config={
                "model_type": "sam2_vision_model",
                "backbone_config": {
                    "model_type": "sam2_hiera_det_model",
                    "hidden_size": self.width,
                    "embed_dim_per_stage": widths,
                    "num_attention_heads_per_stage": [self.heads * 2**i for i in range(4)],
                    "blocks_per_stage": list(self.blocks),
                    "global_attention_blocks": list(self.global_blocks),
                    "window_size_per_stage": list(self.windows),
                    "window_positional_embedding_background_size": [self.background] * 2,
                },
                "backbone_channel_list": widths[::-1],
            }
        )

    def video_config(self, generation: str) -> Sam2VideoConfig:
        """The `Sam2VideoConfig` of this size; only SAM 2.1 gives pointers a time and marks hidden objects in memory.

        Everything else is transformers' default, which is that of upstream's configurations.
        """
        newer = generation == "sam2.1"
        return Sam2VideoConfig(
            vision_config=self.config().vision_config,
            enable_temporal_pos_encoding_for_object_pointers=newer,
            enable_occlusion_spatial_embedding=newer,
        )


def image_config(config: Any) -> Sam2Config:
    """The part of a `Sam2VideoConfig` that segmenting images needs."""
    return Sam2Config(
        vision_config=config.vision_config,
        prompt_encoder_config=config.prompt_encoder_config.to_dict(),
        mask_decoder_config=config.mask_decoder_config.to_dict(),
    )


SIZES: tuple[Size, ...] = (
    Size("hiera-tiny", 96, 1, (1, 2, 7, 2), (5, 7, 9)),
    Size("hiera-small", 96, 1, (1, 2, 11, 2), (7, 10, 13)),
    Size("hiera-base-plus", 112, 2, (2, 3, 16, 3), (12, 16, 20), background=14),
    Size("hiera-large", 144, 2, (2, 6, 36, 4), (23, 33, 43), windows=(8, 4, 16, 8)),
)


def detect(shapes: Mapping[str, tuple[int, ...]]) -> Size:
    """The size whose trunk has these tensor shapes.

    Args:
        shapes: Shape per tensor name, in upstream's names.

    Raises:
        ExportError: None of the four sizes fits.
    """
    prefix = "image_encoder.trunk."
    patch = shapes.get(f"{prefix}patch_embed.proj.weight")
    position = shapes.get(f"{prefix}pos_embed")
    window = shapes.get(f"{prefix}pos_embed_window")
    blocks = {name[len(prefix) :].split(".")[1] for name in shapes if name.startswith(f"{prefix}blocks.")}
    if not patch or not position or not window or not blocks:
        raise ExportError(
            "The file does not hold the image encoder of SAM 2 (image_encoder.trunk.*).",
            "Give an original SAM 2 / 2.1 checkpoint such as sam2.1_hiera_tiny.pt.",
        )
    found = (patch[0], len(blocks), position[-1], window[-1])
    for size in SIZES:
        if found == (size.width, sum(size.blocks), size.background, size.windows[0]):
            return size
    raise ExportError(
        f"No SAM 2 size has {found[0]} channels, {found[1]} blocks and a {found[2]}x{found[2]} positional embedding.",
        f"Known sizes: {', '.join(s.name for s in SIZES)}. For a modified trunk, export a transformers folder.",
    )


def architecture_name(config: Any, generation: str) -> str:
    """For example ``sam2.1-hiera-tiny``; ``sam2-hiera-custom`` for a trunk that is none of the four sizes."""
    backbone = config.vision_config.backbone_config
    for size in SIZES:
        if (int(backbone.hidden_size), tuple(backbone.blocks_per_stage)) == (size.width, size.blocks):
            return f"{generation}-{size.name}"
    return f"{generation}-hiera-custom"
