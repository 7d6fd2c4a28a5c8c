"""The variants without a search: 4-bit weights of a language model's decoder, and half precision."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

from pixano_edge.engine.bundle.files import os_errors
from pixano_edge.engine.contracts import decoder as decoders
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.engine.models.decoder.opening import FAMILIES as TEXT_FAMILIES

from .data import Picture
from .make_int8 import GROUP_BYTES
from .result import GraphSize
from .work import FEEDS, Made, NewGraph, Work

SEEN = re.compile("reached|is around")
"""In the reasons of islands that the data asked for; the others follow from operators alone."""


def make_int4(work: Work, variant: str) -> Made:
    """4-bit weights for the decoder; the other graphs run as they are.

    Raises:
        CalibrationError: The bundle has no decoder.
    """
    if work.bundle.manifest.family not in TEXT_FAMILIES:
        raise CalibrationError(
            f"int4 is for language models; '{work.bundle.manifest.family}' has none.", "Take --precision int8."
        )
    from pixano_edge.calibration.int4_variant import make_int4 as quantise
    from pixano_edge.calibration.turns import Question

    plans = [(sample, work.task.plan_of(sample)) for sample in work.calibration if isinstance(sample, Picture)]
    total = sum(len(questions) for _, questions in plans)

    def questions() -> Iterator[Question]:
        for sample, asked in plans:
            image = sample.load()
            yield from (Question(image, text) for text in asked)

    made = quantise(
        work.bundle,
        questions(),
        work.folder / "int4",
        tokens=work.request.options.max_new_tokens,
        threads=work.request.options.threads,
        on_turn=work.counter("Asking questions", total),
        on_collected=work.counter("Collecting activations", 0),
        on_matrix=work.counter("Quantising matrices", 0),
    )
    file = work.bundle.graph_path(decoders.DECODER, "fp32")
    entry = work.bundle.manifest.graphs[decoders.DECODER].variants["fp32"]
    full = entry.weight_bytes or 4 * entry.parameters or file.stat().st_size
    size = made.graph.stat().st_size + made.weights.stat().st_size
    layers = len(made.layers)
    return Made(
        "int4",
        {decoders.DECODER: NewGraph(made.graph, (made.weights,), made.entries[decoders.DECODER])},
        (GraphSize(decoders.DECODER, size, full, layers, layers),),
        method=f"4-bit weights, {layers} matrices",
    )


def make_half(work: Work, variant: str, precision: str) -> Made:
    """fp16 or bf16, with what they cannot hold left in fp32.

    Judged is a graph that rounds every value as a GPU does: ONNX Runtime's CPU provider computes fp16 graphs mostly in
    fp32, and bf16 ones not at all.

    Raises:
        CalibrationError: A graph cannot be converted, or it is a language model's fp16.
    """
    if precision == "fp16" and work.bundle.manifest.family in TEXT_FAMILIES:
        # Its decoder has another contract then, with a cache in fp16, which only the exporter writes.
        raise CalibrationError(
            "fp16 of a language model is exported, not calibrated.", "Use pixano-edge export --variants fp32,fp16."
        )
    from pixano_edge.calibration.graph import load_graph
    from pixano_edge.calibration.islands import halve, rounded, tensors
    from pixano_edge.calibration.observe import observe

    spool = work.spool("calibration", work.calibration, FEEDS)
    folder = work.folder / precision
    graphs: dict[str, NewGraph] = {}
    sizes, notes = [], []
    for graph in work.graphs:
        feeds = spool.feeds(graph)
        if not len(feeds):
            work.notes.append(f"{graph} never ran on these data; it stays in fp32.")
            continue
        model = load_graph(work.bundle.graph_path(graph, "fp32"))
        told = partial(_forward, work.counter(f"Observing {graph}", len(feeds)))
        threads = work.request.options.threads or 0
        store = work.folder / f"{graph}.{precision}.npz"
        seen = observe(model, feeds, tensors(model), store, group_bytes=GROUP_BYTES, threads=threads, on_feed=told)
        made, kept = halve(model, seen, precision)
        path, judged = folder / f"{graph}.onnx", folder / f"{graph}.rounded.onnx"
        with os_errors(f"writing '{path}'"):
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(made.SerializeToString(deterministic=True))
            judged.write_bytes(rounded(model, seen, precision).SerializeToString(deterministic=True))
        graphs[graph] = NewGraph(path, judged=judged)
        total = len(model.graph.node)
        sizes.append(GraphSize(graph, path.stat().st_size, model.ByteSize(), total - len(kept), total))
        islands = [f"{node} ({why})" for node, why in kept.items() if SEEN.search(why)]
        if islands:
            notes.append(f"{graph} keeps {len(islands)} node(s) in fp32: {', '.join(islands[:3])}.")
    if not graphs:
        raise CalibrationError("No graph ran on these data.", "Choose other --graphs.")
    return Made(precision, graphs, tuple(sizes), notes=notes, method=f"{precision} with fp32 islands")


def _forward(done: Callable[[], None], count: int) -> None:
    done()
