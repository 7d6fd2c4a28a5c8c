"""Loading OWLv2 and OWL-ViT weights into transformers' models, with their tokeniser, without running anybody's code.

Taken: a transformers folder or hub id, safetensors only. Every tensor of the file is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    CLIPTokenizer,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
)

from pixano_edge.engine.bundle.manifest import Licence, Source
from pixano_edge.engine.contracts.owlv2 import OWLV2, OWLVIT, OwlConstants
from pixano_edge.engine.errors import ContractError, EdgeError, ExportError
from pixano_edge.engine.models.owlv2.text import Tokenizer
from pixano_edge.export import licence as licences
from pixano_edge.export.checkpoint import (
    HUB_FILES,
    check_finite,
    download,
    first_line,
    from_pretrained,
    is_hub_id,
    quiet,
    read_config,
    read_json,
    square_side,
    stored_dtype_note,
    tensor_names,
    weight_files,
    weights_sha256,
)

MODELS = {OWLV2: Owlv2ForObjectDetection, OWLVIT: OwlViTForObjectDetection}
PROCESSORS = {OWLV2: Owlv2ImageProcessorPil, OWLVIT: OwlViTImageProcessorPil}
# Model cards of these hub ids say Apache-2.0, as does the licence file of google-research/scenic.
OFFICIAL_LICENCES = dict.fromkeys(
    (
        *(f"google/owlvit-{size}" for size in ("base-patch32", "base-patch16", "large-patch14")),
        *(f"google/owlv2-{size}{kind}" for size in ("base-patch16", "large-patch14")
          for kind in ("", "-ensemble", "-finetuned")),
    ),
    "Apache-2.0",
)  # fmt: skip
# Of positions that are counted, not learnt; older files hold them.
_COUNTED = (".position_ids", "box_bias")
# What the published processors do; OWL-ViT's does not know the first.
_STEPS = ("do_pad", "do_resize", "do_rescale", "do_normalize")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass
class OwlCheckpoint:
    """A loaded checkpoint.

    Attributes:
        model: `Owlv2ForObjectDetection` or `OwlViTForObjectDetection`, float32, eval mode, on the CPU.
        text: transformers' `CLIPTokenizer`.
        images: transformers' `Owlv2ImageProcessorPil` or `OwlViTImageProcessorPil`.
        tokenizer: Content of ``tokenizer.json``, for the engine.
        constants: What the contract needs to know.
        source: Goes into the manifest.
        licence: Goes into the manifest.
        notes: Remarks for the user.
    """

    model: Any
    text: Any
    images: Any
    tokenizer: bytes
    constants: OwlConstants
    source: Source
    licence: Licence
    notes: list[str] = field(default_factory=list)


def load(source: str | Path, family: str, *, revision: str | None = None, licence: str | None = None) -> OwlCheckpoint:
    """Loads a checkpoint.

    Args:
        source: Folder in transformers' format, or hub id (``google/owlv2-base-patch16-ensemble``).
        family: ``owlv2`` or ``owlvit``.
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
            "Give a folder in transformers' format or a hub id such as google/owlv2-base-patch16-ensemble.",
        )
    else:
        folder = download(text, revision, (*HUB_FILES, "merges.txt"))
        label, found = text, licences.detect(folder, text, licence, OFFICIAL_LICENCES)
    config = read_config(folder, (family,), f"export {family}")
    weights = weight_files(folder)
    model = from_pretrained(MODELS[family], folder).eval().requires_grad_(False)
    _check_keys(tensor_names(weights), set(model.state_dict()), family)
    check_finite(model)
    text = read_tokenizer(folder)
    constants = read_constants(model.config, family, folder, text)
    made = Source(
        checkpoint=label, format="transformers", sha256=weights_sha256(weights), architecture=_architecture(constants)
    )
    tokenizer = text.backend_tokenizer.to_str().encode()
    images = _image_processor(family, folder, constants)
    loaded = OwlCheckpoint(model, text, images, tokenizer, constants, made, found, stored_dtype_note(config))
    try:
        Tokenizer(tokenizer, constants)
    except EdgeError as error:
        raise ExportError(error.message, "Only CLIP's tokeniser is exported.") from error
    return loaded


