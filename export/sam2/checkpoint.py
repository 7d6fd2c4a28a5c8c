"""Loading SAM 2 / SAM 2.1 weights into transformers' models without running anybody's code.

Two formats are read: a transformers folder or hub id (``model_type`` sam2 or sam2_video, safetensors only), and the
original ``.pt`` files of facebookresearch/sam2 (``torch.load(weights_only=True)``; see `original`). Every tensor of
the file is used, or belongs to the video memory that was not asked for. Where the file holds that memory, a
`Sam2VideoModel` is made beside the `Sam2Model`, on the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import Sam2Model, Sam2VideoModel

from pixano_edge.engine.bundle.manifest import Licence, Source
from pixano_edge.engine.contracts.sam2 import NUM_MASKS, Sam2Constants
from pixano_edge.engine.contracts.sam2_video import Sam2VideoConstants
from pixano_edge.engine.errors import ContractError, ExportError
from pixano_edge.export import licence as licences
from pixano_edge.export.checkpoint import (
    check_finite,
    download,
    from_pretrained,
    is_hub_id,
    read_config,
    read_json,
    square_side,
    stored_dtype_note,
    tensor_names,
    weight_files,
    weights_sha256,
)
from pixano_edge.export.sam2 import original, video_graphs
from pixano_edge.export.sam2.sizes import architecture_name

MODEL_TYPES = ("sam2", "sam2_video")

# Tensors of `Sam2VideoModel` that `Sam2Model` does not have: memory attention, memory encoder, object pointers.
VIDEO_ONLY = (
    "memory_attention.",
    "memory_encoder.",
    "memory_temporal_positional_encoding",
    "mask_downsample.",
    "object_pointer_proj.",
    "temporal_positional_encoding_projection_layer.",
    "no_memory_positional_encoding",
    "no_object_pointer",
    "occlusion_spatial_embedding_parameter",
)
# Model cards of these hub ids say Apache-2.0, as does the licence file of facebookresearch/sam2.
OFFICIAL_LICENCES = {
    f"facebook/{generation}-hiera-{size}": "Apache-2.0"
    for generation in ("sam2", "sam2.1")
    for size in ("tiny", "small", "base-plus", "large")
}


@dataclass
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: `Sam2Model`, float32, eval mode, on the CPU.
        video_model: `Sam2VideoModel` on the same tensors; None where only images are exported.
        constants: What the contract needs to know.
        video: Constants of tracking; None where only images are exported.
        source: Goes into the manifest.
        licence: Goes into the manifest.
        notes: Remarks for the user.
    """

    model: Any
    constants: Sam2Constants
    source: Source
    licence: Licence
    notes: list[str] = field(default_factory=list)
    video_model: Any | None = None
    video: Sam2VideoConstants | None = None


def load(
    source: str | Path, *, revision: str | None = None, licence: str | None = None, image_only: bool = False
) -> Checkpoint:
    """Loads a checkpoint.

    Args:
        source: Folder in transformers' format, hub id (``facebook/sam2.1-hiera-tiny``), or an original ``.pt`` file.
        revision: Branch, tag or commit of a hub id.
        licence: SPDX identifier that overrides what the checkpoint says.
        image_only: Leave the memory modules out where there are any.

    Raises:
        ExportError: Not found, another model, damaged or incomplete weights, or a file that wants to run code.
    """
    path = Path(source)
    if path.is_dir():
        return _load_folder(
            path, label=path.resolve().name, licence=licences.detect(path, given=licence), image_only=image_only
        )
    if path.is_file():
        return _load_original(path, licences.detect(given=licence), image_only)
    text = str(source)
    if path.suffix in (".pt", ".pth", ".safetensors") or not is_hub_id(text):
        raise ExportError(
            f"There is no checkpoint at '{source}'.",
            "Give a folder in transformers' format, a hub id such as facebook/sam2.1-hiera-tiny, or an original .pt.",
        )
    folder = download(text, revision)
    found = licences.detect(folder, text, licence, OFFICIAL_LICENCES)
    return _load_folder(folder, label=text, licence=found, image_only=image_only)


