"""`pixano-edge serve`: the HTTP server that Pixano connects to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..server import ServerSettings, create_app
from .options import BackendOption, DeviceOption, PrecisionOption

app = typer.Typer(rich_markup_mode="markdown")


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port; default 7463.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of the model store.")] = None,
    demo: Annotated[bool | None, typer.Option("--demo", help="Offer the packaged demo bundles.")] = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Serve the models of the local store to Pixano."""
    import uvicorn

    settings = ServerSettings.read(
        host=host, port=port, store=store, demo=demo, device=device, backend=backend, precision=precision
    )
    settings.check_bind()
    uvicorn.run(create_app(settings), host=settings.host, port=settings.port, access_log=False)
