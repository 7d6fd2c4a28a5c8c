"""What every command prints: tables for people, JSON for scripts, one shape of error for both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import EdgeError

JSON_KEY = "pixano_edge.json"


def _remember_json(ctx: typer.Context, value: bool) -> bool:
    # `meta` is shared by nested contexts, so the frame knows how to print an error raised further down.
    if value:
        ctx.meta[JSON_KEY] = True
    return value


JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON for scripts instead of a table.", callback=_remember_json)
]
"""The ``--json`` switch of a command; an error is then printed as ``{"error": ...}`` on stdout."""


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has no word for them and strict readers refuse Python's."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    return _finite(_plain(value))


def to_json(value: Any) -> str:
    """Indented JSON; takes dataclasses, pydantic models, paths and numpy values; NaN and infinity become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False)


def print_json(value: Any) -> None:
    """Writes `value` as JSON to stdout."""
    typer.echo(to_json(value))


def print_error(error: EdgeError, as_json: bool = False) -> None:
    """Message and action of `error`: as text on stderr, or as ``{"error": {type, message, action}}`` on stdout."""
    if as_json:
        print_json(
            {"error": {"type": type(error).__name__, "message": error.message, "action": error.action}},
        )
        return
    typer.secho("Error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
    typer.echo(error.message, err=True)
    if error.action:
        typer.echo(error.action, err=True)


def note(text: str) -> None:
    """A remark on stderr, so that stdout stays clean for scripts."""
    typer.echo(text, err=True)


def _console() -> Any:
    """Rich's console on stdout; away from a terminal wide enough that no cell is folded."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=300)


def _print_lines(table: Any) -> None:
    console = _console()
    with console.capture() as captured:
        console.print(table)
    # Rich pads every line to the full width.
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", right: Sequence[str] = ()
) -> None:
    """A table on stdout, as wide as its longest line.

    Args:
        columns: Headings.
        rows: Cells, printed with `str`; a ``[`` is printed as it stands.
        title: Line above the table.
        right: Headings of the columns that are aligned to the right (numbers).
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _print_lines(table)


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Name and value pairs on stdout, one per line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), Text(str(value)))
    _print_lines(table)


class Steps:
    """Counts finished steps; moves the bar of `progress` where there is one."""

    def __init__(self, advance: Any = None, describe: Any = None, resize: Any = None) -> None:
        self._advance = advance
        self._describe = describe
        self._resize = resize

    def step(self, count: int = 1) -> None:
        if self._advance is not None:
            self._advance(count)

    def label(self, text: str) -> None:
        if self._describe is not None:
            self._describe(text)

    def retotal(self, total: int) -> None:
        """Changes the number of steps, where it turns out to be another one."""
        if self._resize is not None:
            self._resize(total)


@contextmanager
def progress(label: str, total: int | None, enabled: bool = True) -> Iterator[Steps]:
    """A bar on stderr, shown only in a terminal and gone when done; without one the steps are just counted.

    Args:
        label: Text before the bar.
        total: Number of steps, or None for a bar that only shows that work goes on.
        enabled: False for no bar, for example with ``--json``.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield Steps()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield Steps(
            advance=lambda count: bar.update(task, advance=count),
            describe=lambda text: bar.update(task, description=text),
            resize=lambda total: bar.update(task, total=total),
        )


def make_folder(folder: Path) -> None:
    """Makes a folder for results and its parents; raises EdgeError when that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgeError(f"The folder '{folder}' cannot be made: {error}.", "Choose another folder.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to and renames it to `path` at the end, so no half-written file is left.

    Raises:
        EdgeError: Writing or renaming failed (rights, full disk).
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise EdgeError(f"'{path}' cannot be written: {error}.", "Check rights and free space.") from error
    finally:
        partial.unlink(missing_ok=True)


def bytes_text(count: int | float | None) -> str:
    """``12.3 MB`` (powers of 1000), or ``unknown``."""
    if count is None:
        return "unknown"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def milliseconds(seconds: float) -> str:
    """``12.3 ms``, with a precision that fits the size."""
    value = seconds * 1000
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"
