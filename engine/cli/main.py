"""The frame of the `pixano-edge` command.

Commands are entry points of the group ``pixano_edge.commands``, each a `typer.Typer`. Only the command asked for is
imported; ``--help`` lists all of them from a table, so neither torch nor ONNX Runtime is loaded to print it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import EdgeError, MissingDependencyError
from .output import JSON_KEY, note, print_error

GROUP = "pixano_edge.commands"


@dataclass(frozen=True)
class _Known:
    """One-line help of a command of this distribution, the extra it needs, and a module that tells it is there."""

    help: str
    extra: str = ""
    probe: str = ""


_KNOWN = {
    "bench": _Known("Measure speed, memory and mask quality.", "benchmarks", "psutil"),
    "build": _Known("Build TensorRT engines for this GPU, or ahead of time for others."),
    "bundle": _Known("Inspect, pack, unpack and store bundles."),
    "demo": _Known("Segment, search and track the bundled pictures and clip with the bundled models."),
    "describe": _Known("Describe images, or answer questions about them, in text."),
    "detect": _Known("Find objects by name on an image or a folder of images."),
    "doctor": _Known("Say what this machine has, what is missing, and how to fix it."),
    "export": _Known("Turn a checkpoint into a bundle.", "export", "torch"),
    "info": _Known("Show this machine, or the facts of one bundle."),
    "kit": _Known("Make, verify and install kits for boxes without a network."),
    "segment": _Known("Segment an image or a folder of images."),
    "serve": _Known("Serve models to Pixano over HTTP.", "server", "fastapi"),
    "track": _Known("Track objects through a video."),
    "verify": _Known("Check a bundle on this machine against its golden samples."),
}

# Module that is missing at run time -> the extra that brings it.
_EXTRA_OF_MODULE = {
    "cryptography": "kit",
    "fastapi": "server",
    "jinja2": "vlm",
    "onnx": "export",
    "onnxruntime": "cpu",
    "onnxscript": "export",
    "orjson": "server",
    "packaging": "kit",
    "prometheus_client": "server",
    "psutil": "benchmarks",
    "pynvml": "cuda",
    "safetensors": "export",
    "skimage": "benchmarks",
    "tensorrt_rtx_bindings": "tensorrt-rtx",
    "tokenizers": "detection",
    "torch": "export",
    "transformers": "export",
    "uvicorn": "server",
}

_BASE_MODULES = frozenset(("PIL", "cv2", "numpy", "pycocotools", "pydantic", "rich"))


def command_entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    """Every command installed on this machine, by name."""
    found = importlib.metadata.entry_points(group=GROUP)
    return {point.name: point for point in sorted(found, key=lambda p: p.name)}


def _missing(module: str | None, purpose: str, extra: str = "") -> EdgeError | None:
    """The error that names the install line for a module, or None when no extra brings it."""
    root = (module or "").partition(".")[0]
    extra = _EXTRA_OF_MODULE.get(root, extra)
    if root in _BASE_MODULES:
        return EdgeError(f"{purpose} needs '{root}', which the base install brings.", "Run 'pixano-edge doctor'.")
    if not root or not extra or root == "pixano_edge":
        return None
    return MissingDependencyError(root, extra, purpose)


def load_command(point: importlib.metadata.EntryPoint) -> Any:
    """Imports one command and returns it as a click command.

    Raises:
        MissingDependencyError: Its extra is not installed; names the install line.
        EdgeError: It is not a Typer app, or the installation is damaged.
    """
    known = _KNOWN.get(point.name, _Known(""))
    try:
        loaded = point.load()
    except ImportError as error:
        if missing := _missing(error.name, f"The command '{point.name}'", known.extra):
            raise missing from error
        raise EdgeError(
            f"The command '{point.name}' cannot be loaded: {error}.",
            "Run 'pixano-edge doctor', or install again with: pip install --force-reinstall 'pixano-edge[cpu]'",
        ) from error
    except AttributeError as error:
        raise EdgeError(
            f"The command '{point.name}' points to '{point.value}', which does not exist: {error}.",
            "Install the package that provides it again.",
        ) from error
    if not isinstance(loaded, typer.Typer):
        raise EdgeError(
            f"The command '{point.name}' ('{point.value}') is a {type(loaded).__name__}, not a typer.Typer.",
            "Report it to the package that provides it.",
        )
    command: Any = typer.main.get_command(loaded)
    command.name = point.name
    # Typer adds them to every app; inside a larger command they would install completion for the wrong name.
    command.params = [p for p in command.params if p.name not in ("install_completion", "show_completion")]
    return command


def _listed_help(name: str, point: importlib.metadata.EntryPoint) -> str:
    known = _KNOWN.get(name)
    if known is None:
        return f"From {point.dist.name if point.dist else point.value}."
    if known.probe and importlib.util.find_spec(known.probe) is None:
        # The bracket would be read as markup.
        return f"{known.help} (needs pixano-edge\\[{known.extra}])"
    return known.help


class CommandGroup(TyperGroup):
    """Loads a command when it is called; prints `EdgeError` and missing extras; exits 130 on Ctrl-C."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted({*command_entry_points(), *super().list_commands(ctx)})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        point = command_entry_points().get(cmd_name)
        if point is None:
            return super().get_command(ctx, cmd_name)
        if self._listing:
            return TyperCommand(name=cmd_name, help=_listed_help(cmd_name, point), callback=None)
        return load_command(point)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeError as error:
            print_error(error, as_json=bool(ctx.meta.get(JSON_KEY)))
            raise typer.Exit(1) from error
        except ModuleNotFoundError as error:
            missing = _missing(error.name, f"The command '{ctx.invoked_subcommand}'")
            if missing is None:
                raise
            print_error(missing, as_json=bool(ctx.meta.get(JSON_KEY)))
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            note("Stopped.")
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version() -> str:
    """Version of the installed distribution."""
    return importlib.metadata.version("pixano-edge")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"pixano-edge {version()}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Torch-free inference engine for Pixano: masks and boxes on any box, from bundles of the original checkpoints."""


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="pixano-edge")
