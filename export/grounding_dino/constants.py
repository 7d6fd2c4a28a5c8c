"""What the contract needs to know of a Grounding DINO checkpoint, and the refusal of what it does not cover."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pixano_edge.engine.contracts.grounding_dino import TOKENIZER, GroundingDinoConstants
from pixano_edge.engine.errors import ContractError, ExportError

MAX_LEVELS = 5
"""Proposals of a sixth level would be larger than the picture and never be inside it."""
_BILINEAR = 2
_FIRST_STAGE = 4
"""Pixels per side of a place of the first stage, in Swin and in ResNet."""
_SIZES: dict[tuple[int, tuple[int, ...]], str] = {(96, (2, 2, 6, 2)): "tiny", (128, (2, 2, 18, 2)): "base"}


def architecture_name(config: Any) -> str:
    """``grounding-dino-tiny`` or ``-base`` for the published ones, else the backbone's shape."""
    backbone = config.backbone_config
    depths = tuple(int(d) for d in backbone.depths)
    if backbone.model_type == "resnet":
        widths = (int(w) for w in backbone.hidden_sizes)
        return f"grounding-dino-resnet-{'-'.join(map(str, widths))}-{'-'.join(map(str, depths))}"
    key = (int(backbone.embed_dim), depths)
    size = _SIZES.get(key) or f"swin-{key[0]}-{'-'.join(map(str, key[1]))}"
    return f"grounding-dino-{size}"


def read_constants(model: Any, folder: Path) -> GroundingDinoConstants:
    """The contract's constants of a loaded `GroundingDinoForObjectDetection`.

    Args:
        model: The model.
        folder: Its checkpoint, with ``preprocessor_config.json`` or ``processor_config.json``; without either the
            values of the original processor are taken.

    Raises:
        ExportError: The architecture or the pre-processing is outside the contract.
    """
    config = model.config
    require_supported(config)
    start, end, dot, question = (int(i) for i in model.model.special_tokens)
    values: dict[str, Any] = {
        "hidden_dim": int(config.d_model),
        "num_queries": int(config.num_queries),
        "num_levels": int(config.num_feature_levels),
        "first_stride": _first_stride(config.backbone_config),
        "max_text_len": int(config.max_text_len),
        "start_token": start,
        "end_token": end,
        "dot_token": dot,
        "question_token": question,
        **_processor_values(folder),
    }
    try:
        return GroundingDinoConstants(**values)
    except ContractError as error:
        raise ExportError(error.message, error.action) from error


def require_supported(config: Any) -> None:
    """Raises ExportError, with every reason, for an architecture that the graphs do not implement."""
    backbone, text = config.backbone_config, config.text_config
    expected = {
        "text model_type": (text.model_type, "bert"),
        "two_stage": (bool(config.two_stage), True),
        "embedding_init_target": (bool(config.embedding_init_target), True),
        "position_embedding_type": (config.position_embedding_type, "sine"),
        "query_dim": (int(config.query_dim), 4),
    }
    wrong = [f"{key} is {got!r}, expected {want!r}" for key, (got, want) in expected.items() if got != want]
    check = {"swin": _swin_problems, "resnet": _resnet_problems}.get(backbone.model_type)
    if check is None:
        wrong.append(f"backbone model_type is {backbone.model_type!r}, expected 'swin' or 'resnet'")
    if check is not None and not wrong:
        wrong += check(backbone)
        stages = len(backbone.out_features)
        if not max(2, stages) <= int(config.num_feature_levels) <= MAX_LEVELS:
            wrong.append(f"num_feature_levels is {config.num_feature_levels}, expected {stages} to {MAX_LEVELS}")
        if int(config.max_text_len) > int(text.max_position_embeddings):
            wrong.append(
                f"max_text_len {config.max_text_len} exceeds the text encoder's {text.max_position_embeddings}"
            )
    if wrong:
        raise ExportError(
            f"config.json describes a Grounding DINO that is not covered: {'; '.join(wrong)}.",
            "Checkpoints like IDEA-Research/grounding-dino-tiny and -base are exported, also with a ResNet backbone.",
        )


def _swin_problems(backbone: Any) -> list[str]:
    wrong = []
    if getattr(backbone, "use_absolute_embeddings", False):
        wrong.append("the backbone has absolute position embeddings")
    if int(backbone.patch_size) != _FIRST_STAGE:
        wrong.append(f"the backbone has patches of {backbone.patch_size} pixels, expected {_FIRST_STAGE}")
    stages = list(backbone.out_features)
    if stages != ["stage2", "stage3", "stage4"]:
        wrong.append(f"feature maps come from {stages}, expected stage2 to stage4")
    return wrong


def _resnet_problems(backbone: Any) -> list[str]:
    wrong = []
    if backbone.downsample_in_first_stage:
        wrong.append("the backbone's first stage halves the map")
    stages = [f"stage{number + 1}" for number in range(len(backbone.depths))]
    taken = list(backbone.out_features)
    if taken != stages[-len(taken) :] or len(taken) == len(stages):
        wrong.append(f"feature maps come from {taken}, expected the last of {stages}, from the second on")
    return wrong


def _first_stride(backbone: Any) -> int:
    """Pixels per side of a place of the finest map: the first stage has four, each further one twice as many."""
    return int(_FIRST_STAGE * 2 ** (int(backbone.out_features[0].removeprefix("stage")) - 1))


def tokenizer_text(folder: Path) -> str:
    """Content of the checkpoint's ``tokenizer.json``, made from ``vocab.txt`` where it has only that.

    Raises:
        ExportError: Neither is there, or they cannot be read.
    """
    path = folder / TOKENIZER
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if not (folder / "vocab.txt").is_file():
        raise ExportError(
            f"'{folder}' has no {TOKENIZER} and no vocab.txt.",
            "Save the processor into the folder as well: processor.save_pretrained(folder).",
        )
    from transformers import AutoTokenizer

    try:
        return str(AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer.to_str())
    except Exception as error:  # whatever transformers raises for a damaged vocabulary
        raise ExportError(
            f"The vocabulary in '{folder}' cannot be read: {str(error).splitlines()[0]}", "Get the checkpoint again."
        ) from error


def _processor_values(folder: Path) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            break
    else:
        return {}
    try:
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        settings = settings.get("image_processor") or settings
        off = [key for key in ("do_resize", "do_rescale", "do_normalize") if settings.get(key, True) is False]
        usual = settings.get("resample", _BILINEAR) == _BILINEAR
        usual = usual and abs(float(settings.get("rescale_factor", 1 / 255)) * 255 - 1) < 1e-6
        found: dict[str, Any] = {}
        for key, target in (("image_mean", "mean"), ("image_std", "std")):
            if key in settings:
                first, second, third = (float(v) for v in settings[key])
                found[target] = (first, second, third)
        size = settings.get("size", {})
        for key in ("shortest_edge", "longest_edge"):
            if size and size.get(key) is None:
                off.append(f"size without {key}")
            elif size:
                found[key] = int(size[key])
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ExportError(f"{name} cannot be read: {error}", "Get the checkpoint again.") from error
    if off or not usual:
        raise ExportError(
            f"{name} asks for another pre-processing than Grounding DINO's: {', '.join(off) or 'another filter'}.",
            "Only bilinear resizing by shortest and longest edge, rescaling and normalisation is exported.",
        )
    return found
