"""Opening a bundle: which back end and precision run on a device, proven by the bundle's golden samples there.

What ``auto`` picks:

- On a CPU: ONNX Runtime with fp32. That combination is what the exporter compared with PyTorch, on a CPU too, and
  reduced precisions are not faster on every CPU.
- On a GPU: the first of `GPU_ORDER` that the bundle and this machine have and whose golden samples pass on this very
  device. The order is that of speed on GPUs with tensor cores; it is fixed, not measured at opening.

The first load of a combination on a new device runs the golden samples and keeps the verdict (`VerdictStore`). One
that failed, there or in `pixano-edge verify`, is not used again: asked for by name it is an error unless forced,
``auto`` takes the next one and says so in ``info()["warnings"]``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..bundle.manifest import PRECISIONS
from ..contracts.base import GraphSpec
from ..contracts.decoder import DECODER
from ..errors import BundleError, ContractError, DeviceError, DeviceMemoryError, EdgeError, MissingDependencyError
from ..libraries import ORT_WHEELS, SYSTEM, module_version
from ..machine import cpu_model
from ..runtime.base import Device, DeviceInfo, Session
from ..runtime.ort_providers import OPENVINO, stored_precision
from .calibrated import calibration_text, calibrations_of
from .verdicts import Verdict, VerdictKey, VerdictStore

ONNXRUNTIME = "onnxruntime"
TENSORRT = "tensorrt"

GPU_ORDER = (
    (TENSORRT, "fp16"),
    (TENSORRT, "bf16"),
    (ONNXRUNTIME, "fp16"),
    (ONNXRUNTIME, "bf16"),
    (TENSORRT, "fp32"),
    (ONNXRUNTIME, "fp32"),
)
"""Fastest first. int8 and int4 are not here, calibrated or not: they cost accuracy, so they run when asked for."""

_PLUGINS = {
    OPENVINO: ("onnxruntime_ep_openvino", ("onnxruntime-ep-openvino",)),
    "onnxruntime-tensorrt-rtx": ("onnxruntime_ep_nv_tensorrt_rtx", ("onnxruntime-ep-nv-tensorrt-rtx-cu13",)),
}
"""Module and wheels of the plug-ins of ONNX Runtime."""
_TENSORRT_WHEELS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx", "tensorrt-rtx-cu13-bindings")
_CANNOT_RUN = (BundleError, ContractError, DeviceError, MissingDependencyError)
"""Why a combination is passed over by ``auto``; anything else ends the opening."""


@dataclass(frozen=True)
class Asked:
    """What a model's `open` was asked for; see `Sam2ImagePredictor.open`."""

    device: str = "auto"
    backend: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    force: bool = False
    prove: bool = True


@dataclass(frozen=True)
class Combination:
    """A back end and a precision, with the files that it runs by graph.

    Attributes:
        engine: Name, size and time of files built on this machine, or the CPU that OpenVINO compiles the bundle's own
            files for; else empty.
    """

    backend: str
    precision: str
    files: dict[str, Path] = field(default_factory=dict)
    engine: str = ""

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"


@dataclass
class _Attempt:
    """One opening: what is fixed, and what was learnt on the way."""

    bundle: Bundle
    asked: Asked
    specs: Mapping[str, GraphSpec]
    store: VerdictStore
    check: Callable[[], None]
    capture: bool
    warnings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class OpenedGraphs:
    """Graphs of a bundle, open on one device.

    Attributes:
        sessions: By graph name.
        precision: Variant that they run.
        description: Bundle, reason and warnings, for a model's `info`.
        opened: Closes sessions and device; the model takes it over.
    """

    sessions: dict[str, Session]
    precision: str
    description: dict[str, Any]
    opened: contextlib.ExitStack


def open_family(bundle: Bundle | Path | str, *families: str) -> Bundle:
    """The open bundle; raises BundleError when it holds none of the families."""
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    if bundle.manifest.family not in families:
        raise BundleError(
            f"Bundle '{bundle.manifest.name}' holds '{bundle.manifest.family}', not '{' or '.join(families)}'.",
            "Open it with its own model class.",
        )
    return bundle


