"""Tokeniser and chat template of a checkpoint, as the engine will read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pixano_edge.engine.errors import EdgeError, ExportError
from pixano_edge.engine.models.text.template import ChatTemplate
from pixano_edge.engine.models.text.tokenizer import TextTokenizer
from pixano_edge.export.checkpoint import first_line, quiet, read_json

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
SAMPLES = (
    "Describe this image in detail.",
    "How many? 12, 345 or 6789; größer, café, 漢字, 🙂.\n\n\tdef f(x):\n        return x  # tabs and   spaces",
)


def read_tokenizer(folder: Path) -> Any:
    """transformers' tokeniser of a folder; raises ExportError where there is none, it is slow, or it is damaged."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ExportError(
            f"'{folder}' has no tokeniser.", f"Get {' or '.join(TOKENIZER_FILES)} (with merges.txt) of the checkpoint."
        )
    try:
        with quiet():
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExportError(f"The tokeniser in '{folder}' is damaged: {first_line(error)}", "Get it again.") from error
    if not hasattr(found, "backend_tokenizer"):
        raise ExportError(f"The tokeniser in '{folder}' has no tokenizer.json form.", "Get the fast tokeniser.")
    return found


def tokenizer_content(folder: Path, tokenizer: Any) -> tuple[bytes, list[str]]:
    """Content of the bundle's ``tokenizer.json``, and remarks.

    The checkpoint's own file, if there is one that gives the tokens of transformers' tokeniser, which adds what it
    finds in other files; else what transformers made of it.
    """
    made = tokenizer.backend_tokenizer.to_str().encode()
    own = folder / "tokenizer.json"
    if not own.is_file():
        return made, []
    content = own.read_bytes()
    try:
        given, built = TextTokenizer(content), TextTokenizer(made)
    except EdgeError as error:
        raise ExportError(error.message, "Get the tokeniser of the checkpoint again.") from error
    names = " ".join(built.special)
    same = given.special == built.special and all(given.encode(t) == built.encode(t) for t in (*SAMPLES, names))
    if same:
        return content, []
    return made, ["The bundle's tokenizer.json is transformers' reading of the checkpoint's, which differs from it."]


def read_template(folder: Path) -> str:
    """The chat template, from where transformers' processors look for it; raises ExportError where there is none."""
    plain = folder / "chat_template.jinja"
    found: Any = None
    if plain.is_file():
        found = plain.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if found is None and (folder / name).is_file():
            found = read_json(folder / name).get("chat_template")
    if isinstance(found, list):  # several with names
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(found, str) or not found.strip():
        raise ExportError(
            f"'{folder}' has no chat template.",
            "Get chat_template.json or chat_template.jinja of the checkpoint; a base model without one cannot answer.",
        )
    try:
        ChatTemplate(found)
    except EdgeError as error:
        raise ExportError(error.message, "Get the chat template of the checkpoint again.") from error
    return found


def processor_settings(folder: Path) -> dict[str, Any]:
    """What the processor's files say: the image processor's settings under ``image_processor``.

    Raises:
        ExportError: A file is damaged.
    """
    settings = read_json(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
    images = settings.get("image_processor")
    if not isinstance(images, dict) and (folder / "preprocessor_config.json").is_file():
        images = read_json(folder / "preprocessor_config.json")
    return {**settings, "image_processor": images if isinstance(images, dict) else {}}
