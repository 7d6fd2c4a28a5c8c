"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bundle import Bundle, BundleStore

DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.")]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        help="auto, onnxruntime, or tensorrt (build its engines first: pixano-edge build). auto takes the fastest that "
        "passed the bundle's golden samples on this device; the first load there runs them.",
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        help="auto, or a precision that the bundle has: fp32, fp16, bf16, int8, int4.",
    ),
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force", help="Use this --backend and --precision although their golden samples failed on this device."
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads of the engine; default: what ONNX Runtime takes.")
]


def resolve_bundle(name: str) -> Path:
    """Folder of a bundle given by path, or by its name in the local store; the demo bundles ship with the package.

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
