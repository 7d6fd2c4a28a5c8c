"""`pixano-edge bundle`: look into bundles, pack and unpack them, keep them in the local store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle import Bundle, BundleStore, Manifest, inspect_archive, pack, unpack
from ..bundle.archive import MAX_BYTES, MAX_FILES
from ..bundle.files import Progress
from ..contracts.sam2 import FAMILY
from ..contracts.sam2_video import constants_of
from ..errors import BundleError
from .calibrations import print_calibrations
from .output import JsonOption, bytes_text, note, print_facts, print_json, print_table, progress

app = typer.Typer(help="Inspect, pack, unpack and store bundles.", no_args_is_help=True)

SUFFIX = ".pxe"

Force = Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")]
MaxBytes = Annotated[int, typer.Option(min=1, help="Most bytes it may unpack to.")]
MaxFiles = Annotated[int, typer.Option(min=1, help="Most files it may hold.")]


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Bundle folder, packed bundle, or a name in the store.")],
    as_json: JsonOption = False,
) -> None:
    """Verify a bundle and show what it holds, where it came from and how well it matches its original."""
    path = _locate(source)
    if path.is_file():
        manifest, digest = inspect_archive(path)
    else:
        bundle = Bundle.open(path)
        manifest, digest = bundle.manifest, bundle.hash
    if as_json:
        size = sum(entry.size for entry in manifest.files.values())
        print_json({"path": str(path), "hash": digest, "bytes": size, "manifest": manifest.model_dump(mode="json")})
    else:
        _show(path, manifest, digest)


@app.command("pack")
def pack_command(
    folder: Annotated[str, typer.Argument(help="Bundle folder, or a name in the store.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; <name>.pxe if absent.")] = None,
    force: Force = False,
) -> None:
    """Pack a bundle into one file."""
    path = _locate(folder)
    target = output if output is not None else Path(f"{path.resolve().name}{SUFFIX}")
    with _bar("Packing") as tick:
        written = pack(path, target, overwrite=force, progress=tick)
    typer.echo(f"{written} ({bytes_text(written.stat().st_size)})")


@app.command("unpack")
def unpack_command(
    file: Annotated[Path, typer.Argument(help="Packed bundle.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to make; the file's name if absent.")
    ] = None,
    force: Force = False,
    max_bytes: MaxBytes = MAX_BYTES,
    max_files: MaxFiles = MAX_FILES,
) -> None:
    """Unpack a packed bundle into a new folder, checking every name, size and hash."""
    target = output if output is not None else Path(file.name).with_suffix("")
    if output is None and not file.suffix:
        raise BundleError(f"'{file}' has no suffix to leave out.", "Name the folder with --output.")
    with _bar("Unpacking") as tick:
        made = unpack(file, target, max_bytes=max_bytes, max_files=max_files, overwrite=force, progress=tick)
    typer.echo(str(made))


@app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the bundles in the local store."""
    store = BundleStore()
    rows = [(name, str(store.path(name))) for name in store.list()]
    if as_json:
        print_json([{"name": name, "path": path} for name, path in rows])
    elif rows:
        print_table(("Name", "Folder"), rows)
    else:
        note(f"The store '{store.root}' is empty. Add a bundle with: pixano-edge bundle add <folder or file>")


@app.command()
def add(
    source: Annotated[Path, typer.Argument(help="Bundle folder or packed bundle.")],
    name: Annotated[str | None, typer.Option(help="Name in the store; the bundle's own if absent.")] = None,
) -> None:
    """Copy a bundle into the local store."""
    typer.echo(str(BundleStore().add(source, name)))


@app.command()
def remove(name: Annotated[str, typer.Argument(help="Name in the store.")]) -> None:
    """Delete a bundle from the local store."""
    BundleStore().remove(name)
    typer.echo(f"Removed {name}.")