def _load_folder(folder: Path, label: str, licence: Licence, image_only: bool) -> Checkpoint:
    config = read_config(folder, MODEL_TYPES, "export sam2", ", or an original .pt file")
    weights = weight_files(folder)
    names = tensor_names(weights)
    model = from_pretrained(Sam2Model, folder)
    # transformers hides keys that its own ignore list covers, so the file's names are compared here.
    check_keys(names, set(model.state_dict()))
    has_memory = config["model_type"] == "sam2_video" and any(n.startswith(VIDEO_ONLY) for n in names)
    video_model = None
    if has_memory and not image_only:
        video_model = from_pretrained(Sam2VideoModel, folder)
        check_memory_keys(names, set(video_model.state_dict()))
        video_model.load_state_dict(model.state_dict(), strict=False, assign=True)  # one copy of what both have
    generation = "sam2.1" if "occlusion_spatial_embedding_parameter" in names else "sam2"
    found = _Found(model, video_model, has_memory, generation)
    return _finish(found, folder, weights, label, "transformers", licence, config, image_only)


def _load_original(path: Path, licence: Licence, image_only: bool) -> Checkpoint:
    held = original.load(path, video=not image_only)
    found = _Found(held.model, held.video_model, held.has_memory, held.generation)
    return _finish(found, None, [path], path.name, "sam2-pt", licence, {}, image_only)


@dataclass(frozen=True)
class _Found:
    """What a file held; see `Checkpoint` and `original.Original`."""

    model: Any
    video_model: Any | None
    has_memory: bool
    generation: str


def _finish(
    found: _Found,
    folder: Path | None,
    weights: list[Path],
    label: str,
    kind: Literal["transformers", "sam2-pt"],
    licence: Licence,
    config: dict[str, Any],
    image_only: bool,
) -> Checkpoint:
    model, video_model = found.model.eval().requires_grad_(False), found.video_model
    whole = model if video_model is None else video_model.eval().requires_grad_(False)
    check_finite(whole)
    source = Source(
        checkpoint=label,
        format=kind,
        sha256=weights_sha256(weights),
        architecture=architecture_name(model.config, found.generation),
    )
    notes = stored_dtype_note(config)
    if video_model is None:
        why = "its memory modules were left out" if found.has_memory else "the checkpoint has no memory modules"
        notes.append(f"This bundle segments images and does not track: {why}.")
    constants = read_constants(model.config, folder)
    video = None if video_model is None else read_video_constants(video_model, constants)
    return Checkpoint(model, constants, source, licence, notes, video_model, video)


def check_keys(found: set[str], expected: set[str]) -> None:
    """Every tensor must be used or belong to the video memory, and none may be missing.

    Raises:
        ExportError: Naming the first keys that do not fit.
    """
    missing = sorted(expected - found)
    if missing:
        raise ExportError(
            f"The checkpoint lacks {len(missing)} tensors of SAM 2, for example {missing[:3]}.",
            "Get the whole checkpoint; a partial one would leave random weights in the model.",
        )
    unknown = sorted(k for k in found - expected if not k.startswith(VIDEO_ONLY))
    if unknown:
        raise ExportError(
            f"The checkpoint holds {len(unknown)} tensors that SAM 2 does not have, for example {unknown[:3]}.",
            "This is a modified model; its extra parts would be lost, so it is not exported.",
        )


def check_memory_keys(found: set[str], expected: set[str]) -> None:
    """Every tensor of the video memory that config.json describes must be in the file, and no other.

    Raises:
        ExportError: Naming the first keys that do not fit.
    """
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise ExportError(
            f"The video memory of the checkpoint does not fit its config.json: it lacks {missing[:3]} and holds "
            f"{unknown[:3]} besides.",
            "Get the whole checkpoint, or leave the memory out with --image-only.",
        )


