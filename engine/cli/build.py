"""`pixano-edge build`: TensorRT engines of a bundle, for this machine's GPU or ahead of time for listed ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BundleError, DeviceError
from ..machine import memory
from .options import open_bundle
from .output import JsonOption, Steps, bytes_text, note, print_json, print_table, progress

if TYPE_CHECKING:
    from ..build.engines import Built
    from ..build.plan import Choice, Target
    from ..build.report import LayerReport
    from ..bundle import Bundle
    from ..runtime.base import DeviceInfo

app = typer.Typer(rich_markup_mode="markdown")

SHARE = 0.9
"""Part of the free memory that the builder may use unless told otherwise."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PERCENT = 100


@app.command()
def build(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or a name in the local store.")],
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="GPUs to build for ahead of time, as sm_86,sm_89 (TensorRT for RTX)."),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option("--precision", "-p", help="fp32, fp16, ... or a variant's name; default: all.")
    ] = None,
    graph: Annotated[list[str] | None, typer.Option("--graph", "-g", help="Graph to build; default: all.")] = None,
    flavour: Annotated[str, typer.Option(help="auto, tensorrt or tensorrt-rtx, where both are installed.")] = "auto",
    device: Annotated[str, typer.Option(help="GPU to build for when no target is named.")] = "cuda",
    bundle_engines: Annotated[
        bool, typer.Option("--bundle-engines", help="Put the engines into the bundle, for a box that cannot build.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With --bundle-engines: make a copy of the bundle there.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Also for newer releases of TensorRT; slower.")
    ] = False,
    hardware_compatible: Annotated[
        str | None,
        typer.Option(help="Also for other GPUs: ampere-plus or same-compute-capability; slower."),
    ] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let fp32 products use TF32: faster, 10-bit factors.")] = False,
    memory_limit: Annotated[
        str | None, typer.Option(help="Most memory of the builder, as 6G; default: 90 % of what is free; 0: none.")
    ] = None,
    workspace: Annotated[str | None, typer.Option(help="Most GPU memory that a layer may work in, as 2G.")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build also what the cache has.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Show every layer with its precision, and why some stayed in fp32.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build TensorRT engines from the graphs of a bundle.

    Without --target, for the GPU of this machine. With it, ahead of time on any machine, through TensorRT for RTX.
    Engines are kept in a cache and found there when the bundle is run with --backend tensorrt.
    """
    from ..build.cache import EngineCache
    from ..build.engines import build_engines
    from ..build.pack import pack_engines
    from ..build.plan import Options, choose, find_target, left_out

    if output is not None and not bundle_engines:
        raise BundleError("--output is for --bundle-engines.", "Give both, or neither: engines go to the cache.")
    opened = open_bundle(bundle)
    wanted = choose(opened, graph or (), _parts(precision))
    options = Options(
        memory_limit=_limit(memory_limit),
        workspace=None if workspace is None else parse_size(workspace) or None,
        version_compatible=version_compatible,
        hardware_compatible=None if hardware_compatible is None else hardware_compatible.replace("-", "_"),
        tf32=tf32,
    )
    chosen = find_target(target or (), _flavour(flavour), lambda: describe_device(device), options)
    cache = EngineCache()
    with progress("Starting", _PERCENT * len(wanted), enabled=not as_json) as bar:
        steps = _Bar(bar)
        built = list(
            build_engines(
                opened, wanted, chosen, options, cache, rebuild=rebuild, started=steps.start, progress=steps.phase
            )
        )
    reports = _reports(opened, wanted, chosen, as_json) if report else []
    folder = pack_engines(opened, [b.path for b in built], output) if bundle_engines else None
    warnings = [*cache.warnings, *_warnings(built)]
    if not precision:
        warnings += left_out(opened, graph or ())
    if as_json:
        print_json(_result(chosen, built, reports, folder, warnings))
        return
    _print(chosen, built, reports)
    for text in warnings:
        note(f"Warning: {text}")
    typer.echo(f"Bundle with engines: {folder}" if folder is not None else f"Engines are in {cache.root}")


class _Bar:
    """One bar over all engines, which names the engine and what its builder is doing."""

    def __init__(self, bar: Steps) -> None:
        self._bar = bar
        self._number = 0
        self._name = ""
        self._shown = 0

    def start(self, number: int, choice: Choice) -> None:
        self._number, self._name = number, f"{choice.graph} {choice.variant}"
        self.phase("Starting", 0.0)

    def phase(self, name: str, fraction: float) -> None:
        done = int(_PERCENT * (self._number + fraction))
        self._bar.label(f"{self._name}: {name}")
        self._bar.step(max(0, done - self._shown))
        self._shown = max(self._shown, done)


def describe_device(name: str) -> DeviceInfo:
    """The facts of a GPU of this machine; raises EdgeError where there is none."""
    from ..runtime import open_device

    opened = open_device(name)
    try:
        return opened.info()
    finally:
        opened.close()


def parse_size(text: str) -> int:
    """``6G``, ``512M`` or plain bytes, as bytes.

    Raises:
        DeviceError: Something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise DeviceError(f"'{text}' is not a size.", "Write it as 6G or 512M.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _limit(text: str | None) -> int | None:
    if text is not None:
        return parse_size(text) or None
    free = memory()[1]
    return None if free is None else int(SHARE * free)


def _flavour(text: str) -> str | None:
    from ..build.key import FLAVOURS

    name = text.replace("-", "_")
    if name not in ("auto", *FLAVOURS):
        raise DeviceError(f"Unknown TensorRT flavour '{text}'.", "Use auto, tensorrt or tensorrt-rtx.")
    return None if name == "auto" else name


def _parts(values: Sequence[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def _reports(bundle: Bundle, wanted: Sequence[Choice], target: Target, quiet: bool) -> list[LayerReport]:
    from ..build.engines import report_layers

    found = []
    with progress("Reading layers", len(wanted), enabled=not quiet) as bar:
        for choice in wanted:
            found.append(report_layers(bundle, choice, target.flavour))
            bar.step()
    return found


def _warnings(built: Sequence[Built]) -> list[str]:
    said = {f"TensorRT on {b.choice.graph} {b.choice.variant}: {text}" for b in built for text in b.warnings}
    plain = [f"{b.choice.graph} {b.choice.variant}" for b in built if b.choice.target != "tensorrt"]
    if plain:
        said.add(f"The bundle has no graph prepared for TensorRT for {', '.join(plain)}; the plain one was built.")
    return sorted(said)


def _result(
    target: Target, built: Sequence[Built], reports: Sequence[LayerReport], folder: Path | None, warnings: list[str]
) -> dict[str, Any]:
    return {
        "flavour": target.flavour,
        "version": target.version,
        "compute_capabilities": target.capabilities,
        "device": None if target.box is None else target.box.device_name,
        "engines": [
            {
                "graph": b.choice.graph,
                "variant": b.choice.variant,
                "precision": b.choice.precision,
                "built_from": b.choice.target,
                "path": b.path,
                "cached": b.cached,
                "engine_bytes": b.engine_bytes,
                "seconds": b.seconds,
                "peak_memory_bytes": b.peak_memory_bytes,
                "key": b.key.to_dict(),
            }
            for b in built
        ],
        "bundle": folder,
        "layers": [report.to_dict() for report in reports],
        "warnings": warnings,
    }


def _print(target: Target, built: Sequence[Built], reports: Sequence[LayerReport]) -> None:
    for report in reports:
        _print_layers(report)
    rows = [
        (
            b.choice.graph,
            b.choice.variant,
            "prepared" if b.choice.target == "tensorrt" else "plain",
            len(b.key.profiles) or "fixed",
            bytes_text(b.engine_bytes),
            bytes_text(b.peak_memory_bytes),
            "cached" if b.cached else f"{b.seconds:.1f} s",
        )
        for b in built
    ]
    columns = ("Graph", "Variant", "Graph file", "Profiles", "Size", "Memory", "Build")
    print_table(columns, rows, title=str(target), right=columns[3:])


def _print_layers(report: LayerReport) -> None:
    counts = ", ".join(f"{count} {precision}" for precision, count in report.precisions.items())
    title = f"{report.graph} {report.variant}: {counts}; {report.left_out} constants and shape layers left out"
    rows = [
        (layer.node or layer.name, layer.type, layer.precision, "x".join("?" if s < 0 else str(s) for s in layer.shape))
        for layer in report.layers
    ]
    print_table(("Layer", "Type", "Precision", "Shape"), rows, title=title)
    if report.kept:
        typer.echo("Stayed in fp32:")
        for reason, names in report.kept.items():
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            typer.echo(f"  {len(names)} layers, {reason}: {shown}")
    typer.echo("")
