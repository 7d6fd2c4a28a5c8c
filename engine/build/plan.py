"""What to build: which variant of which graph, with which TensorRT, for which GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bundle import Bundle
from ..bundle.manifest import PRECISIONS, GraphVariant
from ..contracts.base import GraphSpec
from ..errors import BundleError, DeviceError, EdgeError, MissingDependencyError
from ..runtime.base import DeviceInfo
from . import library
from .builder import run_child
from .key import (
    AMPERE_PLUS,
    HARDWARE_LEVELS,
    SAME_CAPABILITY,
    TENSORRT,
    TENSORRT_RTX,
    VERSION_COMPATIBLE,
    Box,
    EngineKey,
)
from .profiles import profiles
from .targets import capabilities_of, check_targets, parse_targets, target_name

RECIPE = 1
"""Raised when this package builds differently from the same graph and flags, so that older engines are built anew."""
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT for RTX 1.7 builds for; asked of the library itself where it is installed."""


@dataclass(frozen=True)
class Options:
    """How to build.

    Attributes:
        memory_limit: Most private memory of the builder in bytes; None for no limit.
        workspace: Most device memory that a tactic may use, in bytes; None for TensorRT's own limit.
        version_compatible: The engine shall run on newer releases too (full TensorRT).
        hardware_compatible: None, ``ampere_plus`` or ``same_compute_capability`` (full TensorRT).
        tf32: Let fp32 products use TF32 (10-bit factors).
    """

    memory_limit: int | None = None
    workspace: int | None = None
    version_compatible: bool = False
    hardware_compatible: str | None = None
    tf32: bool = False

    def flags(self) -> tuple[str, ...]:
        """Those that change the engine, for its key."""
        found = [f"recipe={RECIPE}"]
        if self.version_compatible:
            found.append(VERSION_COMPATIBLE)
        if self.hardware_compatible:
            found.append(f"hardware_compatible={self.hardware_compatible}")
        if self.tf32:
            found.append("tf32")
        if self.workspace:
            found.append(f"workspace={self.workspace}")
        return tuple(sorted(found))


@dataclass(frozen=True)
class Target:
    """A TensorRT and the GPUs to build for.

    Attributes:
        flavour: ``tensorrt`` or ``tensorrt_rtx``.
        version: Full version of the library.
        cuda_major: CUDA that it was made for; None where nothing tells.
        capabilities: Compute capabilities that one engine serves.
        box: The GPU of this machine where the engine is tuned to it (full TensorRT), else None.
    """

    flavour: str
    version: str
    cuda_major: int | None
    capabilities: tuple[str, ...]
    box: Box | None = None

    def __str__(self) -> str:
        where = self.box.device_name if self.box else ", ".join(map(target_name, self.capabilities))
        return f"{self.flavour} {self.version} for {where}"


@dataclass(frozen=True)
class Choice:
    """The file that a graph is built from.

    Attributes:
        graph: Name of the graph.
        variant: Name of the variant in the manifest.
        precision: Of the variant.
        target: ``tensorrt`` when it was prepared for TensorRT, ``onnx`` for the plain graph.
        file: Path inside the bundle.
        sha256: Of the file.
        spec: Contract.
    """

    graph: str
    variant: str
    precision: str
    target: str
    file: str
    sha256: str
    spec: GraphSpec


def choices(bundle: Bundle, graph: str, precision: str) -> list[Choice]:
    """Variants of a graph in a precision (or with that name), the one prepared for TensorRT first; may be empty.

    Raises:
        BundleError: No such graph.
    """
    found = [
        Choice(
            graph,
            name,
            v.precision,
            v.target,
            v.file,
            bundle.manifest.files[v.file].sha256,
            bundle.spec(graph, v.precision, v.target),
        )
        for name, v in _variants(bundle, graph).items()
        if precision in (name, v.precision)
    ]
    return sorted(found, key=lambda c: (c.target != "tensorrt", c.variant != precision))