def open_graphs(
    bundle: Bundle,
    asked: Asked,
    specs: Mapping[str, GraphSpec],
    *,
    check: Callable[[], None] | None = None,
    capture: bool = True,
    verdicts: VerdictStore | None = None,
) -> OpenedGraphs:
    """Opens graphs of a bundle in the asked combination, or in the fastest one that is proven.

    Args:
        bundle: Where they are.
        asked: What the user wants.
        specs: The graphs by name; all of them run in one combination on one device object.
        check: Called between the steps; what it raises ends the opening and closes what is open.
        capture: Whether back ends may record launches themselves.
        verdicts: Where verdicts are kept; None for the user's own store.

    Raises:
        BundleError, DeviceError, ContractError: See `Sam2ImagePredictor.open`.
    """
    from ..runtime import open_device

    _check_precision(bundle, asked)
    attempt = _Attempt(bundle, asked, specs, verdicts or VerdictStore(), check or _nothing, capture)
    with contextlib.ExitStack() as opened:
        on = open_device(asked.device)
        opened.callback(on.close)
        if asked.force and on.kind != "cpu" and "auto" in (asked.backend, asked.precision):
            raise DeviceError("'force' does not say which combination.", "Give a back end and a precision with it.")
        try:
            chosen, reason, sessions = _choose(attempt, on, opened)
        except DeviceMemoryError:
            raise
        except _CANNOT_RUN as error:
            if asked.device != "auto" or on.kind == "cpu" or asked.backend == TENSORRT:
                raise
            attempt.warnings.append(f"The CPU runs instead of {on.name}: {error.message}")
            opened.close()
            on = open_device("cpu")
            opened.callback(on.close)
            chosen, reason, sessions = _choose(attempt, on, opened)
        own = takes_cpu_graphs(chosen.backend, chosen.precision, on.kind)
        description = {
            "bundle": bundle.manifest.name,
            "architecture": bundle.manifest.source.architecture,
            "precision_reason": reason,
            "cpu_graphs": sorted(bundle.manifest.cpu_graphs) if own else [],
            "left_out": attempt.left_out,
            "warnings": [*attempt.warnings, *attempt.store.warnings],
        }
        return OpenedGraphs(sessions, chosen.precision, description, opened.pop_all())


def combinations(bundle: Bundle, kind: str, backend: str = "auto", precision: str = "auto") -> list[tuple[str, str]]:
    """Back ends and precisions to try on a kind of device (``cpu``, ``cuda``), the fastest first.

    Raises:
        BundleError: The bundle has no such precision.
        DeviceError: TensorRT was asked for on a CPU.
    """
    if kind == "cpu" and backend == TENSORRT:
        raise DeviceError("TensorRT needs a CUDA device.", "Use --device cuda:0, or --backend onnxruntime.")
    onnx = bundle.variants()
    known = {ONNXRUNTIME: onnx, TENSORRT: _precisions(bundle), OPENVINO: _through_openvino(bundle)}
    if kind == "cpu":
        # fp32 first; a bundle without it has one precision that can run here, the fullest.
        order = [(ONNXRUNTIME, "fp32")] if "fp32" in onnx else [(ONNXRUNTIME, p) for p in onnx[:1]]
    else:
        order = list(GPU_ORDER)
    if backend != "auto":
        order = [(backend, p) for b, p in order if b == backend] or [(backend, p) for p in onnx[:1]]
    if precision != "auto":
        order = list(dict.fromkeys((b, precision) for b, _ in order))
    return [(b, p) for b, p in order if p in known.get(b, onnx)]


def combination_key(bundle: Bundle, combination: Combination, info: DeviceInfo) -> VerdictKey:
    """The key of a combination's verdict on a device, for whoever stores or looks up one."""
    version = backend_version(combination.backend)
    return VerdictKey.of(
        bundle.hash, combination.precision, combination.backend, version, info, engine=combination.engine
    )


def locate(bundle: Bundle, backend: str, precision: str, info: DeviceInfo, graphs: Collection[str]) -> Combination:
    """The files that a combination runs on a device.

    Raises:
        BundleError, DeviceError: There is none; for TensorRT, no engine was built for this device.
        MissingDependencyError: TensorRT is not installed.
    """
    if backend != TENSORRT:
        files = {g: graph_file(bundle, g, backend, precision, info.kind) for g in graphs}
        # What it computes depends on the CPU, where a plain ONNX Runtime's figures are those of the export.
        return Combination(backend, precision, files, cpu_model() if backend == OPENVINO else "")
    from ..build.locate import find_engine

    files = {g: Path(find_engine(bundle, g, precision, info)) for g in graphs}
    facts = [(path.name, path.stat()) for path in files.values()]
    engine = ", ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in facts)
    return Combination(backend, precision, files, engine)


