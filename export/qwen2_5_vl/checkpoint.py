"""Loading Qwen2.5-VL with tokeniser, chat template and processor settings, without running anybody's code.

Taken: a transformers folder or hub id, safetensors only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from pixano_edge.engine.bundle.manifest import Licence, Source
from pixano_edge.engine.contracts import qwen2_5_vl as contract
from pixano_edge.engine.contracts.decoder import MROPE
from pixano_edge.engine.contracts.qwen2_5_vl import QwenVlConstants
from pixano_edge.engine.contracts.smolvlm import RESAMPLES
from pixano_edge.engine.errors import ContractError, ExportError
from pixano_edge.export import licence as licences
from pixano_edge.export.checkpoint import (
    HUB_FILES,
    check_finite,
    download,
    from_pretrained,
    is_hub_id,
    quiet,
    read_config,
    square_side,
    stored_dtype_note,
    tensor_names,
    weight_files,
    weights_sha256,
)
from pixano_edge.export.smolvlm.checkpoint import check_keys, decoder_constants, parameters
from pixano_edge.export.vlm.text import processor_settings, read_template, read_tokenizer, tokenizer_content

MODEL_TYPE = "qwen2_5_vl"
# The 3B model has a research licence of its own, which the card names; that of the 7B model says Apache-2.0.
OFFICIAL_LICENCES = {"Qwen/Qwen2.5-VL-7B-Instruct": "Apache-2.0"}
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class QwenVlCheckpoint:
    """A loaded checkpoint.

    Attributes:
        model: `Qwen2_5_VLForConditionalGeneration`, float32, eval mode, on the CPU.
        images: transformers' image processor, its Pillow implementation, with the constants' settings.
        text: transformers' tokeniser.
        tokenizer: Content of ``tokenizer.json``, for the engine.
        template: The chat template.
        constants: What the contract needs to know.
        source: Goes into the manifest.
        licence: Goes into the manifest.
        notes: Remarks for the user.
    """

    model: Any
    images: Any
    text: Any
    tokenizer: bytes
    template: str
    constants: QwenVlConstants
    source: Source
    licence: Licence
    notes: list[str] = field(default_factory=list)


def load(source: str | Path, *, revision: str | None = None, licence: str | None = None) -> QwenVlCheckpoint:
    """Loads a checkpoint.

    Args:
        source: Folder in transformers' format, or hub id (``Qwen/Qwen2.5-VL-3B-Instruct``).
        revision: Branch, tag or commit of a hub id.
        licence: SPDX identifier that overrides what the checkpoint says.

    Raises:
        ExportError: Not found, another model, damaged or incomplete weights, or a file that wants to run code.
    """
    path, text = Path(source), str(source)
    if path.is_dir():
        folder, label, found = path, path.resolve().name, licences.detect(path, given=licence)
    elif path.suffix == ".safetensors" or not is_hub_id(text):
        raise ExportError(
            f"There is no checkpoint at '{source}'.",
            "Give a folder in transformers' format or a hub id such as Qwen/Qwen2.5-VL-3B-Instruct.",
        )
    else:
        folder = download(text, revision, (*HUB_FILES, "merges.txt", "*.jinja"))
        label, found = text, licences.detect(folder, text, licence, OFFICIAL_LICENCES)
    config = read_config(folder, (MODEL_TYPE,), "export qwen2.5-vl")
    template = read_template(folder)
    words = read_tokenizer(folder)
    settings = processor_settings(folder)["image_processor"]
    weights = weight_files(folder)
    model = from_pretrained(Qwen2_5_VLForConditionalGeneration, folder).eval().requires_grad_(False)
    check_keys(tensor_names(weights), set(model.state_dict()), tied=bool(model.config.tie_word_embeddings))
    check_finite(model)
    constants, notes = read_constants(model, settings, words)
    content, more = tokenizer_content(folder, words)
    with quiet():
        images = Qwen2VLImageProcessorPil(**image_settings(constants))
    made = Source(
        checkpoint=label,
        format="transformers",
        sha256=weights_sha256(weights),
        architecture=f"{MODEL_TYPE}-{parameters(model)}",
    )
    notes += [*more, *stored_dtype_note(config)]
    return QwenVlCheckpoint(model, images, words, content, template, constants, made, found, notes)


def read_constants(model: Any, images: dict[str, Any], words: Any) -> tuple[QwenVlConstants, list[str]]:
    """The contract's constants, from the model's configuration and the processor's settings, and remarks.

    Raises:
        ExportError: The architecture or the processing is outside the contract.
    """
    config, vision = model.config, model.config.vision_config
    patch, merge = square_side(vision.patch_size), int(vision.spatial_merge_size)
    wrong = [f"{step} is off" for step in _STEPS if images.get(step, True) is False]
    expected = {"patch_size": patch, "merge_size": merge, "temporal_patch_size": int(vision.temporal_patch_size)}
    wrong += [
        f"{key} {images[key]}, where the model has {want}"
        for key, want in expected.items()
        if images.get(key, want) != want
    ]
    if vision.window_size % (patch * merge):
        wrong.append(f"windows of {vision.window_size} pixels, which are no whole units")
    if vision.hidden_act != "silu" or vision.in_channels != 3:
        wrong.append("another vision encoder")
    resample = images.get("resample", RESAMPLES.index("bicubic"))
    if not isinstance(resample, int) or not 0 <= resample < len(RESAMPLES):
        wrong.append(f"resize filter {resample}")
    token = next((name for name, index in words.get_vocab().items() if index == config.image_token_id), None)
    if token is None:
        wrong.append(f"a tokeniser without the image token {config.image_token_id}")
    sections = mrope_section(config.text_config)
    if len(sections) != 3:
        wrong.append(f"mrope_section {list(sections)}")
    if wrong:
        raise ExportError(
            f"The checkpoint is not the published architecture or processing: {'; '.join(wrong)}.",
            "Only these are exported.",
        )
    size = images.get("size")
    size = size if isinstance(size, dict) else {}
    least = images.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    most = images.get("max_pixels") or size.get("longest_edge") or contract.MAX_PIXELS
    notes = []
    if most > contract.MAX_PIXELS:
        notes.append(
            f"Images have at most {contract.MAX_PIXELS} pixels after resizing; the checkpoint's settings allow {most}, "
            "where the vision encoder compares tens of thousands of patches with each other."
        )
    try:
        constants = QwenVlConstants(
            decoder=decoder_constants(model, config.text_config, MROPE),
            patch_size=patch,
            temporal_patch_size=int(vision.temporal_patch_size),
            merge_size=merge,
            window_units=int(vision.window_size) // (patch * merge),
            min_pixels=int(least),
            max_pixels=min(int(most), contract.MAX_PIXELS),
            resample=RESAMPLES[resample],
            rescale=float(images.get("rescale_factor", 1 / 255)),
            mean=_triple(images.get("image_mean"), _MEAN),
            std=_triple(images.get("image_std"), _STD),
            image_token=str(token),
            image_token_id=int(config.image_token_id),
        )
    except ContractError as error:
        raise ExportError(error.message, error.action) from error
    return constants, notes


def mrope_section(text: Any) -> tuple[int, ...]:
    """Channels of half a head for temporal, height and width positions."""
    return tuple(int(v) for v in (text.rope_parameters or {}).get("mrope_section", ()))


def image_settings(c: QwenVlConstants) -> dict[str, Any]:
    """Arguments of transformers' image processor that do what the constants say."""
    return {
        "size": {"shortest_edge": c.min_pixels, "longest_edge": c.max_pixels},
        "patch_size": c.patch_size,
        "temporal_patch_size": c.temporal_patch_size,
        "merge_size": c.merge_size,
        "resample": RESAMPLES.index(c.resample),
        "rescale_factor": c.rescale,
        "image_mean": list(c.mean),
        "image_std": list(c.std),
    }


def _triple(values: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    if values is None:
        return default
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ExportError(f"The processor's settings need three values, got {values}.", "Correct the file.")
    return (float(values[0]), float(values[1]), float(values[2]))
