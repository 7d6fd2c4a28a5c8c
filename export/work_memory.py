"""How much memory an open graph and its intermediate tensors take, measured: one child process per graph file.

The child opens the file with the engine's own session on the CPU, fills inputs and outputs, and looks at its anonymous
resident memory before and after opening and some runs. ONNX Runtime's arena keeps what it took, so what is left after a
run is the most that the run needed; pages that the arena reserved and nobody wrote do not count. Repeated on one
machine, figures of the demo model differed by less than a per cent. Values of the inputs do not matter, only their
sizes: the contract's typical ones.

``python -m pixano_edge.export.work_memory`` is the child: a job as JSON on stdin, the answer as JSON on stdout. It
imports neither torch nor onnx.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pixano_edge.engine.bundle.manifest import GraphMemory, GraphVariant
from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.engine.contracts.decoder import SEQLENS_K
from pixano_edge.engine.errors import EdgeError, ExportError

RUNS = 3
TIMEOUT = 1800.0
"""Seconds for one graph; the largest encoder takes half a minute on one core."""


def measure_graphs(
    root: Path, specs: Mapping[str, GraphSpec], entries: Mapping[str, Mapping[str, GraphVariant]], threads: int | None
) -> list[GraphMemory]:
    """Measures every variant that ONNX Runtime runs; what TensorRT takes is known once an engine was built.

    Args:
        root: Folder that the variants' files are relative to.
        specs: Contracts by graph.
        entries: Variants by graph and name.
        threads: Threads of a run; None for the engine's default.

    Returns:
        One entry per graph and variant; none on systems whose ``/proc`` does not tell resident memory.

    Raises:
        ExportError: A graph did not run.
    """
    found = []
    for graph, spec in specs.items():
        for name, variant in entries[graph].items():
            if variant.target != "onnx":
                continue
            measured = measure_file(root / variant.file, spec, threads)
            if measured is not None:
                found.append(GraphMemory(graph=graph, variant=name, **measured))
    return found


def fills_of(spec: GraphSpec) -> dict[str, float]:
    """Values of inputs that may not be 0: a decoder whose last token is that of slot 0 has no prompt of many."""
    if all(tensor.name != SEQLENS_K for tensor in spec.inputs):
        return {}
    return {SEQLENS_K: spec.ranges["S"][1] - 1}


def measure_file(
    path: Path, spec: GraphSpec, threads: int | None = None, fills: Mapping[str, float] | None = None
) -> dict[str, Any] | None:
    """The fields of `GraphMemory` for one graph file, but its names.

    Args:
        path: ONNX file.
        spec: Its contract.
        threads: As in `measure_graphs`.
        fills: Values of inputs that may not be 0.

    Returns:
        None where this system does not tell.

    Raises:
        ExportError: The graph did not run, or the child ended without an answer.
    """
    job = {"file": str(path), "spec": asdict(spec), "threads": threads, "fills": dict(fills or {})}
    safe = ("-P",) if sys.version_info >= (3, 11) else ()  # a file of the current folder must not stand in for a module
    command = [sys.executable, *safe, "-m", "pixano_edge.export.work_memory"]
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"Measuring the memory of '{path.name}' took over {TIMEOUT:.0f} s.", "Export on a faster machine."
        ) from error
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        last = " ".join(done.stderr.strip().splitlines()[-3:])
        raise ExportError(
            f"Measuring the memory of '{path.name}' ended with code {done.returncode}: {last}",
            "Free memory and export again.",
        ) from error
    if "error" in answer:
        raise ExportError(f"Measuring the memory of '{path.name}': {answer['error']}", answer["action"])
    return None if "unknown" in answer else answer


def measure(
    file: Path, spec: GraphSpec, threads: int | None, fills: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Opens and runs a graph in this process, which should have done nothing else yet; see `measure_file`.

    Returns:
        ``{"unknown": True}`` where this system does not tell.

    Raises:
        EdgeError: It does not open or run.
    """
    from pixano_edge.engine.runtime import open_device, open_session
    from pixano_edge.engine.runtime.memory import resident_bytes

    sizes = {dim: typical for dim, (_, typical, _) in spec.ranges.items()}
    device = open_device("cpu")
    # The first opening also pays for what ONNX Runtime sets up once; it stays, or its memory would be used again.
    first = open_session(file, spec, device, backend="onnxruntime", threads=threads)
    closed = resident_bytes()
    session = open_session(file, spec, device, backend="onnxruntime", threads=threads)
    opened = resident_bytes()
    binding = session.prepare(sizes)
    for buffer in (*binding.inputs.values(), *binding.outputs.values()):
        buffer.host().fill(0)  # now: memory that was never written is not resident
    for name, number in (fills or {}).items():
        binding.inputs[name].host().fill(number)
    gc.collect()
    before = resident_bytes()
    after = []
    for _ in range(RUNS):
        binding.run()
        after.append(resident_bytes())
    facts = session.info()
    session.close()
    first.close()
    known = [value for value in after if value is not None]
    if closed is None or opened is None or before is None or not known:
        return {"unknown": True}
    return {
        "session_bytes": max(0, opened - closed),
        "activation_bytes": max(0, max(known) - before),
        "sizes": sizes,
        "measured_with": f"onnxruntime {facts['version']}, {facts['provider']}",
    }


def main() -> None:
    """Runs one job."""
    job = json.load(sys.stdin)
    tensors = {
        side: tuple(TensorSpec(t["name"], t["dtype"], tuple(t["dims"])) for t in job["spec"][side])
        for side in ("inputs", "outputs")
    }
    ranges = {dim: (low, typical, high) for dim, (low, typical, high) in job["spec"]["ranges"].items()}
    spec = GraphSpec(job["spec"]["name"], tensors["inputs"], tensors["outputs"], ranges)
    try:
        answer = measure(Path(job["file"]), spec, job["threads"], job["fills"])
    except EdgeError as error:
        answer = {"error": error.message, "action": error.action}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
