"""A small valid bundle of random bytes: the bundle layer never looks inside the graphs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pixano_edge.engine.bundle import BundleWriter
from pixano_edge.engine.contracts.sam2 import Sam2Constants

HASH = "0" * 64


def fields(**changes: Any) -> dict[str, Any]:
    """Manifest fields for `BundleWriter.finish`, with `changes`."""
    constants = Sam2Constants(image_size=64, hidden_dim=16)
    variant = {"opset": 18, "nodes": 3, "parameters": 5}
    values: dict[str, Any] = {
        "name": "sample",
        "family": "sam2",
        "created": "2026-01-02T03:04:05Z",
        "source": {
            "checkpoint": "org/sample",
            "format": "transformers",
            "sha256": HASH,
            "architecture": "sam2.1-hiera-sample",
        },
        "licence": {"spdx": "Apache-2.0", "text": "model card"},
        "tools": {"torch": "2.13.0"},
        "constants": constants.to_dict(),
        "preprocess": {"image_size": 64, "mean": constants.mean, "std": constants.std},
        "postprocess": {},
        "graphs": {
            graph: {
                "variants": {
                    "fp32": {"file": f"graphs/{graph}.fp32.onnx", "precision": "fp32", **variant},
                    "fp16": {"file": f"graphs/{graph}.fp16.onnx", "precision": "fp16", **variant},
                }
            }
            for graph in ("image_encoder", "mask_decoder")
        },
        "parity": {
            "reference": "PyTorch",
            "inputs": ["photo"],
            "tensors": [{"graph": "image_encoder", "tensor": "t", "variant": "fp32", "max_abs": 1e-6, "max_rel": 1e-7}],
            "masks": [{"variant": "fp32", "prompts": 4, "images": 1, "mean_iou": 1.0, "min_iou": 1.0}],
            "tolerance": {"max_rel": 1e-4},
            "passed": True,
        },
        "golden": [{"name": "one", "image": "golden/one.png", "tensors": "golden/one.npz"}],
    }
    return {**values, **changes}


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def add_files(writer: BundleWriter, seed: int = 0) -> None:
    """The files that `fields` names."""
    rng = np.random.default_rng(seed)
    for graph in ("image_encoder", "mask_decoder"):
        for precision in ("fp32", "fp16"):
            writer.add_file(f"graphs/{graph}.{precision}.onnx", rng.bytes(3000))
    writer.add_file("golden/one.png", b"png")
    writer.add_file("golden/one.npz", npz(a=np.arange(3, dtype=np.float32)))


def make_bundle(destination: Path, *, seed: int = 0, overwrite: bool = False, **changes: Any) -> Path:
    """Writes the sample bundle."""
    with BundleWriter(destination, overwrite) as writer:
        add_files(writer, seed)
        return writer.finish(fields(**changes))


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest on disk behind the writer's back."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
