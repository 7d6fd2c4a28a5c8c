"""Ahead-of-time build with TensorRT for RTX: proves without a GPU that a graph parses, types and compiles.

The build runs in a child process: a crash or a memory limit ends the child alone, and its memory is given back.
Networks of TensorRT for RTX are always strongly typed, so a graph that mixes fp16 and fp32 wrongly fails here. A
build says nothing about the numbers; those need a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import ExportError, MissingDependencyError

COMPUTE_CAPABILITIES = ("SM86", "SM89")
"""Ampere and Ada cards; 1.7 knows SM75, 80, 86, 89, 120 and 121, neither Orin (87) nor Hopper (90)."""
_MODULES = ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")


@dataclass(frozen=True)
class Build:
    """What a build gave.

    Attributes:
        engine_bytes: Size of the serialised engine; the engine itself is thrown away.
        seconds: Duration of the build.
        version: Version of TensorRT for RTX.
    """

    engine_bytes: int
    seconds: float
    version: str


def missing_module() -> str | None:
    """Name of the first wheel that is not installed, or None."""
    return next((m for m in _MODULES if importlib.util.find_spec(m) is None), None)


def check_build(
    file: Path,
    spec: GraphSpec,
    compute_capabilities: Sequence[str] = COMPUTE_CAPABILITIES,
    timeout: float = 900.0,
) -> Build:
    """Builds one engine for the given GPUs and compares the parsed network with the contract.

    Args:
        file: ONNX file with its weights inside.
        spec: Contract; its ranges become the optimisation profile.
        compute_capabilities: Names such as ``SM89``.
        timeout: Seconds until the child is ended.

    Raises:
        MissingDependencyError: The wheels are not installed.
        ExportError: The graph does not parse or build, or differs from its contract.
    """
    absent = missing_module()
    if absent:
        raise MissingDependencyError(absent, "tensorrt-rtx", "Building for TensorRT")
    job = {"file": str(file), "spec": asdict(spec), "compute_capabilities": list(compute_capabilities)}
    command = [sys.executable, "-m", "pixano_edge.export.tensorrt_rtx"]
    try:
        child = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"Building '{spec.name}' took over {timeout:.0f} s.", "Raise the timeout.") from error
    lines = child.stdout.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1] if lines else "")
    except ValueError as error:
        tail = child.stderr.strip().splitlines()[-3:]
        raise ExportError(
            f"The TensorRT build of '{spec.name}' ended with code {child.returncode}: {' '.join(tail)}",
            "The builder crashed; check the memory that is free.",
        ) from error
    if answer["problems"]:
        raise ExportError(
            f"TensorRT does not take '{spec.name}': {'; '.join(answer['problems'])}", "The graph must be changed."
        )
    return Build(answer["engine_bytes"], answer["seconds"], answer["version"])


def _build(job: dict[str, Any]) -> dict[str, Any]:
    """In the child: parse, compare, build."""
    import tensorrt_rtx_libs  # noqa: F401  (loads the shared libraries that the bindings need)

    import tensorrt_rtx_bindings as trt  # isort: skip

    messages: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message.strip())

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    answer: dict[str, Any] = {"version": trt.__version__, "problems": [], "engine_bytes": 0, "seconds": 0.0}
    if not parser.parse_from_file(job["file"]):
        answer["problems"] = [str(parser.get_error(i)) for i in range(parser.num_errors)] or messages
        return answer
    spec = job["spec"]
    answer["problems"] = _compare(trt, network, spec)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(job["compute_capabilities"])
    for index, name in enumerate(job["compute_capabilities"]):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if spec["ranges"]:
        profile = builder.create_optimization_profile()
        for tensor in spec["inputs"]:
            if any(isinstance(d, str) for d in tensor["dims"]):
                shapes = [
                    tuple(spec["ranges"][d][which] if isinstance(d, str) else d for d in tensor["dims"])
                    for which in range(3)
                ]
                profile.set_shape(tensor["name"], *shapes)
        config.add_optimization_profile(profile)
    start = time.monotonic()
    engine = builder.build_serialized_network(network, config)
    answer["seconds"] = time.monotonic() - start
    if engine is None:
        answer["problems"] += messages or ["the builder returned no engine"]
    else:
        answer["engine_bytes"] = int(engine.nbytes)
    return answer


def _compare(trt: Any, network: Any, spec: dict[str, Any]) -> list[str]:
    """Differences between the parsed network's inputs and outputs and the contract."""
    types = {"float32": trt.float32, "int32": trt.int32, "int64": trt.int64}
    problems = []
    for kind, count, get in (
        ("inputs", network.num_inputs, network.get_input),
        ("outputs", network.num_outputs, network.get_output),
    ):
        found = {get(i).name: get(i) for i in range(count)}
        if list(found) != [t["name"] for t in spec[kind]]:
            problems.append(f"{kind} are {list(found)}")
            continue
        for tensor in spec[kind]:
            parsed = found[tensor["name"]]
            shape = tuple(parsed.shape)
            fits = len(shape) == len(tensor["dims"]) and all(
                got == -1 if isinstance(want, str) else got in (want, -1) for got, want in zip(shape, tensor["dims"])
            )
            if parsed.dtype != types[tensor["dtype"]] or not fits:
                problems.append(
                    f"{tensor['name']} is {parsed.dtype} {shape}, expected {tensor['dtype']} {tensor['dims']}"
                )
    return problems


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_build(json.load(sys.stdin))) + "\n")
