"""Builds the engines of a bundle, or takes them from the cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import BuildError, DeviceError
from ..libraries import DISTRIBUTION, installed_version
from ..runtime.engine_file import SCRATCH, SCRATCH_REASON, read_header
from ..runtime.gpu_info import cuda_facts
from .builder import Progress, check_problems, run_child
from .cache import EngineCache
from .key import EngineKey
from .plan import Choice, Options, Target, make_key
from .profiles import profiles
from .report import LayerReport, make_report, stored_reasons
from .targets import member_name


@dataclass(frozen=True)
class Built:
    """One engine, new or from the cache.

    Attributes:
        choice: What it was built from.
        key: Its key.
        path: The engine file.
        cached: Whether it was there already.
        engine_bytes: Size of the engine.
        seconds: What the build took, then or now.
        peak_memory_bytes: Most resident memory of the builder; None where it was not measured.
        warnings: TensorRT's, of the build.
    """

    choice: Choice
    key: EngineKey
    path: Path
    cached: bool
    engine_bytes: int
    seconds: float
    peak_memory_bytes: int | None
    warnings: tuple[str, ...]


def build_engines(
    bundle: Bundle,
    wanted: Sequence[Choice],
    target: Target,
    options: Options,
    cache: EngineCache,
    *,
    rebuild: bool = False,
    started: Callable[[int, Choice], None] | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] | None = None,
) -> Iterator[Built]:
    """Yields each engine as soon as it is there. One that was finished stays in the cache whatever comes after.

    Args:
        bundle: Where the graphs are; its files were checked when it was opened.
        wanted: From `choose`.
        target: From `find_target`.
        options: How.
        cache: Where engines are looked up and kept.
        rebuild: Build also what is there.
        started: Called with number and choice before each engine.
        progress: Gets the events of a build.
        check: Called several times per second; what it raises ends the build.

    Raises:
        BuildError, DeviceError, MissingDependencyError, BundleError: See `run_child` and `EngineCache.put`.
    """
    for number, choice in enumerate(wanted):
        if check is not None:
            check()
        if started is not None:
            started(number, choice)
        key = make_key(choice, target, options)
        path = None if rebuild else cache.get(key)
        cached = path is not None
        if path is None:
            path = _build(bundle, choice, key, target, options, cache, progress, check)
        facts = read_header(path)
        yield Built(
            choice,
            key,
            path,
            cached,
            facts.engine_bytes,
            float(facts.facts.get("seconds", 0.0)),
            facts.facts.get("peak_memory_bytes"),
            tuple(facts.facts.get("warnings", ())),
        )


def report_layers(bundle: Bundle, choice: Choice, flavour: str) -> LayerReport:
    """Parses a graph and reports its layers; builds nothing and needs no GPU with TensorRT for RTX.

    Raises:
        BuildError, DeviceError, MissingDependencyError: See `run_child`.
    """
    job = job_for(choice, bundle.root / choice.file) | {"action": "parse", "flavour": flavour}
    answer = run_child(job)
    check_problems(job, answer)
    reasons = stored_reasons(bundle, choice.graph, choice.variant)
    return make_report(answer["layers"], choice.graph, choice.variant, choice.precision, reasons)


def inspect_engine(path: Path) -> dict[str, Any]:
    """TensorRT's own account of an engine: the inspector's JSON, with fused layers, tactics and formats.

    Raises:
        BundleError: Not an engine file, or damaged.
        DeviceError: No GPU or driver here, or not the engine's.
        BuildError: The child ended without an answer.
    """
    header = read_header(path)
    job = {"action": "inspect", "name": str(header.key.get("graph")), "flavour": header.flavour, "file": str(path)}
    answer: dict[str, Any] = run_child(job)["engine"]
    return answer


def job_for(choice: Choice, file: Path) -> dict[str, Any]:
    """The part of a child's job that says what to build."""
    return {
        "name": choice.graph,
        "file": str(file),
        "spec": asdict(choice.spec),
        "profiles": profiles(choice.spec),
    }


def _build(
    bundle: Bundle,
    choice: Choice,
    key: EngineKey,
    target: Target,
    options: Options,
    cache: EngineCache,
    progress: Progress | None,
    check: Callable[[], None] | None,
) -> Path:
    timing = cache.timing_path(target.box) if target.box is not None else None
    with cache.work_folder() as work:
        output, timed = work / "engine", work / "timing"
        job = job_for(choice, bundle.root / choice.file) | {
            "action": "build",
            "flavour": target.flavour,
            "flags": {
                "tf32": options.tf32,
                "version_compatible": options.version_compatible,
                "hardware_compatible": options.hardware_compatible,
            },
            "compute_capabilities": [member_name(c) for c in target.capabilities],
            "workspace": options.workspace,
            "memory_limit": options.memory_limit,
            "output": str(output),
            "timing_input": None if timing is None else str(timing),
            "timing_output": None if timing is None else str(timed),
        }
        answer = run_child(job, progress=progress, check=check)
        check_problems(job, answer)
        facts = {
            "seconds": round(answer["seconds"], 3),
            "peak_memory_bytes": answer["peak_memory_bytes"],
            "warnings": answer["warnings"][:20],
            "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            DISTRIBUTION: installed_version(DISTRIBUTION) or "unknown",
            "bundle": bundle.manifest.name,
            "built_from": choice.target,
            **_scratch(choice, target, options, output, check),
        }
        path = cache.put(key, output, facts)
        if timing is not None and timed.is_file():
            timing.parent.mkdir(parents=True, exist_ok=True)
            os.replace(timed, timing)
        return path


def _scratch(
    choice: Choice, target: Target, options: Options, engine: Path, check: Callable[[], None] | None
) -> dict[str, Any]:
    """What the header says about the engine's scratch memory: bytes per profile, or None and why it is not known.

    Read in a process of its own, after the build: an engine that does not open here is as good as one that does.
    """
    if target.box is None and not any(gpu.compute_capability in target.capabilities for gpu in cuda_facts()[0]):
        made_for = " or ".join(target.capabilities)
        return {SCRATCH: None, SCRATCH_REASON: f"built without a GPU of compute capability {made_for} to open it on"}
    job = {
        "action": "scratch",
        "name": choice.graph,
        "flavour": target.flavour,
        "file": str(engine),
        "host_code": options.version_compatible,
    }
    try:
        return {SCRATCH: run_child(job, check=check)[SCRATCH]}
    except (BuildError, DeviceError) as error:  # not CancelledError: that ends the build
        return {SCRATCH: None, SCRATCH_REASON: error.message}
