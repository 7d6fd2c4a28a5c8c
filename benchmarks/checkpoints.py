"""Real-size SAM 2.1 checkpoints with seeded random weights, for measuring speed where the real ones are not at hand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixano_edge.engine.errors import EdgeError

SIZES = ("tiny", "small", "base-plus", "large")
VIDEO_SIZES = ("demo", *SIZES)
"""``demo`` has the shape of the bundled demo model, at its 256 pixels."""


def cache_root() -> Path:
    """Folder for generated checkpoints and bundles: ``$PIXANO_EDGE_HOME/bench`` or ``~/.cache/pixano-edge/bench``."""
    home = os.environ.get("PIXANO_EDGE_HOME")
    return Path(home) / "bench" if home else Path.home() / ".cache" / "pixano-edge" / "bench"


def random_model(size: str, image_size: int, seed: int) -> Any:
    """A transformers ``Sam2Model`` of an official size in eval mode; equal arguments give equal weights.

    The start values of transformers give nearly constant masks. Here matrices are drawn with a gain on
    1 / sqrt(fan in), so that masks have borders and an error in the features can be seen in them.
    """
    from transformers import Sam2Model
    from transformers.utils import logging

    from pixano_edge.export.sam2.sizes import SIZES as EXPORT_SIZES

    config: Any = next(s for s in EXPORT_SIZES if s.name == f"hiera-{size}").config()
    grid = image_size // 16
    config.image_size = image_size
    config.prompt_encoder_config.image_size = image_size
    config.vision_config.backbone_feature_sizes = [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]
    config.vision_config.backbone_config.image_size = [image_size, image_size]
    model = _seeded(lambda: Sam2Model(config), seed)
    logging.disable_progress_bar()
    _draw(model, seed)
    return model


def random_video_model(size: str, image_size: int, seed: int) -> Any:
    """A transformers ``Sam2VideoModel`` of an official SAM 2.1 size, or of the demo's, as `random_model`.

    Objects are never judged absent. The memory modules get smaller weights: a loop through sharp ones is chaotic, so
    that rounding errors would grow from frame to frame.
    """
    import torch
    from transformers import Sam2VideoModel
    from transformers.utils import logging

    from pixano_edge.export.demo.sam2_model import tiny_config
    from pixano_edge.export.sam2.sizes import SIZES as EXPORT_SIZES

    grid = image_size // 16
    if size == "demo":
        config: Any = tiny_config(size=image_size)
    else:
        config = next(s for s in EXPORT_SIZES if s.name == f"hiera-{size}").video_config("sam2.1")
        config.image_size = image_size
        config.prompt_encoder_config.image_size = image_size
        config.memory_attention_rope_feat_sizes = [grid, grid]
        config.vision_config.backbone_feature_sizes = [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]
        config.vision_config.backbone_config.image_size = [image_size, image_size]
    model = _seeded(lambda: Sam2VideoModel(config), seed)
    logging.disable_progress_bar()
    _draw(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("memory_attention", "memory_encoder")) and parameter.ndim > 1:
                parameter.mul_(0.5)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(10.0)
    return model


def _seeded(make: Callable[[], Any], seed: int) -> Any:
    """A model in eval mode whose start values come from a seed; torch's generator is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def _draw(model: Any, seed: int) -> None:
    """Draws a model's weights as `random_model` says."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                weight = module.weight
                fan_in = weight.shape[0] if isinstance(module, nn.ConvTranspose2d) else weight[0].numel()
                gain = 0.5 if name.startswith("vision_encoder") else 1.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * gain * fan_in**-0.5)
        position = model.shared_image_embedding.positional_embedding
        position.copy_(torch.randn(position.shape, generator=generator))
        # One random Fourier matrix serves the image grid and the prompts, as in SAM 2.
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(position)


def random_checkpoint(size: str, image_size: int = 1024, seed: int = 0, *, video: bool = False) -> Path:
    """Folder of such a checkpoint in transformers' format, made once and kept in the cache.

    Args:
        size: One of `SIZES`, with `video` of `VIDEO_SIZES`.
        image_size: Side of the model input.
        seed: Of the weights.
        video: With the memory modules.

    Raises:
        EdgeError: Unknown size, or an image size that is not a multiple of 32.
    """
    known = VIDEO_SIZES if video else SIZES
    if size not in known or image_size < 64 or image_size % 32:
        raise EdgeError(
            f"There is no random SAM 2.1 '{size}' at {image_size} pixels.",
            f"Sizes: {', '.join(known)}; the image size is a multiple of 32 from 64 on.",
        )
    kind = "video-" if video else ""
    folder = cache_root() / f"sam2.1-hiera-{size}-{image_size}-{kind}random{seed}"
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        make = random_video_model if video else random_model
        make(size, image_size, seed).save_pretrained(partial)
        note = "---\nlicense: apache-2.0\n---\nSeeded random weights made by pixano-edge bench; they know nothing.\n"
        (partial / "README.md").write_text(note, encoding="utf-8")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(folder)
    return folder


def exported_bundle(checkpoint: Path, export: Callable[[Path, Path], Path] | None = None) -> Path:
    """Bundle of a checkpoint folder in the cache, exported once (fp32 only: the comparison is on equal weights).

    The cache key holds path, sizes and times of the checkpoint's files, so a changed checkpoint is exported again.

    Args:
        checkpoint: Folder in transformers' format.
        export: Makes the bundle of a folder at a destination; None for SAM 2.

    Raises:
        EdgeError: No such folder, or the export failed.
    """
    checkpoint = checkpoint.expanduser().resolve()
    if not checkpoint.is_dir():
        raise EdgeError(f"There is no checkpoint folder '{checkpoint}'.", "Give a folder in transformers' format.")
    files = [(f.name, s.st_size, s.st_mtime_ns) for f in sorted(checkpoint.iterdir()) if (s := f.stat())]
    key = hashlib.sha256(repr((str(checkpoint), files)).encode()).hexdigest()[:12]
    destination = cache_root() / f"{checkpoint.name}-{key}.bundle"
    if (destination / "manifest.json").is_file():
        return destination
    return (export or _export_sam2)(checkpoint, destination)


def _export_sam2(checkpoint: Path, destination: Path) -> Path:
    from pixano_edge.export.sam2 import export_sam2

    return export_sam2(checkpoint, destination, variants=("fp32",))
