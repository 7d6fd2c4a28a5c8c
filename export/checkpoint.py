"""Reading checkpoints in transformers' folder format without running anybody's code: safetensors, no `auto_map`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from pixano_edge.engine.bundle.files import hash_file
from pixano_edge.engine.errors import ExportError

HUB_FILES = ("*.json", "*.safetensors", "README.md")
_OTHER_DOWNLOAD_ERRORS = ("InvalidURL", "RevisionResolutionError", "XetDownloadError")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(text: str) -> bool:
    """Whether a text looks like ``owner/name``."""
    return _HUB_ID.fullmatch(text) is not None


def weights_sha256(files: list[Path]) -> str:
    """Hash of a checkpoint: the file's own, or the hash over the sorted per-file hashes when sharded."""
    hashes = sorted(hash_file(f) for f in files)
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def download(hub_id: str, revision: str | None, patterns: Sequence[str] = HUB_FILES) -> Path:
    """The local folder of a hub id's files that fit `patterns`; raises ExportError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))
    except download_errors() as error:
        raise ExportError(
            f"'{hub_id}' could not be downloaded: {first_line(error)}",
            "Check the id and the network, or download the checkpoint elsewhere and give its folder.",
        ) from error


def download_errors() -> tuple[type[Exception], ...]:
    """What a download from the hub may raise.

    Errors of its HTTP client (httpx, httpx2 in newer releases) are no OSError; the client is known by what the hub's
    own HTTP error derives from. Its storage back end, written in Rust, raises RuntimeError.
    """
    from huggingface_hub import errors

    hub = {c for c in errors.HfHubHTTPError.__mro__ if issubclass(c, Exception)} - {Exception}
    clients = [sys.modules[c.__module__.partition(".")[0]] for c in hub if c.__module__ != "builtins"]
    # Names that not every release has.
    others = [getattr(m, name, None) for m in (errors, *clients) for name in _OTHER_DOWNLOAD_ERRORS]
    return (*hub, *(c for c in others if c is not None), OSError, ValueError, RuntimeError)


def from_pretrained(kind: Any, folder: Path) -> Any:
    """One of transformers' models with the weights of a folder, float32; raises ExportError."""
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportError(
            f"The checkpoint in '{folder}' could not be loaded: {first_line(error)}",
            "Its config.json and weights do not fit together or are damaged; get the checkpoint again.",
        ) from error
    mismatched = [str(m) for m in info["mismatched_keys"]]
    if mismatched:
        raise ExportError(f"Weights of another shape than config.json says: {mismatched[:5]}.", "Get it again.")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' bar and its warnings, such as of weights that go into a model of another kind on purpose."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def read_config(folder: Path, model_types: Collection[str], command: str, hint: str = "") -> dict[str, Any]:
    """The folder's ``config.json``, of one of these types.

    Args:
        folder: In transformers' format.
        model_types: Those that `command` takes.
        command: Such as ``export sam2``, for the message.
        hint: What else may be given than a folder.

    Raises:
        ExportError: No such file, code to run in it, or another model.
    """
    if not (folder / "config.json").is_file():
        raise ExportError(f"'{folder}' has no config.json.", f"Give a folder written by save_pretrained{hint}.")
    config = read_json(folder / "config.json")
    if '"auto_map"' in json.dumps(config):
        raise ExportError(
            f"config.json in '{folder}' asks to load Python code (auto_map).",
            "Pixano Edge never runs code from a checkpoint; use a checkpoint in plain transformers format.",
        )
    kind = config.get("model_type")
    if kind not in model_types:
        raise ExportError(
            f"'{folder}' holds a model of type {kind!r}.", f"`{command}` takes model_type {' or '.join(model_types)}."
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ExportError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path.name} cannot be read: {error}", "Get the checkpoint again.") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path.name} is not a JSON object.", "Get the checkpoint again.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; raises ExportError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        mapping = read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(mapping.values())) if os.path.basename(name) == name]
    else:
        files = [folder / "model.safetensors"]
    absent = [f.name for f in files if not f.is_file()]
    if absent or not files:
        raise ExportError(
            f"'{folder}' lacks {', '.join(absent) or 'weights'}.",
            "Weights are read from safetensors only; pickled .bin files are not opened.",
        )
    return files


def tensor_names(files: list[Path]) -> set[str]:
    """Names of all tensors; raises ExportError for a damaged file."""
    return {name for path in files for name in _file_tensor_names(path)}


def _file_tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise ExportError(
            f"{path.name} is damaged or truncated: {first_line(error)}", "Get the checkpoint again."
        ) from error


def check_finite(model: Any) -> None:
    """Raises ExportError where a weight is NaN or infinite."""
    bad = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise ExportError(f"The weights hold NaN or infinity, for example in {bad[:3]}.", "Get the checkpoint again.")


def stored_dtype_note(config: dict[str, Any]) -> list[str]:
    """A remark where the checkpoint stores its weights in another type than float32."""
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored in (None, "float32"):
        return []
    return [f"The checkpoint stores {stored} weights; the fp32 graphs hold the same values."]


def square_side(size: Any) -> int:
    """A square size that configurations give as one number or as a pair."""
    sides = {int(v) for v in size} if isinstance(size, list | tuple) else {int(size)}
    if len(sides) != 1:
        raise ExportError(f"config.json has a size of {size}, which is not square.", "Only square inputs are exported.")
    return sides.pop()


def first_line(error: BaseException) -> str:
    """The start of an error's text, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