def _variants(bundle: Bundle, graph: str) -> Mapping[str, GraphVariant]:
    held = bundle.manifest.graphs.get(graph)
    if held is None or graph not in bundle.specs:
        raise BundleError(
            f"Bundle '{bundle.manifest.name}' has no graph '{graph}'.", f"Known: {', '.join(sorted(bundle.specs))}."
        )
    return {name: variant for name, variant in held.variants.items() if not variant.onnxruntime_only}


def choose(bundle: Bundle, graphs: Sequence[str] = (), precisions: Sequence[str] = ()) -> list[Choice]:
    """What to build from a bundle: of each graph one variant per precision.

    Args:
        bundle: Open bundle.
        graphs: Names; every graph of the family if empty.
        precisions: Precisions or names of variants; all that a graph has if empty.

    Raises:
        BundleError: No such graph, or a graph lacks a precision that was asked for.
    """
    result: dict[tuple[str, str], Choice] = {}
    for graph in graphs or bundle.specs:
        held = _variants(bundle, graph)
        wanted = list(precisions) or [p for p in PRECISIONS if any(v.precision == p for v in held.values())]
        for precision in dict.fromkeys(wanted):
            found = choices(bundle, graph, precision)
            if not found:
                known = ", ".join(sorted(f"{name} ({v.precision})" for name, v in held.items()))
                why, action = _in_onnxruntime_alone(bundle, graph, precision)
                raise BundleError(
                    f"Graph '{graph}' of bundle '{bundle.manifest.name}' has no variant '{precision}'"
                    f"{f' for TensorRT: {why}' if why else ''}.",
                    f"{action} Known: {known}.".strip(),
                )
            result[graph, found[0].variant] = found[0]
    return list(result.values())


def left_out(bundle: Bundle, graphs: Sequence[str] = ()) -> list[str]:
    """Precisions that `choose` passes over where none is named, since they run in ONNX Runtime alone, with the reason.

    Raises:
        BundleError: No such graph.
    """
    found = []
    for graph in graphs or bundle.specs:
        built = {v.precision for v in _variants(bundle, graph).values()}
        for precision in PRECISIONS:
            if precision not in built and any(
                v.precision == precision for v in bundle.manifest.graphs[graph].variants.values()
            ):
                why, action = _in_onnxruntime_alone(bundle, graph, precision)
                found.append(f"{graph} in {precision} is not built: {why}. {action}")
    return found


def _in_onnxruntime_alone(bundle: Bundle, graph: str, precision: str) -> tuple[str, str]:
    """Why a graph has nothing to build an engine from in a precision (or a variant of that name), and what helps; both
    empty where it has no such variant at all."""
    held = [v for name, v in bundle.manifest.graphs[graph].variants.items() if precision in (name, v.precision)]
    if not held:
        return "", ""
    if held[0].precision == "int4":
        return (
            "the decoder's 4-bit weights are multiplied by an operator of ONNX Runtime's own, MatMulNBits",
            "Build fp16, or calibrate int8: pixano-edge calibrate <bundle> --data <pictures> --precision int8 "
            "--in-place.",
        )
    full = [g.variants for g in bundle.manifest.graphs.values() if "fp32" in g.variants]
    lacking = any(variants["fp32"].onnxruntime_only and "fp32-tensorrt" not in variants for variants in full)
    first = "Export the bundle again, with a decoder for TensorRT. " if lacking else ""
    name = "" if precision == held[0].precision else f" --name {precision}"
    return (
        "the decoder computes with operators of ONNX Runtime's own, such as GroupQueryAttention, and was calibrated "
        "without a form for TensorRT",
        f"{first}Calibrate it again, which makes one: pixano-edge calibrate <bundle> --data <pictures> --precision "
        f"{held[0].precision}{name} --in-place.",
    )