def graph_file(bundle: Bundle, graph: str, backend: str, precision: str, kind: str) -> Path:
    """The ONNX file of a graph that a combination runs on a kind of device; the one made for CPUs where there is one.

    Raises:
        BundleError: The bundle has no such graph or precision.
    """
    stored = stored_precision(backend, precision, bundle.variants())
    plain = bundle.graph_path(graph, stored, target_of(bundle, graph, backend, precision, kind))
    fitted = bundle.cpu_graph(graph) if takes_cpu_graphs(backend, precision, kind) else None
    return plain if fitted is None else fitted[0]


def target_of(bundle: Bundle, graph: str, backend: str, precision: str, kind: str) -> str:
    """The target of the variant that a combination runs on a kind of device: ``onnx`` or ``tensorrt``.

    A decoder's attention for ONNX Runtime is an operator that its CUDA provider has in half precision alone, and
    OpenVINO not at all. There they run the decoder of plain operators, which is in the bundle for TensorRT.
    """
    if backend == TENSORRT:
        return TENSORRT
    if graph != DECODER or not (backend == OPENVINO or (backend == ONNXRUNTIME and kind == "cuda")):
        return "onnx"
    stored = stored_precision(backend, precision, bundle.variants())
    if stored == "fp16" and backend == ONNXRUNTIME:
        return "onnx"
    variants = bundle.manifest.graphs[graph].variants.items()
    return TENSORRT if any(v.target == TENSORRT and stored in (name, v.precision) for name, v in variants) else "onnx"


def takes_cpu_graphs(backend: str, precision: str, kind: str) -> bool:
    """Whether a combination runs a bundle's `cpu_graphs`: ONNX Runtime's own CPU provider in fp32."""
    return (backend, precision, kind) == (ONNXRUNTIME, "fp32", "cpu")


def session_options(bundle: Bundle, backend: str, precision: str) -> dict[str, Any]:
    """What sessions of a combination are opened with, see `OrtOptions`."""
    return {} if stored_precision(backend, precision, bundle.variants()) == precision else {"precision": precision}


def _through_openvino(bundle: Bundle) -> list[str]:
    onnx = bundle.variants()
    return [p for p in PRECISIONS if p in onnx or (p == "bf16" and "fp32" in onnx)]


def backend_version(backend: str) -> str:
    """Version of an installed back end; empty where it is absent or unknown."""
    if backend in _PLUGINS:
        return f"{backend_version(ONNXRUNTIME)}, {module_version(*_PLUGINS[backend]) or 'unknown'}"
    if backend == "onnxruntime-tensorrt":
        return f"{backend_version(ONNXRUNTIME)}, {backend_version(TENSORRT) or 'unknown'}"
    if backend == ONNXRUNTIME:
        version = module_version("onnxruntime", ORT_WHEELS)
        if version == SYSTEM:  # a build without a wheel tells its version itself
            import onnxruntime

            version = str(getattr(onnxruntime, "__version__", SYSTEM))
        return version or ""
    if backend == TENSORRT:
        for module in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
            if version := module_version(module, _TENSORRT_WHEELS):
                return version
    return ""


def _choose(attempt: _Attempt, on: Device, opened: contextlib.ExitStack) -> tuple[Combination, str, dict[str, Session]]:
    """Opens the first combination that may run on a device: what it is, why, and its sessions, closed by `opened`."""
    asked, info, name = attempt.asked, on.info(), attempt.bundle.manifest.name
    failures: list[tuple[str, EdgeError]] = []
    unbuilt: list[tuple[str, EdgeError]] = []
    for backend, precision in combinations(attempt.bundle, on.kind, asked.backend, asked.precision):
        attempt.check()
        try:
            found = locate(attempt.bundle, backend, precision, info, list(attempt.specs))
        except _CANNOT_RUN as error:  # nothing failed: there is no engine, or no TensorRT
            unbuilt.append((f"{backend} {precision}", error))
            continue
        try:
            proof = _prove(attempt, found, info)
            sessions = _open_sessions(attempt, found, on, opened)
        except DeviceMemoryError:
            raise  # another way to run needs memory too; whoever asked may make room and try again
        except _CANNOT_RUN as error:
            failures.append((str(found), error))
            continue
        attempt.warnings += [f"{what} is not used: {error.message}" for what, error in failures]
        attempt.left_out += [f"{what}: {error.message}" for what, error in unbuilt]
        if "auto" not in (asked.backend, asked.precision) or asked.precision == precision:
            return found, f"asked for; {proof}", sessions
        if on.kind == "cpu":
            why = "the variant proven equal to the original" if precision == "fp32" else "the fullest of this bundle"
            return found, f"auto: {precision} is {why}; {proof}", sessions
        return found, f"auto: {found} is the fastest that runs here; {proof}", sessions
    tried = unbuilt + failures
    if not tried:
        raise BundleError(
            f"Bundle '{name}' has no precision that is taken on {on.name} by itself.", "Ask for one by its name."
        )
    if len(tried) == 1:
        raise tried[0][1]
    words = "; ".join(f"{what}: {error.message}" for what, error in tried)
    raise DeviceError(f"No way to run '{name}' on {on.name} works. {words}", tried[-1][1].action)