def read_video_constants(model: Any, constants: Sam2Constants) -> Sam2VideoConstants:
    """The contract's constants of tracking of a `Sam2VideoModel`.

    Raises:
        ExportError: The architecture is outside the contract.
    """
    config, hidden = model.config, constants.hidden_dim
    grid = constants.embed_size
    memory = int(config.memory_encoder_output_channels)
    expected = {
        "image_size": (square_side(config.image_size), constants.image_size),
        "memory_attention_hidden_size": (int(config.memory_attention_hidden_size), hidden),
        "memory_encoder_hidden_size": (int(config.memory_encoder_hidden_size), hidden),
        "memory_attention_rope_feat_sizes": (list(config.memory_attention_rope_feat_sizes), [grid, grid]),
        "mask_downsampler_total_stride": (int(config.mask_downsampler_total_stride), 16),
    }
    wrong = [f"{key} is {got}, expected {want}" for key, (got, want) in expected.items() if got != want]
    if hidden <= memory or hidden % memory:
        # A pointer enters the memory attention in pieces of a memory's width; transformers knows no other way.
        wrong.append(f"the hidden size is {hidden}, expected a multiple of {memory}, at least {2 * memory}")
    try:
        if wrong:
            raise ContractError("; ".join(wrong) + ".", "")
        return video_graphs.video_constants(model)
    except ContractError as error:
        raise ExportError(
            f"config.json describes a video memory that the contract does not cover: {error.message}",
            "Leave the memory out with --image-only.",
        ) from error


def read_constants(config: Any, folder: Path | None = None) -> Sam2Constants:
    """The contract's constants of a `Sam2Config`, with mean and deviation from the processor's file if there is one.

    Raises:
        ExportError: The architecture is outside the contract.
    """
    prompt, decoder, vision = config.prompt_encoder_config, config.mask_decoder_config, config.vision_config
    size, hidden = square_side(prompt.image_size), int(prompt.hidden_size)
    grid = size // 16
    expected = {
        "prompt_encoder patch_size": (square_side(prompt.patch_size), 16),
        "mask_decoder hidden_size": (int(decoder.hidden_size), hidden),
        "fpn_hidden_size": (int(vision.fpn_hidden_size), hidden),
        "num_feature_levels": (int(vision.num_feature_levels), 3),
        "num_multimask_outputs": (int(decoder.num_multimask_outputs), NUM_MASKS - 1),
        "backbone_feature_sizes": (
            [list(s) for s in vision.backbone_feature_sizes],
            [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
        ),
    }
    wrong = [f"{key} is {got}, expected {want}" for key, (got, want) in expected.items() if got != want]
    if wrong:
        raise ExportError(
            f"config.json describes a SAM 2 that the contract does not cover: {'; '.join(wrong)}.",
            "Only square SAM 2 / 2.1 models with stride 16 and three multimask outputs are exported.",
        )
    values: dict[str, Any] = {
        "image_size": size,
        "hidden_dim": hidden,
        "dynamic_multimask_via_stability": bool(decoder.dynamic_multimask_via_stability),
        "stability_delta": float(decoder.dynamic_multimask_stability_delta),
        "stability_threshold": float(decoder.dynamic_multimask_stability_thresh),
    }
    values.update(_processor_values(folder) if folder else {})
    try:
        return Sam2Constants(**values)
    except ContractError as error:
        raise ExportError(error.message, error.action) from error


def _processor_values(folder: Path) -> dict[str, Any]:
    """Mean and deviation from ``preprocessor_config.json`` or the nested part of ``processor_config.json``."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        settings = read_json(folder / name)
        settings = settings.get("image_processor") or settings
        if settings.get("do_normalize", True) is False or settings.get("do_rescale", True) is False:
            raise ExportError(f"{name} turns normalisation off.", "Only the usual SAM 2 preprocessing is exported.")
        found = {}
        for key, target in (("image_mean", "mean"), ("image_std", "std")):
            if key in settings:
                values = tuple(float(v) for v in settings[key])
                if len(values) != 3:
                    raise ExportError(f"{name}: {key} needs three values, got {settings[key]}.", "Correct the file.")
                found[target] = values
        return found
    return {}
