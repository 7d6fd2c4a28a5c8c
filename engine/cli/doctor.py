"""`pixano-edge doctor`: what this machine has, what is missing, and the command that fixes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from ..errors import EdgeError
from ..libraries import OPENCV_WHEELS, ORT_WHEELS, installed_version, module_version
from .gpu_parts import GpuPart, gpu_part_findings, gpu_parts
from .host import Host, read_host
from .libraries import Finding, Level, Library, base_findings, libraries, runtime_findings, wheel_conflicts
from .output import JsonOption, bytes_text, print_facts, print_json, print_table
from .probe import ProviderState, compiled_providers, probe_provider

if TYPE_CHECKING:
    from ..runtime.cuda_open import AutoDevice

app = typer.Typer(rich_markup_mode="markdown")


@dataclass(frozen=True)
class Store:
    """The local model store: its folder, the names in it, and the bundles that ship with the package."""

    root: str
    bundles: list[str]


@dataclass(frozen=True)
class Report:
    """Everything `doctor` knows; `healthy` is False when a finding is a problem."""

    host: Host
    gpus: list[dict[str, Any]]
    gpu_reason: str
    libraries: list[Library]
    onnxruntime: str | None
    runtimes: list[str]
    opencv: list[str]
    providers: list[ProviderState]
    gpu_parts: list[GpuPart]
    store: Store
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return not any(f.level == "problem" for f in self.findings)


def _gpus() -> tuple[list[dict[str, Any]], str, list[Finding]]:
    """CUDA devices, the reason when there are none, and what could not be read about them."""
    from ..provider.hardware import read_hardware

    hardware = read_hardware()
    return hardware.gpu_dicts(), hardware.reason or "", [Finding("note", text) for text in hardware.notes]


def _auto_device() -> AutoDevice:
    from ..runtime.cuda_open import auto_device

    return auto_device()


def _store() -> tuple[Store, list[Finding]]:
    from ..bundle import BundleStore

    store = BundleStore()
    try:
        names = store.list()
    except (EdgeError, OSError) as error:
        text = f"The model store {store.root} cannot be read: {error}"
        return Store(str(store.root), []), [Finding("warning", text, "Check the rights of the folder.")]
    return Store(str(store.root), names), []


def _provider_findings(providers: Sequence[ProviderState], gpus: Sequence[object], host: Host) -> list[Finding]:
    findings = []
    for state in providers:
        if state.name == "CPUExecutionProvider" and not state.loads:
            findings.append(
                Finding(
                    "problem",
                    f"ONNX Runtime's CPU provider does not run: {state.reason}",
                    "pip install --force-reinstall 'pixano-edge[cpu]'",
                )
            )
        elif state.name in ("CUDAExecutionProvider", "TensorrtExecutionProvider") and not state.loads:
            if state.name == "CUDAExecutionProvider" and (gpus or host.jetson):
                continue  # `gpu_part_findings` says it, with the command that helps
            level: Level = "warning" if gpus or host.jetson else "note"
            findings.append(Finding(level, f"{state.name} is compiled in but does not load: {state.reason}"))
    return findings


def _gpu_findings(gpus: Sequence[object], host: Host, auto: AutoDevice) -> list[Finding]:
    """Whether the GPU of this machine is used."""
    if auto.gpus:
        return [Finding("note", f"Device 'auto' is {auto.gpus[0]}: {auto.reason}. Check it with 'pixano-edge verify'.")]
    if gpus or host.jetson:
        text = f"There is an NVIDIA GPU, but pixano-edge runs on the CPU: {auto.reason}"
        return [Finding("warning", text, auto.action)]
    return []


def examine() -> Report:
    """Collects the report. Providers are tried in child processes, so a broken driver cannot end this one."""
    host = read_host()
    found = libraries()
    broken_base, broken_runtime = base_findings(found), runtime_findings()
    findings = [*broken_base, *wheel_conflicts(), *broken_runtime]
    gpus: list[dict[str, Any]] = []
    reason = "unknown: the base install is broken"
    store = Store(reason, [])
    if not broken_base:
        gpus, reason, remarks = _gpus()
        store, more = _store()
        findings += remarks + more + _gpu_findings(gpus, host, _auto_device())
    providers: list[ProviderState] = []
    ort_version = None
    if not broken_runtime:
        ort_version = module_version("onnxruntime", ORT_WHEELS)
        providers = [probe_provider(name) for name in compiled_providers()]
        findings += _provider_findings(providers, gpus, host)
    parts = gpu_parts()
    findings += gpu_part_findings(parts, providers, gpus, host.jetson is not None)
    return Report(
        host=host,
        gpus=gpus,
        gpu_reason=reason,
        libraries=found,
        onnxruntime=ort_version,
        runtimes=[w for w in ORT_WHEELS if installed_version(w)],
        opencv=[f"{w} {installed_version(w)}" for w in OPENCV_WHEELS if installed_version(w)],
        providers=providers,
        gpu_parts=parts,
        store=store,
        findings=findings,
    )


def _install_line(extra: str, absent: Sequence[Library], runtimes: Sequence[str]) -> str:
    """The command that brings what an extra lacks, without putting a second ONNX Runtime beside the first."""
    wanted = [lib.name for lib in absent if lib.name in ORT_WHEELS]
    others = [w for w in runtimes if w not in wanted]
    if not wanted or not others:
        return f"pip install 'pixano-edge[{extra}]'"
    if extra in ("cpu", "cuda"):
        return (
            f"instead of {' '.join(others)}: pip uninstall -y {' '.join(others)} && pip install 'pixano-edge[{extra}]'"
        )
    rest = " ".join(f"'{lib.name}{lib.required}'" for lib in absent if lib.name not in ORT_WHEELS)
    return f"pip install {rest}" if rest else ""


def _library_rows(found: Sequence[Library], runtimes: Sequence[str]) -> list[tuple[str, str, str]]:
    """One row for the base, one per extra: what is there and the install line for what is not."""
    rows = []
    for extra in dict.fromkeys(lib.extra for lib in found):
        of_extra = [lib for lib in found if lib.extra == extra]
        there = ", ".join(f"{lib.name} {lib.version}" for lib in of_extra if lib.version) or "-"
        absent = [lib for lib in of_extra if not lib.version]
        if not extra:
            line = "pip install " + " ".join(f"'{lib.name}{lib.required}'" for lib in absent)
        else:
            line = _install_line(extra, absent, runtimes)
        missing = f"{', '.join(lib.name for lib in absent)}: {line}" if absent and line else ""
        rows.append((f"[{extra}]" if extra else "base", there, missing))
    return rows


def _gpu_text(gpu: Mapping[str, Any]) -> str:
    """One GPU in one line; what is unknown is left out."""
    parts = [
        str(gpu.get("name")),
        f"compute capability {gpu.get('compute_capability')}",
        f"driver {gpu.get('driver')}",
        str(gpu.get("runtime") or ""),
        f"{bytes_text(gpu.get('memory_free'))} free of {bytes_text(gpu.get('memory_total'))}",
    ]
    sensors = (("utilisation", "load {} %"), ("temperature", "{} °C"), ("power", "{} W"))
    parts += [text.format(gpu[key]) for key, text in sensors if gpu.get(key) is not None]
    shared = (gpu.get("extra") or {}).get("memory")
    return ", ".join(part for part in (*parts, f"memory {shared}" if shared else "") if part)


def _print(report: Report) -> None:
    host = report.host
    quota = f", container quota {host.cpu_quota:g}" if host.cpu_quota else ""
    facts: dict[str, object] = {
        "OS": f"{host.os} ({host.kernel})",
        "CPU": f"{host.cpu}, {host.threads} threads ({host.usable_threads} usable{quota})",
        "instructions": " ".join(host.cpu_flags) or "unknown",
        "RAM": f"{bytes_text(host.memory_total)}, {bytes_text(host.memory_available)} free",
        "Python": host.python,
    }
    if host.jetson:
        facts["Jetson"] = f"{host.jetson} {host.l4t or ''}".strip()
    if not report.gpus:
        facts["GPU"] = f"none: {report.gpu_reason}"
    for gpu in report.gpus:
        facts[f"GPU {gpu.get('index', 0)}"] = _gpu_text(gpu)
    print_facts("This machine", facts)
    typer.echo()
    print_table(("where", "installed", "missing"), _library_rows(report.libraries, report.runtimes), title="Libraries")
    typer.echo()
    rows: list[tuple[str, str, str]] = [("ONNX Runtime", report.onnxruntime or "absent or broken", "")]
    rows += [(s.name, "loads" if s.loads else "does not load", s.reason) for s in report.providers]
    rows += [(part.name, part.state, part.reason) for part in report.gpu_parts]
    print_table(("back end", "state", "why"), rows, title="Back ends")
    typer.echo()
    print_facts("Model store", {"folder": report.store.root, "bundles": ", ".join(report.store.bundles) or "none"})
    typer.echo()
    if not report.findings:
        typer.secho("No problems found.", fg=typer.colors.GREEN)
    colours = {"problem": typer.colors.RED, "warning": typer.colors.YELLOW, "note": typer.colors.CYAN}
    for finding in report.findings:
        typer.secho(f"{finding.level}: ", fg=colours[finding.level], bold=True, nl=False)
        typer.echo(finding.message)
        if finding.action:
            typer.echo(f"  fix: {finding.action}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, what is missing, and how to fix it.

    Ends with 1 when something that pixano-edge needs to run is missing or broken, otherwise with 0.
    """
    report = examine()
    if as_json:
        print_json({"healthy": report.healthy, **asdict(report)})
    else:
        _print(report)
    if not report.healthy:
        raise typer.Exit(1)