def _prove(attempt: _Attempt, found: Combination, info: DeviceInfo) -> str:
    """Makes sure that a combination may run on a device and says why; runs the golden samples at the first time.

    Raises:
        DeviceError: It failed, here and now or before, and is not forced.
    """
    bundle, asked, store = attempt.bundle, attempt.asked, attempt.store
    if not asked.prove:
        return "not checked before"
    key = combination_key(bundle, found, info)
    verdict = store.get(key)
    if verdict is None:
        if (info.kind, found.backend) == ("cpu", ONNXRUNTIME):
            if calibrations := calibrations_of(bundle.manifest, found.precision):
                return calibration_text(calibrations)
            parity = bundle.manifest.parity
            return "checked at export" if parity is not None and parity.passed else "no parity report"
        if not bundle.golden():
            attempt.warnings.append(f"{found} was never checked on {info.name}: the bundle has no golden samples.")
            return "never checked here"
        from .verify import verify_bundle

        report = verify_bundle(
            bundle,
            "cpu" if info.kind == "cpu" else f"{info.kind}:{info.index}",
            found.backend,
            found.precision,
            threads=asked.threads,
            progress=lambda done, of: attempt.check(),
        )
        verdict = Verdict.of(key, report)
        store.put(verdict)
    if not verdict.passed:
        if not (asked.force or verdict.forced):
            raise DeviceError(
                f"{found} {verdict.text()} on {info.name}.",
                "Take another --backend or --precision, or --force to use it all the same; 'pixano-edge verify' shows "
                "every figure.",
            )
        attempt.warnings.append(f"{found} runs because it was forced: on {info.name} it {verdict.text()}.")
    return verdict.text()


def _open_sessions(
    attempt: _Attempt, found: Combination, on: Device, opened: contextlib.ExitStack
) -> dict[str, Session]:
    from ..runtime import open_session

    options = session_options(attempt.bundle, found.backend, found.precision) or None
    if found.backend == TENSORRT and not attempt.capture:
        options = {"graphs": False}
    sessions: dict[str, Session] = {}
    with contextlib.ExitStack() as own:
        for name in attempt.specs:
            attempt.check()
            spec = spec_of(attempt.bundle, name, found, attempt.specs[name], on.kind)
            file = found.files[name]
            sessions[name] = open_session(
                file,
                spec,
                on,
                backend=found.backend,
                threads=attempt.asked.threads,
                options=options,
                weight_bytes=attempt.bundle.weight_bytes(file),
            )
            own.callback(sessions[name].close)
        opened.enter_context(own.pop_all())
    return sessions


def spec_of(bundle: Bundle, graph: str, found: Combination, asked: GraphSpec, kind: str) -> GraphSpec:
    """The contract of a graph in a combination on a kind of device: `asked`, unless the family's graphs differ by
    precision and target."""
    if bundle.specs.get(graph) != asked:
        return asked
    stored = stored_precision(found.backend, found.precision, bundle.variants())
    return bundle.spec(graph, stored, target_of(bundle, graph, found.backend, found.precision, kind))


def _precisions(bundle: Bundle) -> list[str]:
    """Precisions that every graph has for TensorRT, changed for it or not, from full to reduced."""
    held = [
        {v.precision for v in graph.variants.values() if not v.onnxruntime_only}
        for graph in bundle.manifest.graphs.values()
    ]
    return [p for p in PRECISIONS if all(p in precisions for precisions in held)]


def _check_precision(bundle: Bundle, asked: Asked) -> None:
    """Raises BundleError for a precision that no graph variant has."""
    onnx = _through_openvino(bundle) if asked.backend == OPENVINO else bundle.variants()
    tensorrt = _precisions(bundle)
    known = [
        p
        for p in PRECISIONS
        if (p in onnx and asked.backend != TENSORRT) or (p in tensorrt and asked.backend in ("auto", TENSORRT))
    ]
    if asked.precision not in ("auto", *known):
        raise BundleError(
            f"Bundle '{bundle.manifest.name}' has no precision '{asked.precision}' for every graph.", f"Known: {known}."
        )


def _nothing() -> None:
    """Stands for an absent `check`."""
