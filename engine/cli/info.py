"""`pixano-edge info`: this machine in a few lines, or the facts of one bundle."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ..bundle import Bundle, BundleStore
from ..contracts import sam2
from ..errors import EdgeError
from ..provider.needs import SOURCES, declared
from ..provider.settings import LoadOptions
from .calibrations import print_calibrations
from .host import read_host
from .options import BackendOption, DeviceOption, PrecisionOption, open_bundle
from .output import JsonOption, bytes_text, print_facts, print_json, print_table

app = typer.Typer(rich_markup_mode="markdown")


def machine_facts() -> dict[str, Any]:
    """Host, CUDA devices and the bundles of the local store, JSON-ready."""
    from ..provider.hardware import read_hardware

    hardware = read_hardware()
    store = BundleStore()
    return {
        "host": asdict(read_host()),
        "gpus": hardware.gpu_dicts(),
        "gpu_reason": hardware.reason,
        "store": str(store.root),
        "bundles": store.list(),
    }


def bundle_facts(bundle: Bundle, device: str, backend: str, precision: str) -> dict[str, Any]:
    """What the manifest says, and what really runs when the bundle is opened here (``engine`` or ``engine_error``)."""
    from ..provider.families import tasks, tracks

    can_track = tracks(bundle.manifest.family, bundle.manifest.constants)
    manifest = bundle.manifest.model_dump(mode="json")
    graphs = {
        name: {
            variant: {**facts, "bytes": manifest["files"][facts["file"]]["size"]}
            for variant, facts in graph["variants"].items()
        }
        for name, graph in manifest["graphs"].items()
    }
    kept = ("name", "family", "schema_version", "created", "source", "licence", "tools", "preprocess", "constants")
    facts: dict[str, Any] = {
        "path": str(bundle.root),
        "hash": bundle.hash,
        **{key: manifest[key] for key in kept},
        "bytes": sum(entry["size"] for entry in manifest["files"].values()),
        "tasks": tasks(bundle.manifest.family, can_track),
        "variants": bundle.variants(),
        "graphs": graphs,
        "parity": manifest["parity"],
        "calibrations": manifest["calibrations"],
        "golden_samples": [sample["name"] for sample in manifest["golden"]],
        "notes": manifest["notes"],
        "engine": None,
        "engine_error": None,
    }
    try:
        with closing(_open(bundle, can_track, {"device": device, "backend": backend, "precision": precision})) as model:
            facts["engine"] = model.info()
    except EdgeError as error:
        facts["engine_error"] = str(error)
    ran = facts["engine"] or {"device": device, "backend": backend, "precision": precision}
    facts["memory"] = _memory(bundle, LoadOptions(**{key: ran[key] for key in ("device", "backend", "precision")}))
    facts["warnings"] = _warnings(facts)
    return facts


def _open(bundle: Bundle, can_track: bool, asked: dict[str, Any]) -> Any:
    """The model of the bundle's first task, or the one that tracks."""
    from ..models.detection.opening import open_detector
    from ..models.sam2.predictor import Sam2ImagePredictor
    from ..models.sam2_video.model import Sam2VideoModel

    if bundle.manifest.family != sam2.FAMILY:
        return open_detector(bundle, **asked)
    return (Sam2VideoModel if can_track else Sam2ImagePredictor).open(bundle, **asked)


def _memory(bundle: Bundle, options: LoadOptions) -> dict[str, Any]:
    """What the bundle declares to the provider's memory books (bytes), and what kind of figures they are."""
    told = declared(bundle.root, options)
    sources = {part: SOURCES[source] for part, source in told.sources.items()}
    return {"parts": told.use.parts(), "total": told.use.total, "sources": sources}


def _memory_text(memory: dict[str, Any]) -> str:
    """``weights 8.8 MiB (size of the files), work memory 30.0 MiB (an estimate), ...``."""
    parts, sources = memory["parts"], memory["sources"]
    work = (parts["activations"] or 0) + (parts["shared"] or 0)
    caches = (parts["caches"] or 0) + (parts["host"] or 0)
    return (
        f"weights {bytes_text(parts['weights'])} ({sources['weights']}), work memory {bytes_text(work)} "
        f"({sources['work']}), bound tensors {bytes_text(parts['bindings'])}, cache up to {bytes_text(caches)}"
    )


def _warnings(facts: dict[str, Any]) -> list[str]:
    """Everything about a bundle that a user should know before relying on it."""
    found = []
    if facts["parity"] is None:
        found.append("No parity report: nobody compared this bundle with its original.")
    elif not facts["parity"]["passed"]:
        found.append("The parity check at export did not pass.")
    if not facts["golden_samples"]:
        found.append("No golden samples: 'pixano-edge verify' cannot check it on this machine.")
    if facts["licence"]["spdx"] == "unknown":
        found.append("The licence of the weights is unknown; check it before use.")
    if facts["engine_error"]:
        found.append(f"It does not open here: {facts['engine_error']}")
    found += (facts["engine"] or {}).get("warnings", [])
    return found


