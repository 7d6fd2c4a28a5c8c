"""Loading Idefics3, SmolVLM and SmolVLM2 with tokeniser, chat template and processor, without running anybody's code.

Taken: a transformers folder or hub id, safetensors only. Every tensor of the file is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from pixano_edge.engine.bundle.manifest import Licence, Source
from pixano_edge.engine.contracts.decoder import DEFAULT_ROPE, DecoderConstants
from pixano_edge.engine.contracts.smolvlm import RESAMPLES, SmolVlmConstants
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
from pixano_edge.export.vlm.text import processor_settings, read_template, read_tokenizer, tokenizer_content

MODELS = {"idefics3": Idefics3ForConditionalGeneration, "smolvlm": SmolVLMForConditionalGeneration}
PROCESSORS = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}
# Model cards of these hub ids say Apache-2.0.
OFFICIAL_LICENCES = dict.fromkeys(
    (
        *(f"HuggingFaceTB/SmolVLM-{size}Instruct" for size in ("", "256M-", "500M-")),
        *(f"HuggingFaceTB/SmolVLM2-{size}-Instruct" for size in ("2.2B",)),
        *(f"HuggingFaceTB/SmolVLM2-{size}-Video-Instruct" for size in ("256M", "500M")),
    ),
    "Apache-2.0",
)
TEXT_MODELS = ("llama",)
MAX_LENGTH = 32768
"""Longest context; the tables of the rotary embedding are as long."""
FAKE_TOKEN, GLOBAL_TOKEN = "<fake_token_around_image>", "<global-img>"
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


@dataclass
class SmolVlmCheckpoint:
    """A loaded checkpoint.

    Attributes:
        model: `Idefics3ForConditionalGeneration` or `SmolVLMForConditionalGeneration`, float32, eval mode, on the CPU.
        images: transformers' image processor, its Pillow implementation.
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
    constants: SmolVlmConstants
    source: Source
    licence: Licence
    notes: list[str] = field(default_factory=list)


def load(source: str | Path, *, revision: str | None = None, licence: str | None = None) -> SmolVlmCheckpoint:
    """Loads a checkpoint.

    Args:
        source: Folder in transformers' format, or hub id (``HuggingFaceTB/SmolVLM-256M-Instruct``).
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
            "Give a folder in transformers' format or a hub id such as HuggingFaceTB/SmolVLM-256M-Instruct.",
        )
    else:
        folder = download(text, revision, (*HUB_FILES, "merges.txt", "*.jinja"))
        label, found = text, licences.detect(folder, text, licence, OFFICIAL_LICENCES)
    config = read_config(folder, tuple(MODELS), "export smolvlm")
    family = str(config["model_type"])
    template = read_template(folder)
    words = read_tokenizer(folder)
    settings = processor_settings(folder)
    weights = weight_files(folder)
    model = from_pretrained(MODELS[family], folder).eval().requires_grad_(False)
    check_keys(tensor_names(weights), set(model.state_dict()), tied=bool(model.config.tie_word_embeddings))
    check_finite(model)
    constants = read_constants(model, settings, words)
    content, notes = tokenizer_content(folder, words)
    with quiet():
        images = PROCESSORS[family](**image_settings(constants))
    made = Source(
        checkpoint=label,
        format="transformers",
        sha256=weights_sha256(weights),
        architecture=f"{family}-{constants.image_size}-{parameters(model)}",
    )
    notes += stored_dtype_note(config)
    return SmolVlmCheckpoint(model, images, words, content, template, constants, made, found, notes)


def check_keys(found: set[str], expected: set[str], tied: bool) -> None:
    """Raises ExportError unless the file holds every tensor of the model and no other."""
    optional = {"lm_head.weight"} if tied else set()
    missing, unknown = sorted(expected - found - optional), sorted(found - expected)
    # Older files name the text model one level higher; `from_pretrained` renames, and reports nothing missing then.
    if missing and unknown and len(missing) == len(unknown):
        return
    if missing or unknown:
        raise ExportError(
            f"The weights do not fit the model: they lack {missing[:3]} and hold {unknown[:3]} besides.",
            "Get the whole checkpoint; a modified model is not exported, since its extra parts would be lost.",
        )


def parameters(model: Any) -> str:
    """``256M`` and the like."""
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{max(1, round(count / 1e6))}M"


def eos_ids(model: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the generation settings' or the language model's."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.get_text_config().eos_token_id
    if found is None:
        raise ExportError("The checkpoint does not say which token ends an answer.", "Get generation_config.json too.")
    return tuple(int(i) for i in (found if isinstance(found, list | tuple) else [found]))


def decoder_constants(model: Any, text: Any, rope: str) -> DecoderConstants:
    """The contract's constants of a language model; raises ExportError for one that the contract does not cover."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def token(value: Any) -> int:
        return int(value) if isinstance(value, int) and 0 <= value < text.vocab_size else -1

    try:
        return DecoderConstants(
            layers=int(text.num_hidden_layers),
            heads=int(text.num_attention_heads),
            kv_heads=int(text.num_key_value_heads),
            head_dim=int(head_dim),
            hidden_size=int(text.hidden_size),
            vocab_size=int(text.vocab_size),
            max_length=min(int(text.max_position_embeddings), MAX_LENGTH),
            rope=rope,
            eos_ids=eos_ids(model),
            bos_id=token(text.bos_token_id),
            pad_id=token(text.pad_token_id),
        )
    except ContractError as error:
        raise ExportError(error.message, error.action) from error