def read_tokenizer(folder: Path) -> Any:
    """The `CLIPTokenizer` of a folder; raises ExportError where there is none, or it is damaged."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ExportError(
            f"'{folder}' has no tokeniser.", f"Get {' or '.join(_TOKENIZER_FILES)} (with merges.txt) of the checkpoint."
        )
    try:
        with quiet():
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExportError(f"The tokeniser in '{folder}' is damaged: {first_line(error)}", "Get it again.") from error


def _image_processor(family: str, folder: Path, constants: OwlConstants) -> Any:
    """transformers' own, from the checkpoint where it says anything."""
    kind = PROCESSORS[family]
    if any((folder / name).is_file() for name in _PROCESSOR_FILES):
        with quiet():
            return kind.from_pretrained(folder, local_files_only=True)
    return kind(size={"height": constants.image_size, "width": constants.image_size})


def read_constants(config: Any, family: str, folder: Path, text: Any) -> OwlConstants:
    """The contract's constants of a configuration, with what the processor's file says of the images.

    Args:
        config: Of the model.
        family: ``owlv2`` or ``owlvit``.
        folder: Of the checkpoint.
        text: Of `read_tokenizer`.

    Raises:
        ExportError: The architecture is outside the contract.
    """
    vision, words = config.vision_config, config.text_config
    largest, end, pad = max(text.get_vocab().values()), text.eos_token_id, text.pad_token_id
    size = square_side(vision.image_size)
    expected = {
        "projection_dim": (int(config.projection_dim), int(words.hidden_size)),
        # transformers pools a text at its largest id.
        "the tokeniser's end token": (end, largest),
        "the text's vocab_size": (int(words.vocab_size), largest + 1),
    }
    wrong = [f"{key} is {got}, expected {want}" for key, (got, want) in expected.items() if got != want]
    if pad is None:
        wrong.append("the tokeniser has no padding")
    images = _processor_values(folder, size)
    if wrong:
        raise ExportError(
            f"The checkpoint is no {family} that the contract covers: {'; '.join(wrong)}.",
            "Only models of the published architecture with CLIP's tokeniser are exported.",
        )
    try:
        return OwlConstants(
            family=family,
            image_size=size,
            patch_size=square_side(vision.patch_size),
            embed_dim=int(words.hidden_size),
            max_tokens=int(words.max_position_embeddings),
            pad_token=int(pad),
            end_token=int(end),
            **images,
        )
    except ContractError as error:
        raise ExportError(error.message, error.action) from error


def _processor_values(folder: Path, size: int) -> dict[str, Any]:
    """Mean and deviation from the processor's file; refuses one that prepares images otherwise than the engine."""
    for name in _PROCESSOR_FILES:
        if not (folder / name).is_file():
            continue
        settings = read_json(folder / name)
        settings = settings.get("image_processor") or settings
        wrong = [
            key for key in ("do_pad", "do_resize", "do_rescale", "do_normalize") if settings.get(key, True) is False
        ]
        wrong += ["do_center_crop"] if settings.get("do_center_crop") else []
        given = settings.get("size", size)
        sides = {int(v) for v in given.values()} if isinstance(given, dict) else {int(v) for v in _as_list(given)}
        if sides != {size}:
            wrong.append(f"size {given}, where the model takes {size}")
        if wrong:
            raise ExportError(
                f"{name} asks for another preparation of images: {', '.join(wrong)}.",
                "Only the published preprocessing is exported.",
            )
        found = {}
        for key, target in (("image_mean", "mean"), ("image_std", "std")):
            if key in settings:
                values = tuple(float(v) for v in settings[key])
                if len(values) != 3:
                    raise ExportError(f"{name}: {key} needs three values, got {settings[key]}.", "Correct the file.")
                found[target] = values
        return found
    return {}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _check_keys(found: set[str], expected: set[str], family: str) -> None:
    found = {name for name in found if not name.endswith(_COUNTED)}
    expected = {name for name in expected if not name.endswith(_COUNTED)}
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise ExportError(
            f"The weights do not fit {family}: they lack {missing[:3]} and hold {unknown[:3]} besides.",
            "Get the whole checkpoint; a modified model is not exported, since its extra parts would be lost.",
        )


def _architecture(c: OwlConstants) -> str:
    """Family and patches; the sizes have names in the hub ids, which the manifest holds too."""
    return f"{c.family}-patch{c.patch_size}-{c.image_size}"
