"""Loading Grounding DINO weights into transformers' model, with its processor, without running anybody's code.

Taken: a transformers folder or hub id, safetensors only. Every tensor of the file is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    BertTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
)

from pixano_edge.engine.bundle.manifest import Licence, Source
from pixano_edge.engine.contracts import grounding_dino as contract
from pixano_edge.engine.contracts.grounding_dino import GroundingDinoConstants
from pixano_edge.engine.errors import EdgeError, ExportError
from pixano_edge.engine.models.grounding_dino.text import Captioner
from pixano_edge.export import licence as licences
from pixano_edge.export.checkpoint import (
    HUB_FILES,
    check_finite,
    download,
    first_line,
    is_hub_id,
    quiet,
    read_config,
    stored_dtype_note,
    weight_files,
    weights_sha256,
)
from pixano_edge.export.grounding_dino.constants import architecture_name, read_constants, tokenizer_text

# Model cards of these hub ids say Apache-2.0, as does the licence file of IDEA-Research/GroundingDINO.
OFFICIAL_LICENCES = dict.fromkeys(
    ("IDEA-Research/grounding-dino-tiny", "IDEA-Research/grounding-dino-base"), "Apache-2.0"
)


@dataclass
class GroundingDinoCheckpoint:
    """A loaded checkpoint.

    Attributes:
        model: `GroundingDinoForObjectDetection`, float32, eval mode, on the CPU.
        processor: Its processor in the PIL form, with the engine's sizes, mean and deviation.
        tokenizer: Content of ``tokenizer.json``.
        constants: What the contract needs to know.
        source: Goes into the manifest.
        licence: Goes into the manifest.
        notes: Remarks for the user.
    """

    model: Any
    processor: Any
    tokenizer: bytes
    constants: GroundingDinoConstants
    source: Source
    licence: Licence
    notes: list[str] = field(default_factory=list)


def load(source: str | Path, *, revision: str | None = None, licence: str | None = None) -> GroundingDinoCheckpoint:
    """Loads a checkpoint.

    Args:
        source: Folder in transformers' format, or hub id (``IDEA-Research/grounding-dino-tiny``).
        revision: Branch, tag or commit of a hub id.
        licence: SPDX identifier that overrides what the checkpoint says.

    Raises:
        ExportError: Not found, another model, damaged or incomplete weights, or a file that wants to run code.
    """
    path, text = Path(source), str(source)
    if path.is_dir():
        folder, label, found = path, path.resolve().name, licences.detect(path, given=licence)
    elif path.suffix in (".pth", ".pt", ".safetensors") or not is_hub_id(text):
        raise ExportError(
            f"There is no checkpoint at '{source}'.",
            "Give a folder in transformers' format or a hub id such as IDEA-Research/grounding-dino-tiny.",
        )
    else:
        folder = download(text, revision, (*HUB_FILES, "vocab.txt"))
        label, found = text, licences.detect(folder, text, licence, OFFICIAL_LICENCES)
    config = read_config(folder, (contract.FAMILY,), f"export {contract.FAMILY}")
    weights = weight_files(folder)
    model = _load_model(folder).eval().requires_grad_(False)
    check_finite(model)
    constants = read_constants(model, folder)
    tokenizer = tokenizer_text(folder)
    try:
        Captioner(tokenizer, constants)
    except EdgeError as error:
        raise ExportError(error.message, "Only BERT's uncased tokeniser is exported.") from error
    made = Source(
        checkpoint=label,
        format="transformers",
        sha256=weights_sha256(weights),
        architecture=architecture_name(model.config),
    )
    processor = _processor(folder, constants)
    return GroundingDinoCheckpoint(
        model, processor, tokenizer.encode(), constants, made, found, stored_dtype_note(config)
    )


def _load_model(folder: Path) -> Any:
    """The model with the weights of a folder; transformers' own account of the keys says that all of them are used.

    Names cannot be compared here: transformers renames those of older files, and files leave out tied weights.
    """
    try:
        with quiet():
            kind: Any = GroundingDinoForObjectDetection  # its annotations know one return value only
            model, info = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportError(
            f"The checkpoint in '{folder}' could not be loaded: {first_line(error)}",
            "Its config.json and weights do not fit together or are damaged; get the checkpoint again.",
        ) from error
    wrong = {what: sorted(map(str, info[f"{what}_keys"]))[:3] for what in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        raise ExportError(
            "The weights do not fit Grounding DINO: "
            + "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
            + ".",
            "Get the whole checkpoint; a modified model is not exported, since its extra parts would be lost.",
        )
    return model


def _processor(folder: Path, constants: GroundingDinoConstants) -> Any:
    images = GroundingDinoImageProcessorPil(
        size={"shortest_edge": constants.shortest_edge, "longest_edge": constants.longest_edge},
        image_mean=list(constants.mean),
        image_std=list(constants.std),
    )
    try:
        with quiet():
            return GroundingDinoProcessor(images, BertTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExportError(f"The tokeniser in '{folder}' is damaged: {first_line(error)}", "Get it again.") from error