def find_target(
    targets: Sequence[str], flavour: str | None, device: Callable[[], DeviceInfo], options: Options
) -> Target:
    """Decides which TensorRT builds, and for which GPUs.

    With `targets` TensorRT for RTX builds ahead of time, one engine for all of them: a further GPU adds some
    kilobytes, since the kernels are compiled on the user's machine. Without, the GPU of this machine is meant, and
    full TensorRT goes first where both are installed.

    Args:
        targets: Such as ``sm_86``; empty for the GPU of this machine.
        flavour: ``tensorrt`` or ``tensorrt_rtx``; None to choose.
        device: Describes the GPU of this machine; raises EdgeError where there is none.
        options: Refused here where the flavour does not have them.

    Raises:
        DeviceError: No GPU, one that cannot be built for, or an option that the flavour does not have.
        MissingDependencyError: The TensorRT that is needed is not installed.
    """
    capabilities = parse_targets(targets)
    here = library.installed()
    if capabilities:
        if flavour == TENSORRT:
            raise DeviceError(
                "Full TensorRT builds for the GPU of the machine that it runs on alone, not for a list of targets.",
                "Leave out --target on that machine, or use TensorRT for RTX for the GPUs that it knows.",
            )
        if TENSORRT_RTX not in here:
            check_targets(capabilities, RTX_CAPABILITIES, "1.7")
            raise _absent(TENSORRT_RTX, "Building for listed GPUs")
        return _rtx(capabilities, options)
    wanted = [flavour] if flavour else here
    if not wanted or wanted[0] not in here:
        raise _absent(flavour or TENSORRT, "Building engines")
    try:
        info = device()
        box = Box.of(info, wanted[0], "", None)
    except EdgeError as error:
        install = f"{error.action} Or name" if isinstance(error, MissingDependencyError) else "Name"
        raise DeviceError(
            f"There is no GPU here to build for: {error.message}",
            f"{install} GPUs with --target (for example --target sm_86,sm_89): TensorRT for RTX builds for them "
            "without a GPU. Full TensorRT needs the GPU that the engine is for, so run this command on that machine.",
        ) from error
    if wanted[0] == TENSORRT_RTX:
        return _rtx([box.compute_capability], options)
    if options.hardware_compatible not in (None, *HARDWARE_LEVELS):
        raise DeviceError(
            f"Hardware compatibility '{options.hardware_compatible}' is not known.",
            f"Use {' or '.join(HARDWARE_LEVELS)}.",
        )
    version = run_child({"action": "describe", "name": "TensorRT", "flavour": TENSORRT})["version"]
    major = library.cuda_major(TENSORRT)
    box = Box.of(info, TENSORRT, version, major)
    return Target(TENSORRT, version, major, (box.compute_capability,), box)


def make_key(choice: Choice, target: Target, options: Options) -> EngineKey:
    """The key of the engine that a choice becomes."""
    flags = options.flags()
    portable = target.box is None or bool({AMPERE_PLUS, SAME_CAPABILITY} & set(flags))
    return EngineKey(
        graph=choice.graph,
        graph_sha256=choice.sha256,
        variant=choice.variant,
        precision=choice.precision,
        profiles=profiles(choice.spec),
        flags=flags,
        flavour=target.flavour,
        version=target.version,
        cuda_major=target.cuda_major,
        compute_capabilities=target.capabilities,
        device_name=None if portable or target.box is None else target.box.device_name,
        sm_count=None if portable or target.box is None else target.box.sm_count,
    )


def _rtx(capabilities: Sequence[str], options: Options) -> Target:
    if options.version_compatible or options.hardware_compatible:
        raise DeviceError(
            "TensorRT for RTX has no version- or hardware-compatible engines.",
            "Leave the option out: one engine serves every GPU named by --target, and is built again for another "
            "release of TensorRT for RTX.",
        )
    answer: dict[str, Any] = run_child(
        {"action": "describe", "name": "TensorRT for RTX", "flavour": TENSORRT_RTX},
    )
    known = capabilities_of(answer["compute_capabilities"])
    check_targets(capabilities, known, answer["version"])
    return Target(TENSORRT_RTX, answer["version"], library.cuda_major(TENSORRT_RTX), tuple(capabilities))


def _absent(flavour: str, purpose: str) -> MissingDependencyError:
    return MissingDependencyError(flavour, library.EXTRAS[flavour], purpose)
