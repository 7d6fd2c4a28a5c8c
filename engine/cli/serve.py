"""`pixano-edge serve`: the HTTP server that Pixano connects to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..bundle.store import DEMO_NAMES, BundleStore, default_root
from ..errors import EdgeError
from ..server.run import serve as run
from ..server.settings import DEFAULT_PORT, PREFIXES, ServerSettings
from .options import BackendOption, DeviceOption, PrecisionOption, ThreadsOption
from .output import note

app = typer.Typer(rich_markup_mode="markdown")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind; default 127.0.0.1, this machine only.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help=f"TCP port, 0 for a free one; default {DEFAULT_PORT}.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of the model store; default: the user's own.")] = None,
    demo: Annotated[bool | None, typer.Option("--demo", help="Offer the packaged demo bundles as well.")] = None,
    preload: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Load this model at start; may be repeated.")
    ] = None,
    warm_up: Annotated[
        bool | None,
        typer.Option(
            "--warm-up/--no-warm-up",
            help="Run a model once when it is loaded, so that its first request is no slower than the next ones; "
            "without, it is ready sooner. Default: on.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Accepted API key; may be repeated. Other users of this machine can see it: --api-key-file or "
            "PIXANO_EDGE_API_KEYS keep it to yourself.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text file with one accepted API key per line.")
    ] = None,
    allow_anonymous: Annotated[
        bool | None, typer.Option("--allow-anonymous", help="Serve everybody on an address beyond loopback.")
    ] = None,
    media_root: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Folder whose images and videos requests may name by path; repeatable."),
    ] = None,
    allow_url: Annotated[
        bool | None, typer.Option("--allow-url", help="Fetch images and videos from public http(s) addresses.")
    ] = None,
    bundle_root: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Folder besides the store from which bundles may be loaded by path."),
    ] = None,
    jobs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|memory",
            help="Where tracking jobs are kept; default: jobs.sqlite in $PIXANO_EDGE_HOME. 'memory' forgets them at "
            "the end.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Web pages of this origin may call the server.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="One JSON object per line.")] = None,
) -> None:
    """Serve the models of the local store to Pixano over HTTP.

    Connect Pixano to the printed address with the provider "pixano-inference". Every option has an environment
    variable, and more settings have only that: docs/server.md lists them.
    """
    keys = [*(api_key or []), *_read_keys(api_key_file)]
    settings = ServerSettings.read(
        host=host,
        port=port,
        store=store,
        demo=demo,
        preload=preload or None,
        warm_up=warm_up,
        device=device if device != "auto" else None,
        backend=backend if backend != "auto" else None,
        precision=precision if precision != "auto" else None,
        threads=threads,
        api_keys=keys or None,
        allow_anonymous=allow_anonymous,
        media_roots=media_root or None,
        media_allow_url=allow_url,
        bundle_roots=bundle_root or None,
        jobs=jobs or None,
        cors_allow_origins=cors_origin or None,
        log_level=log_level,
        log_json=log_json,
    )
    if settings.jobs is None and not (jobs or any(os.environ.get(f"{prefix}JOBS") for prefix in PREFIXES)):
        settings = settings.model_copy(update={"jobs": default_root().parent / "jobs.sqlite"})
    for folder in (*settings.media_roots, *settings.bundle_roots):
        if not folder.is_dir():
            raise EdgeError(f"There is no folder '{folder}'.", "Create it, or name another one.")
    names = offered(settings)
    run(settings, lambda url: announce(url, settings, names))


def _read_keys(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeError(f"The key file '{file}' cannot be read: {error}.", "Check the path and its rights.") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise EdgeError(f"The key file '{file}' holds no key.", "Write one key per line.")
    return keys


def offered(settings: ServerSettings) -> list[str]:
    """Names of the bundles that will be served.

    Raises:
        EdgeError: A model to be loaded at start is none of them.
    """
    names = [name for name in BundleStore(settings.store).list() if settings.demo or name not in DEMO_NAMES]
    for name in settings.preload:
        if not {name, name.removesuffix("-video"), name.removesuffix("-image")} & set(names):
            known = ", ".join(names) or "none"
            raise EdgeError(f"There is no model '{name}' to load at start.", f"Known: {known}. --demo adds the demo's.")
    return names


def announce(url: str, settings: ServerSettings, names: list[str]) -> None:
    """Says where the server is, what it serves, and to whom."""
    typer.echo(f"Pixano Edge serves {', '.join(names) or 'no model yet'} on {url}")
    if not names:
        note("Add bundles with 'pixano-edge bundle add', or start with --demo.")
    if settings.api_keys:
        note(f"{len(settings.api_keys)} API key(s) are accepted.")
    elif settings.loopback:
        note("No API key is needed; only this machine can connect.")
    else:
        note("Warning: no API key is needed, and everybody who can reach this machine is served.")
