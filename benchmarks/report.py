"""What every benchmark prints next to its figures: machine, versions, threads, load; and tables in Markdown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pixano_edge.engine.cli.host import read_host
from pixano_edge.engine.cli.output import bytes_text, make_folder, replacing, to_json
from pixano_edge.engine.libraries import engine_versions, installed_version
from pixano_edge.engine.provider.hardware import read_hardware

_BESIDE = ("torch", "transformers", "scikit-image")


def environment(threads: int | None = None) -> dict[str, Any]:
    """Facts without which a figure means nothing, JSON-ready.

    Args:
        threads: Threads given to every contender, None where each takes its default.
    """
    host = read_host()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "taken": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": asdict(host),
        "gpus": read_hardware().gpu_dicts(),
        "threads": threads,
        "load_average_1min": load,
        "versions": engine_versions() | {name: v for name in _BESIDE if (v := installed_version(name))},
    }


def environment_lines(facts: dict[str, Any]) -> list[str]:
    """The same facts for people, one per line; warns when the machine was busy."""
    host = facts["host"]
    lines = [
        f"CPU: {host['cpu']}, {host['usable_threads']} threads usable, {' '.join(host['cpu_flags'])}",
        f"RAM: {bytes_text(host['memory_total'])}; OS: {host['os']}; Python {host['python']}",
        "GPU: " + (", ".join(g["name"] for g in facts["gpus"]) or "none"),
        "versions: " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        f"threads per contender: {facts['threads'] or 'default'}; taken {facts['taken']}",
    ]
    load = facts["load_average_1min"]
    if load is not None and load > 0.5:
        lines.append(f"note: the load average was {load:.1f} at the start; ratios hold better than times")
    return lines


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; columns of numbers are aligned to the right."""
    numeric = [bool(rows) and all(_is_number(str(row[i])) for row in rows) for i in range(len(columns))]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "-+" or text in ("", "n/a")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a report; replaced in one step."""
    make_folder(path.parent)
    with replacing(path) as partial:
        partial.write_text(to_json(content) + "\n", encoding="utf-8")
