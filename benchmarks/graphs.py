"""Every graph of a bundle by itself, on inputs that its model gives it: the engine, stock ONNX Runtime, OpenVINO.

All get the same file, the same inputs and the same number of threads, and take turns; on request the file of another
variant as well. Outputs are compared with those of stock ONNX Runtime on the fp32 file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.host import read_host
from pixano_edge.engine.contracts import grounding_dino, owlv2, sam2, sam2_video
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.runtime import open_device, open_session
from pixano_edge.engine.runtime.base import Binding, Session

from .contenders import OrtGraph
from .metrics import Latency, latency, relative_error
from .openvino_contender import PRECISIONS, OpenVinoGraph, left_out
from .segment import interleave
from .torch_options import FAILURES, first_line

ENGINE, BASELINE = "pixano-edge fp32", "ONNX Runtime, plain"

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """One contender on one graph.

    Attributes:
        graph: Its name, with the sizes of its dynamic dimensions.
        contender: Who.
        seconds: Percentiles.
        ratio: `BASELINE`'s p50 over this p50.
        relative_error: Worst output against `BASELINE`'s, max |difference| / max |reference|.
    """

    graph: str
    contender: str
    seconds: Latency
    ratio: float
    relative_error: float


@contextmanager
def recorded(found: dict[str, Arrays]) -> Iterator[None]:
    """While it is open, `found` gets a copy of the inputs of every graph that runs, by graph; the last run counts."""
    real = Binding.run

    def run(binding: Binding) -> None:
        session = binding.session
        found[session.spec.name] = {n: session._read_impl(b).copy() for n, b in binding.inputs.items()}
        real(binding)

    Binding.run = run  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Binding.run = real  # type: ignore[method-assign]


def real_inputs(bundle: Bundle, threads: int) -> dict[str, Arrays]:
    """Inputs of each graph: of a click, of a frame tracked with a full memory bank, or of a detection.

    Raises:
        EdgeError: A language model, whose decoder keeps its cache in place between runs.
    """
    from .detect import CLASSES
    from .detect_contenders import EngineDetections
    from .serving import photo

    found: dict[str, Arrays] = {}
    family = bundle.manifest.family
    if family == sam2.FAMILY:
        _record_sam2(bundle, threads, found)
    elif family in (*owlv2.FAMILIES, grounding_dino.FAMILY):
        engine = EngineDetections(bundle, photo(0.5), CLASSES, threads, "fp32")
        with recorded(found):
            engine.first()
        engine.close()
    else:
        raise EdgeError(
            f"The graphs of a '{family}' cannot be run by themselves: the decoder keeps its cache in place.",
            "Use: pixano-edge bench describe",
        )
    return found


def _record_sam2(bundle: Bundle, threads: int, found: dict[str, Arrays]) -> None:
    from pixano_edge.engine.contracts.sam2 import Sam2Constants
    from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
    from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel

    from .contenders import click_prompt
    from .segment import make_inputs
    from .track import DEMO, FILLED, EngineTracking, blobs, demo_clip

    if sam2_video.MEMORY_ATTENTION in bundle.specs:
        length = FILLED + 4
        clip = demo_clip(length) if bundle.manifest.name == DEMO else blobs(length)
        with Sam2VideoModel.open(bundle, "cpu", precision="fp32", threads=threads) as model, recorded(found):
            EngineTracking(model, clip, 1).step()
    constants = Sam2Constants.from_dict(dict(bundle.manifest.constants))
    inputs = make_inputs(constants)
    predictor = Sam2ImagePredictor.open(bundle, device="cpu", precision="fp32", threads=threads)
    with recorded(found):
        predictor.predict(inputs.picture, [click_prompt(inputs, constants)])
    predictor.close()


def measure(
    bundle: Bundle,
    *,
    rounds: int,
    threads: int,
    precision: str = "fp32",
    step: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], dict[str, str]]:
    """Times and compares every contender on every graph.

    Args:
        bundle: Any but a language model.
        rounds: Timed runs of each.
        threads: CPU threads of each contender.
        precision: Of the variant that takes part beside fp32.
        step: Told what is about to be timed.

    Returns:
        Rows, and who was left out with the reason.

    Raises:
        EdgeError: A language model.
        BundleError: A graph has no such variant.
    """
    # The graphs of the contract: those made for CPUs alone have no fellow in other runtimes ('bench segment' has them).
    bundle = copy.copy(bundle)
    bundle.manifest = bundle.manifest.model_copy(update={"cpu_graphs": {}})
    step("recording inputs")
    missing = left_out(read_host().cpu_flags)
    rows = []
    for name, inputs in real_inputs(bundle, threads).items():
        step(name)
        files = {p: bundle.graph_path(name, p) for p in dict.fromkeys(("fp32", precision))}
        if len(set(files.values())) < len(files):
            missing[f"{precision}, {name}"] = "the variant runs fp32's file"
            files = {"fp32": files["fp32"]}
        with ExitStack() as opened:
            rows += _race(files, bundle.specs[name], inputs, rounds, threads, missing, opened)
    return rows, missing


def _race(
    files: dict[str, Path],
    spec: GraphSpec,
    inputs: Arrays,
    rounds: int,
    threads: int,
    missing: dict[str, str],
    opened: ExitStack,
) -> list[Row]:
    sizes = sizes_of(spec, inputs)
    calls: dict[str, Callable[[], Arrays]] = {}
    for precision, path in files.items():
        session = open_session(path, spec, open_device("cpu"), threads=threads)
        opened.callback(session.close)
        calls[ENGINE if precision == "fp32" else f"pixano-edge {precision}"] = _bound(session, sizes, inputs)
        of_file = "" if precision == "fp32" else f", {precision} file"
        calls[BASELINE + of_file] = partial(OrtGraph(path, threads).run, inputs)
        for who, hint in PRECISIONS.items():
            if who in missing:
                continue
            try:
                graph = OpenVinoGraph(path, threads, hint)
                graph.run(inputs)
            except FAILURES as error:
                missing[f"{who}{of_file}, {spec.name}"] = first_line(error)
            else:
                calls[who + of_file] = partial(graph.run, inputs)
    times = {who: latency(values) for who, values in interleave(calls, rounds).items()}
    want = calls[BASELINE]()
    title = spec.name + (f" ({', '.join(f'{k} {v}' for k, v in sizes.items())})" if sizes else "")
    return [
        Row(title, who, times[who], times[BASELINE].p50 / times[who].p50, worst(call(), want))
        for who, call in calls.items()
    ]


def _bound(session: Session, sizes: dict[str, int], inputs: Arrays) -> Callable[[], Arrays]:
    binding = session.prepare(sizes)
    for name, value in inputs.items():
        binding.write(name, value)

    def run() -> Arrays:
        binding.run()
        return {tensor.name: binding.read(tensor.name) for tensor in session.spec.outputs}

    return run


def sizes_of(spec: GraphSpec, inputs: Arrays) -> dict[str, int]:
    """Sizes of the dynamic dimensions in some inputs."""
    return {
        dim: size
        for tensor in spec.inputs
        for dim, size in zip(tensor.dims, inputs[tensor.name].shape)
        if isinstance(dim, str)
    }


def worst(got: Arrays, want: Arrays) -> float:
    """Largest relative error of the outputs of floats; other outputs count as 0 or infinity."""
    errors = []
    for name, value in want.items():
        other = np.asarray(got[name])
        if np.issubdtype(value.dtype, np.floating):
            errors.append(relative_error(other, value))
        else:
            errors.append(0.0 if np.array_equal(other, value) else float("inf"))
    return max(errors)


COLUMNS = ("graph", "contender", "p50 ms", "p90 ms", "p99 ms", "vs plain ONNX Runtime", "rel. error")


def table_rows(rows: list[Row]) -> list[tuple[str, ...]]:
    """Cells of the table."""
    return [
        (
            row.graph, row.contender, *(f"{1000 * s:.2f}" for s in (row.seconds.p50, row.seconds.p90, row.seconds.p99)),
            f"{row.ratio:.2f}x", f"{row.relative_error:.1e}",
        )
        for row in rows
    ]  # fmt: skip


def to_dicts(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as JSON-ready values, times in seconds."""
    return [asdict(row) for row in rows]