def _print_machine(facts: dict[str, Any]) -> None:
    host = facts["host"]
    print_facts(
        "This machine",
        {
            "OS": host["os"],
            "CPU": f"{host['cpu']}, {host['usable_threads']} threads",
            "RAM": bytes_text(host["memory_total"]),
            "GPU": ", ".join(gpu["name"] for gpu in facts["gpus"]) or f"none: {facts['gpu_reason']}",
            "model store": facts["store"],
            "bundles": ", ".join(facts["bundles"]) or "none; export one or run 'pixano-edge bundle --help'",
        },
    )


def _print_bundle(facts: dict[str, Any]) -> None:
    source, engine = facts["source"], facts["engine"]
    shown: dict[str, object] = {
        "folder": facts["path"],
        "size": bytes_text(facts["bytes"]),
        "model": f"{source['architecture']}, input {facts['preprocess']['image_size']} px",
        "made from": f"{source['checkpoint']} ({source['format']}), {facts['created']}",
        "licence": f"{facts['licence']['spdx']} {facts['licence']['text']}".strip(),
        "tasks": ", ".join(facts["tasks"]),
        "variants": ", ".join(facts["variants"]),
    }
    if engine:
        sessions = [session for name in facts["graphs"] if (session := engine.get(name))]
        providers = {session["provider"] for session in sessions}
        shown["runs here on"] = f"{engine['device']}, {engine['backend']} ({', '.join(sorted(providers))})"
        shown["precision"] = f"{engine['precision']} ({engine.get('precision_reason', '')})"
        if engine.get("cpu_graphs"):
            shown["graphs for CPUs"] = ", ".join(engine["cpu_graphs"])
    shown["memory"] = _memory_text(facts["memory"])
    print_facts(facts["name"], shown)
    rows = [
        (graph, variant, f["precision"], f["nodes"], f"{f['parameters'] / 1e6:.2f} M", bytes_text(f["bytes"]))
        for graph, variants in facts["graphs"].items()
        for variant, f in variants.items()
    ]
    typer.echo()
    columns = ("graph", "variant", "precision", "nodes", "parameters", "size")
    print_table(columns, rows, right=columns[3:])
    parity = facts["parity"]
    if parity:
        typer.echo(f"\nParity with {parity['reference']} on {len(parity['inputs'])} inputs:")
        headings, cells = _parity_table(parity)
        print_table(headings, cells, right=headings[1:])
    print_calibrations(facts["calibrations"])
    for warning in facts["warnings"]:
        typer.secho("warning: ", fg=typer.colors.YELLOW, nl=False)
        typer.echo(warning)
    for text in facts["notes"]:
        typer.echo(f"note: {text}")


def _parity_table(parity: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of each variant's figures: worst tensor, and masks or detections."""
    tensors: dict[str, float] = {}
    for t in parity["tensors"]:
        tensors[t["variant"]] = max(tensors.get(t["variant"], 0.0), t["max_rel"])
    found: dict[str, tuple[str, ...]]
    if parity["detections"]:
        headings: tuple[str, ...] = ("boxes", "without a partner", "worst corner", "worst score")
        found = {
            d["variant"]: (f"{d['boxes']}", f"{d['unmatched']}", f"{d['max_box']:.2f} px", f"{d['max_score']:.1e}")
            for d in parity["detections"]
        }
    elif parity["generations"]:
        headings = ("answers", "tokens", "equal")
        found = {g["variant"]: (f"{g['prompts']}", f"{g['tokens']}", f"{g['equal']}") for g in parity["generations"]}
    else:
        headings = ("mean mask IoU", "worst mask IoU")
        found = {m["variant"]: (f"{m['mean_iou']:.4f}", f"{m['min_iou']:.4f}") for m in parity["masks"]}
    absent = ("-",) * len(headings)
    cells = [(variant, f"{error:.1e}", *found.get(variant, absent)) for variant, error in tensors.items()]
    return ("variant", "worst relative error", *headings), cells


@app.command()
def info(
    bundle: Annotated[str | None, typer.Argument(help="Bundle folder, or a name in the local store.")] = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show this machine and its bundles, or the facts of one bundle and how it runs here."""
    if bundle is None:
        facts = machine_facts()
        if as_json:
            print_json(facts)
        else:
            _print_machine(facts)
        return
    facts = bundle_facts(open_bundle(bundle), device, backend, precision)
    if as_json:
        print_json(facts)
    else:
        _print_bundle(facts)
