"""Measurements behind two choices for the memory attention: ``python -m pixano_edge.export.sam2.memory_sweep``.

* Length of the memory: one graph with a dynamic number of memories, against a graph of fixed shape for each number
  (latency in ONNX Runtime on the CPU; size and time of ahead-of-time builds with TensorRT for RTX).
* fp16: what islands of fp32 in its attentions save, every intermediate value rounded as a GPU does.

At the size of the official models by default; the weights are random, which changes no latency. ``docs/design.md`` has
the figures and the conclusions.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from torch import nn

from pixano_edge.engine.build.profiles import profiles
from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.differences import Arrays
from pixano_edge.export.fp16 import rounded, to_fp16
from pixano_edge.export.onnx_graph import export_graph
from pixano_edge.export.sam2 import video_graphs
from pixano_edge.export.sam2.feeds import random_feeds

GAIN = 1.5
"""Of the random matrices, on 1 / sqrt(fan in): attention is then peaked on some keys, as in a trained model."""


def random_attention(image_size: int, seed: int = 0) -> tuple[onnx.ModelProto, GraphSpec]:
    """The memory attention of the official models for square images of a size, with seeded weights."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    grid = image_size // 16
    config: Any = Sam2VideoConfig(image_size=image_size, memory_attention_rope_feat_sizes=[grid, grid])
    config.prompt_encoder_config.image_size = image_size
    config.vision_config.backbone_feature_sizes = [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]
    config.vision_config.backbone_config.image_size = [image_size, image_size]
    model = Sam2VideoModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.memory_attention.modules():
            if isinstance(module, nn.Linear):
                fan_in = module.weight.shape[1]
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * GAIN * fan_in**-0.5)
    constants = sam2.Sam2Constants(image_size=image_size, hidden_dim=int(model.hidden_dim))
    video = video_graphs.video_constants(model)
    spec = sam2_video.memory_attention(constants, video)
    example = video_graphs.example_inputs(spec.name, constants, video)
    return export_graph(video_graphs.modules(model)[spec.name], spec, example), spec


def session(path: Path, threads: int, optimise: bool = True) -> Any:
    """ONNX Runtime on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def fixed(model: onnx.ModelProto, sizes: dict[str, int]) -> onnx.ModelProto:
    """A copy whose dynamic dimensions have these sizes."""
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for name, size in sizes.items():
        make_dim_param_fixed(copy.graph, name, size)
    return copy


def latency(
    model: onnx.ModelProto, spec: GraphSpec, folder: Path, rounds: int, threads: int
) -> Iterator[tuple[int, float, float]]:
    """Rows of memories, median seconds of the dynamic graph and of the fixed one, in turns."""
    onnx.save(model, folder / "dynamic.onnx")
    dynamic = session(folder / "dynamic.onnx", threads)
    most, pointers = spec.ranges["M"][1], spec.ranges["K"][1]
    for memories in range(1, most + 1):
        sizes = {"B": 1, "M": memories, "K": pointers}
        feeds = random_feeds(spec, sizes, seed=0)
        onnx.save(fixed(model, sizes), folder / "fixed.onnx")
        runners = (dynamic, session(folder / "fixed.onnx", threads))
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds + 1):  # the first one warms up
            for runner, taken in zip(runners, seconds):
                start = time.perf_counter()
                runner.run(None, feeds)
                taken.append(time.perf_counter() - start)
        yield memories, float(np.median(seconds[0][1:])), float(np.median(seconds[1][1:]))


def builds(file: Path, spec: GraphSpec) -> list[tuple[str, int, float]]:
    """Rows of what is built, engine bytes and seconds: the dynamic graph, and an engine for each number of memories."""
    made = tensorrt_rtx.check_build(file, spec)
    count = len(profiles(spec))
    rows = [(f"one engine, {count} profiles", made.engine_bytes, made.seconds)]
    total_bytes, total_seconds = 0, 0.0
    most = spec.ranges["M"][1]
    for memories in range(1, most + 1):
        alone = {**spec.ranges, "B": (1, 1, 1), "M": (memories,) * 3}
        made = tensorrt_rtx.check_build(file, replace(spec, ranges=alone, profiles=(alone,)))
        total_bytes, total_seconds = total_bytes + made.engine_bytes, total_seconds + made.seconds
    return [*rows, (f"{most} engines, one for each number of memories, of one object", total_bytes, total_seconds)]


def islands(model: onnx.ModelProto, spec: GraphSpec, folder: Path, threads: int) -> Iterator[tuple[str, float, float]]:
    """Rows of what stays in fp32, largest error relative to the largest value, and that of root mean squares."""
    pointers, most = spec.ranges["K"][1], spec.ranges["M"][1]
    feeds = random_feeds(spec, {"B": 1, "M": most, "K": pointers}, seed=0)
    producers = {o: n for n in model.graph.node for o in n.output}
    softmax = [n for n in model.graph.node if n.op_type == "Softmax"]
    scores = [producers[n.input[0]].name for n in softmax]
    sums = [n.name for n in model.graph.node if n.op_type == "MatMul" and {s.output[0] for s in softmax} & set(n.input)]
    norms = [n.name for n in model.graph.node if n.op_type == "LayerNormalization"]
    names = [n.name for n in softmax]
    want = _output(model, folder, feeds, threads)
    for what, keep in (
        ("nothing", []),
        ("softmax", names),
        ("softmax and the products around it", [*scores, *names, *sums]),
        ("normalisations", norms),
        ("all of these", [*scores, *names, *sums, *norms]),
    ):
        difference = _output(rounded(to_fp16(model, keep)), folder, feeds, threads) - want
        yield (
            what,
            float(np.abs(difference).max() / np.abs(want).max()),
            float(np.sqrt((difference**2).mean()) / np.sqrt((want**2).mean())),
        )


def _output(model: onnx.ModelProto, folder: Path, feeds: Arrays, threads: int) -> Any:
    onnx.save(model, folder / "one.onnx")
    return session(folder / "one.onnx", threads, optimise=False).run(None, feeds)[0]


def main(
    image_size: Annotated[int, typer.Option(help="Side of the model's input.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each graph after a warm-up.")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Measure the memory attention."""
    model, spec = random_attention(image_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        typer.echo("memories | dynamic ms | fixed ms")
        for memories, open_seconds, fixed_seconds in latency(model, spec, folder, rounds, threads):
            typer.echo(f"{memories} | {1e3 * open_seconds:.0f} | {1e3 * fixed_seconds:.0f}")
        if tensorrt_rtx.missing_module() is None:
            typer.echo("TensorRT for RTX | MB | seconds")
            for what, size, seconds in builds(folder / "dynamic.onnx", spec):
                typer.echo(f"{what} | {size / 1e6:.1f} | {seconds:.1f}")
        typer.echo("in fp32 within fp16 | largest error | root mean square")
        for what, largest, mean in islands(model, spec, folder, threads):
            typer.echo(f"{what} | {largest:.1e} | {mean:.2e}")


if __name__ == "__main__":
    typer.run(main)
