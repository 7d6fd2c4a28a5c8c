"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bundle import Bundle, BundleStore

DeviceOption = Annotated[
    str, typer.Option("--device", help="auto or cpu; cuda:N comes with a later version and is an error until then.")
]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend", help="auto or onnxruntime; tensorrt comes with a later version and is an error until then."
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        help="auto, fp32 or fp16, where the bundle has it; bf16, int8 and int4 come with a later version and are an "
        "error until then.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads of the engine; default: what ONNX Runtime takes.")
]


def resolve_bundle(name: str) -> Path:
    """Folder of a bundle given by path, or by its name in the local store; ``sam2-demo`` ships with the package.

    Raises:
        BundleError: Neither a folder with a manifest nor a known name; lists the known names.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    return BundleStore().path(name)


def open_bundle(name: str) -> Bundle:
    """Opens and checks a bundle given by path or name."""
    return Bundle.open(resolve_bundle(name))