def _locate(source: str) -> Path:
    """A path if it exists or looks like one, otherwise a name in the store."""
    path = Path(source).expanduser()
    return path if path.exists() or "/" in source or source.endswith(SUFFIX) else BundleStore().path(source)


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    """A bar that counts MiB."""
    shown = 0
    with progress(f"{label} (MiB)", None) as steps:

        def tick(done: int, total: int) -> None:
            nonlocal shown
            if (done >> 20) > shown:
                steps.step((done >> 20) - shown)
                shown = done >> 20

        yield tick


def _show(path: Path, manifest: Manifest, digest: str) -> None:
    source, licence = manifest.source, manifest.licence
    facts: dict[str, Any] = {
        "path": path,
        "family": f"{manifest.family} ({source.architecture})",
        "created": manifest.created.isoformat(timespec="seconds"),
        "checkpoint": f"{source.checkpoint} ({source.format}, sha256 {source.sha256[:16]}...)",
        "licence": f"{licence.spdx} {licence.text}".strip(),
        "image size": manifest.preprocess.image_size,
        "size": f"{bytes_text(sum(e.size for e in manifest.files.values()))} in {len(manifest.files)} files",
        "tracks": _tracks(manifest),
        "golden samples": f"{len(manifest.golden)}{', and a clip' if manifest.golden_clip is not None else ''}",
        "tools": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
        "hash": digest,
    }
    print_facts(f"Bundle {manifest.name} (schema {manifest.schema_version})", facts)
    for text in manifest.notes:
        typer.echo(f"Note: {text}")
    held = [(g, name, v) for g, graph in manifest.graphs.items() for name, v in graph.variants.items()]
    held += [(g, "fp32-cpu", v) for g, v in manifest.cpu_graphs.items()]
    rows = [
        (graph, name, v.precision, v.target, v.opset, v.nodes, v.parameters, bytes_text(manifest.files[v.file].size))
        for graph, name, v in held
    ]
    print_table(
        ("Graph", "Variant", "Precision", "Target", "Opset", "Nodes", "Parameters", "Size"),
        rows,
        title="Graphs",
        right=("Opset", "Nodes", "Parameters", "Size"),
    )
    print_calibrations(manifest.model_dump(mode="json")["calibrations"])
    report = manifest.parity
    if report is None:
        typer.echo("Parity: not measured.")
        return
    typer.echo(f"Parity against {report.reference}: {'passed' if report.passed else 'FAILED'}")
    print_table(
        ("Graph", "Tensor", "Variant", "Max rel", "Max abs"),
        [(t.graph, t.tensor, t.variant, f"{t.max_rel:.1e}", f"{t.max_abs:.1e}") for t in report.tensors],
        right=("Max rel", "Max abs"),
    )
    if report.generations:
        print_table(
            ("Variant", "Answers", "Tokens", "Equal", "Ties", "Max rel of logits"),
            [(g.variant, g.prompts, g.tokens, g.equal, g.ties, f"{g.max_rel:.1e}") for g in report.generations],
            right=("Answers", "Tokens", "Equal", "Ties", "Max rel of logits"),
        )
        return
    print_table(
        ("Variant", "Images", "Prompts", "Mean IoU", "Min IoU"),
        [(m.variant, m.images, m.prompts, f"{m.mean_iou:.5f}", f"{m.min_iou:.5f}") for m in report.masks],
        right=("Images", "Prompts", "Mean IoU", "Min IoU"),
    )
    if report.clips:
        print_table(
            ("Variant", "Objects", "Frames", "Not empty", "Mean IoU", "Min IoU"),
            [(c.variant, c.objects, c.frames, c.shown, f"{c.mean_iou:.5f}", f"{c.min_iou:.5f}") for c in report.clips],
            title="Tracked clip",
            right=("Objects", "Frames", "Not empty", "Mean IoU", "Min IoU"),
        )


def _tracks(manifest: Manifest) -> str:
    """Whether a bundle holds the graphs of tracking, and how much it remembers."""
    video = constants_of(manifest.constants) if manifest.family == FAMILY else None
    if video is None:
        return "no (images only)"
    return f"yes ({video.num_memories} memories and {video.max_pointers} pointers per object)"
