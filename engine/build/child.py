"""The child process that loads TensorRT: ``python -m pixano_edge.engine.build.child``.

Reads one job as a line of JSON on stdin, answers with lines of JSON on its first stdout: ``progress`` events, at the
end one ``result`` or ``failure``. Everything that TensorRT prints goes to stderr. stdin stays open while the parent
lives: the child ends with it, so a killed parent leaves no builder behind.

Networks are strongly typed always, so precision is what the graph says. TF32, which TensorRT switches on by itself,
is off unless asked for: it rounds the factors of fp32 products to 10 bits.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import BuildError, DeviceError, EdgeError
from ..runtime.tensorrt_api import TensorRt, load_tensorrt
from ..runtime.tensorrt_contract import read_profiles
from ..runtime.tensorrt_names import missing_calls
from .compare import compare_profiles, compare_tensors
from .key import VERSION_COMPATIBLE
from .layers import describe_layers
from .names import BUILD_CALLS, RTX_BUILD_CALLS
from .progress import Meter

Job = Mapping[str, Any]
Say = Callable[[str, Mapping[str, Any]], None]
"""Sends an event to the parent."""


def describe(api: TensorRt, job: Job, say: Say) -> dict[str, Any]:
    """Version, and the compute capabilities that it builds ahead of time for (names of the enum's members)."""
    members = getattr(api.module, "ComputeCapability", None)
    known = [] if members is None or not api.rtx else list(members.__members__)
    return {"version": api.version, "compute_capabilities": known}


def parse(api: TensorRt, job: Job, say: Say) -> dict[str, Any]:
    """The parsed network's layers, without a build."""
    network = _Network(api, job)
    problems = network.parse()
    layers = [] if problems else describe_layers(api.module, network.network)
    return {"version": api.version, "problems": problems, "layers": layers}


def build(api: TensorRt, job: Job, say: Say) -> dict[str, Any]:
    """Parses, compares, builds and writes the engine to the file ``job["output"]``."""
    network = _Network(api, job)
    say("progress", {"phase": "Parsing the graph", "fraction": 0.0})
    problems = network.parse()
    answer: dict[str, Any] = {"version": api.version, "problems": problems, "engine_bytes": 0, "seconds": 0.0}
    if problems:
        return answer
    config, timing = network.configure()
    config.progress_monitor = network.monitor = Meter(say).monitor(api.module)
    start = time.monotonic()
    engine = network.builder.build_serialized_network(network.network, config)
    answer["seconds"] = time.monotonic() - start
    answer["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer["warnings"] = network.warnings
    if engine is None:
        answer["problems"] = network.errors or ["the builder returned no engine"]
        return answer
    with Path(job["output"]).open("wb") as file:
        answer["engine_bytes"] = file.write(memoryview(engine))
    if timing is not None:
        Path(job["timing_output"]).write_bytes(memoryview(config.get_timing_cache().serialize()))
    return answer


def inspect(api: TensorRt, job: Job, say: Say) -> dict[str, Any]:
    """What TensorRT made of a graph: the inspector's JSON of the engine in ``job["file"]``. Needs the GPU."""
    from ..runtime.engine_file import read_engine

    header, data = read_engine(Path(job["file"]))
    portable = VERSION_COMPATIBLE in header.key.get("flags", ())
    engine = api.open(data, str(header.key.get("graph", "")), host_code=portable)
    try:
        return {"version": api.version, "engine": json.loads(engine.layer_json())}
    finally:
        engine.close()


def scratch(api: TensorRt, job: Job, say: Say) -> dict[str, Any]:
    """Device memory that a context of the engine in ``job["file"]`` needs, per profile. Needs the GPU.

    ``job["file"]`` is an engine as TensorRT serialised it, without a header.
    """
    engine = api.open(Path(job["file"]).read_bytes(), job["name"], host_code=bool(job["host_code"]))
    try:
        return {"version": api.version, "scratch_bytes": [p.scratch for p in read_profiles(engine)]}
    finally:
        engine.close()


class _Network:
    """One graph in one builder."""

    def __init__(self, api: TensorRt, job: Job) -> None:
        from ..runtime.tensorrt_callbacks import make_logger

        trt = api.module
        self.api = api
        self.job = job
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.monitor: Any = None
        self._log = make_logger(trt, self.errors, self.warnings)
        self.builder = trt.Builder(self._log)
        # Releases without the flag know no other kind of network.
        typed = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
        self.network = self.builder.create_network(0 if typed is None else 1 << int(typed))
        self._parser = trt.OnnxParser(self.network, self._log)

    def parse(self) -> list[str]:
        """Reads the graph; returns what TensorRT does not take and what differs from the contract."""
        if not self._parser.parse_from_file(self.job["file"]):
            found = [str(self._parser.get_error(i)) for i in range(self._parser.num_errors)]
            return found or self.errors or ["the parser gave no reason"]
        problems = compare_tensors(self.network, self.job["spec"])
        return problems + compare_profiles(self.network, self.job["profiles"])

    def configure(self) -> tuple[Any, Any]:
        """The builder's configuration, and its timing cache or None."""
        trt, job = self.api.module, self.job
        config = self.builder.create_builder_config()
        flags = job["flags"]
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector's answers; costs no speed
        if not flags.get("tf32"):
            config.clear_flag(trt.BuilderFlag.TF32)
        if flags.get("version_compatible"):
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if level := flags.get("hardware_compatible"):
            known = getattr(trt.HardwareCompatibilityLevel, level.upper(), None)
            if known is None:
                raise DeviceError(
                    f"{self.api.flavour} {self.api.version} has no hardware compatibility '{level}'.",
                    "Leave the option out.",
                )
            config.hardware_compatibility_level = known
        if workspace := job.get("workspace"):
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        if self.api.rtx:
            # Without it a run may allocate, and then cannot be captured in a CUDA graph (NVIDIA's RTX guide).
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
            config.num_compute_capabilities = len(job["compute_capabilities"])
            for index, name in enumerate(job["compute_capabilities"]):
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        for shapes in job["profiles"]:
            profile = self.builder.create_optimization_profile()
            for name, (low, typical, high) in shapes:
                profile.set_shape(name, tuple(low), tuple(typical), tuple(high))
            if config.add_optimization_profile(profile) < 0:
                raise BuildError(
                    f"TensorRT refuses the profile {shapes} of '{job['name']}'.", "Check the ranges of its contract."
                )
        timing = None
        if job.get("timing_output") and not self.api.rtx:  # RTX times nothing: its timing cache does nothing
            kept = Path(job["timing_input"])
            timing = config.create_timing_cache(kept.read_bytes() if kept.is_file() else b"")
            if not config.set_timing_cache(timing, False):  # False: a cache of another GPU or release is refused
                timing = config.create_timing_cache(b"")
                config.set_timing_cache(timing, False)
        return config, timing


_ACTIONS = {"describe": describe, "parse": parse, "build": build, "inspect": inspect, "scratch": scratch}


def main() -> None:
    """Runs one job."""
    # TensorRT and its libraries print to fd 1, which would break the protocol.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(event: str, values: Mapping[str, Any]) -> None:
        answers.write(json.dumps({"event": event, **values}) + "\n")

    try:
        api = load_tensorrt(job["flavour"])
        check_names(api)
        if limit := job.get("memory_limit"):
            # RLIMIT_DATA counts private writable memory; RLIMIT_AS would count the address space that CUDA reserves.
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        say("result", _ACTIONS[job["action"]](api, job, say))
    except EdgeError as error:
        say("failure", {"kind": type(error).__name__, "message": error.message, "action": error.action})
    answers.flush()


def check_names(api: TensorRt) -> None:
    """Raises DeviceError for a release that lacks something that building uses."""
    missing = missing_calls(api.module, BUILD_CALLS)
    if api.rtx:
        missing += missing_calls(api.module, RTX_BUILD_CALLS)
    if missing:
        raise DeviceError(
            f"{api.flavour} {api.version} has no {', '.join(missing)}.",
            "Use a release that pixano-edge was tested with.",
        )


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(3)


if __name__ == "__main__":
    main()
