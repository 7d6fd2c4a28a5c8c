"""A tiny SAM 2 that tracks: its five graphs, a bundle of them, and clips to track in."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from pixano_edge.engine.bundle import BundleWriter
from pixano_edge.engine.contracts import sam2, sam2_video
from tests.engine.bundle.sample import fields

SIDE, WIDTH = 128, 128  # the video part of transformers needs a width of more than 64


def make_graphs(folder: Path) -> tuple[Any, Path, sam2.Sam2Constants, sam2_video.Sam2VideoConstants]:
    """Writes the graphs as ``NAME.onnx``; returns the PyTorch model, the folder and the constants."""
    import torch

    from tests.support.tiny import make_tiny_model

    torch.set_num_threads(1)
    model = make_tiny_model(SIDE, WIDTH)
    calm(model)
    constants = sam2.Sam2Constants(image_size=SIDE, hidden_dim=WIDTH)
    return model, folder, constants, export_graphs(model, constants, folder)


def calm(model: Any, seen: float = 2.0) -> None:
    """Changes a model of `sharpen` so that a clip can be compared frame for frame.

    Args:
        model: transformers' video model.
        seen: Bias of the object score: the larger, the seldomer an object is judged absent.
    """
    import torch

    with torch.no_grad():
        # Sharp weights in the loop through the memory make it chaotic: a rounding error would grow from frame to frame.
        for name, parameter in model.named_parameters():
            if name.startswith(("memory_attention", "memory_encoder")) and parameter.ndim > 1:
                parameter.mul_(0.6)
        # The time of a pointer would move the masks by less than rounding does.
        model.temporal_positional_encoding_projection_layer.weight.mul_(8)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(seen)


def export_graphs(
    model: Any, constants: sam2.Sam2Constants, folder: Path, names: Collection[str] = ()
) -> sam2_video.Sam2VideoConstants:
    """Writes a model's graphs, or some of them, as ``NAME.onnx``."""
    import onnx

    from pixano_edge.export.onnx_graph import export_graph
    from pixano_edge.export.sam2 import graphs, video_graphs

    video = video_graphs.video_constants(model)
    image_specs, video_specs = sam2.graphs(constants), sam2_video.graphs(constants, video)
    modules = {**graphs.modules(model), **video_graphs.modules(model)}
    for name, spec in {**image_specs, **video_specs}.items():
        if names and name not in names:
            continue
        example = (
            graphs.example_inputs(name, constants)
            if name in image_specs
            else video_graphs.example_inputs(name, constants, video)
        )
        onnx.save(export_graph(modules[name], spec, example), folder / f"{name}.onnx")
    return video


def make_tracking_bundle(
    graphs: Path, constants: sam2.Sam2Constants, video: sam2_video.Sam2VideoConstants, destination: Path
) -> Path:
    """A bundle (fp32, without golden samples) of graph files."""
    names = [*sam2.graphs(constants), *sam2_video.graphs(constants, video)]
    with BundleWriter(destination) as writer:
        for name in names:
            writer.add_file(f"graphs/fp32/{name}.onnx", (graphs / f"{name}.onnx").read_bytes())
        return writer.finish(
            fields(
                name="tiny-tracks",
                constants={**constants.to_dict(), sam2.VIDEO: video.to_dict()},
                preprocess={"image_size": constants.image_size, "mean": constants.mean, "std": constants.std},
                graphs={
                    name: {
                        "variants": {
                            "fp32": {
                                "file": f"graphs/fp32/{name}.onnx",
                                "precision": "fp32",
                                "opset": 18,
                                "nodes": 1,
                                "parameters": 1,
                            }
                        }
                    }
                    for name in names
                },
                golden=[],
            )
        )


def moving_squares(count: int) -> list[np.ndarray]:
    """A clip of N frames, 96x144: two squares that move and cross over a textured ground."""
    rng = np.random.default_rng(0)
    ground = (rng.random((12, 18, 3)) * 120).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    frames = []
    for i in range(count):
        frame = ground.copy()
        x = 10 + 3 * i % 100
        frame[20:52, x : x + 30] = (230, 60, 40)
        frame[40:70, 110 - x // 2 : 134 - x // 2] = (40, 90, 240)
        frames.append(frame)
    return frames