def read_constants(model: Any, settings: dict[str, Any], words: Any) -> SmolVlmConstants:
    """The contract's constants, from the model's configuration and the processor's settings.

    Raises:
        ExportError: The architecture or the processing is outside the contract.
    """
    config, text = model.config, model.config.text_config
    if text.model_type not in TEXT_MODELS:
        raise ExportError(
            f"The language model is of type '{text.model_type}'.", f"Known here: {', '.join(TEXT_MODELS)}."
        )
    images = settings["image_processor"]
    wrong = [f"{step} is off" for step in _STEPS if images.get(step, True) is False]
    tile = square_side(config.vision_config.image_size)
    if (limit := _edge(images.get("max_image_size"), tile)) != tile:
        wrong.append(f"tiles of {limit} pixels, where the model takes {tile}")
    scale = config.scale_factor
    grid = tile // square_side(config.vision_config.patch_size)
    expected = (grid // scale) ** 2
    if (length := settings.get("image_seq_len", expected)) != expected:
        wrong.append(f"{length} image tokens per tile, where the model gives {expected} features")
    resample = images.get("resample", RESAMPLES.index("lanczos"))
    if not isinstance(resample, int) or not 0 <= resample < len(RESAMPLES):
        wrong.append(f"resize filter {resample}")
    known = words.get_vocab()
    image_token = next((name for name, index in known.items() if index == config.image_token_id), None)
    if image_token is None:
        wrong.append(f"a tokeniser without the image token {config.image_token_id}")
    if FAKE_TOKEN not in known:
        wrong.append(f"a tokeniser without {FAKE_TOKEN}")
    if wrong:
        raise ExportError(
            f"The checkpoint's processing is not the published one: {'; '.join(wrong)}.",
            "Only the published processing is exported.",
        )
    try:
        return SmolVlmConstants(
            decoder=decoder_constants(model, text, DEFAULT_ROPE),
            image_size=tile,
            patch_size=square_side(config.vision_config.patch_size),
            scale_factor=int(scale),
            image_seq_len=expected,
            longest_edge=_edge(images.get("size"), 4 * tile),
            split=bool(images.get("do_image_splitting", True)),
            resample=RESAMPLES[resample],
            rescale=float(images.get("rescale_factor", 1 / 255)),
            mean=_triple(images.get("image_mean")),
            std=_triple(images.get("image_std")),
            image_token=str(image_token),
            image_token_id=int(config.image_token_id),
            fake_token=FAKE_TOKEN,
            global_token=GLOBAL_TOKEN,
        )
    except ContractError as error:
        raise ExportError(error.message, error.action) from error


def image_settings(c: SmolVlmConstants) -> dict[str, Any]:
    """Arguments of transformers' image processor that do what the constants say."""
    return {
        "size": {"longest_edge": c.longest_edge},
        "max_image_size": {"longest_edge": c.image_size},
        "do_image_splitting": c.split,
        "resample": RESAMPLES.index(c.resample),
        "rescale_factor": c.rescale,
        "image_mean": list(c.mean),
        "image_std": list(c.std),
    }


def _edge(size: Any, default: int) -> int:
    """``{"longest_edge": N}``, or ``{"height": N, "width": N}``."""
    if size is None:
        return default
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if len(sides) != 1 or not all(isinstance(v, int) for v in sides):
        raise ExportError(f"The processor's settings have a size of {size}.", "Only the published one is exported.")
    return int(sides.pop())


def _triple(values: Any) -> tuple[float, float, float]:
    """Three numbers; SigLIP's 0.5 where the settings say nothing."""
    if values is None:
        return (0.5, 0.5, 0.5)
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ExportError(f"The processor's settings need three values, got {values}.", "Correct the file.")
    return (float(values[0]), float(values[1]), float(values[2]))
