"""Runs every part of `bench all` in a process of its own and puts their figures together; nothing goes missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .plan import Planned, Wanted, hidden_paths, make_plan, shown
from .power_mode import LoadWatch, read_power_mode
from .readings import READERS, Reader
from .report import environment
from .results import Part, PartStatus, Run, check_text
from .steps import Finished, Reading, Step, last_line, run_command, run_steps

QUICK_LIMIT = 300.0
LIMIT = 3600.0
"""Seconds for a part."""

Runner = Callable[[Sequence[str], float, Path | None], Finished]


def run_all(
    wanted: Wanted,
    command: str,
    *,
    limit: float | None = None,
    run: Runner = run_command,
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """Runs what was asked for.

    Args:
        wanted: What.
        command: As the user typed it, for the file.
        limit: Seconds for each part; None for the default.
        run: As `steps.run_command`.
        say: Told what starts.

    Returns:
        One part for each command, also for those that failed, hung or lack something.

    Raises:
        EdgeError: Unknown size or part.
    """
    plan = make_plan(wanted)
    facts = {**environment(wanted.threads), "power": read_power_mode()}
    most = limit or (QUICK_LIMIT if wanted.quick else LIMIT)
    parts = tuple(run_part(planned, most, run, say) for planned in plan)
    return Run({**asdict(wanted), "command": shown(command, _hidden())}, facts, parts)


def run_part(planned: Planned, limit: float, run: Runner, say: Callable[[str], None]) -> Part:
    """One part, whatever becomes of it."""
    watch = LoadWatch()
    found: dict[str, Any] = {}

    def read(done: Finished) -> Reading:
        return read_output(planned.name, done, found)

    watch.start()
    begun = time.monotonic()
    (outcome,) = run_steps([Step(planned.name, planned.command, limit, read)], limit + 20, run=run, say=say)
    seconds, busy = time.monotonic() - begun, watch.stop()
    hidden = _hidden()
    status: PartStatus = found.pop("status", outcome.status)
    reason = shown(found.pop("reason", outcome.reason), hidden)
    title = found.pop("title", planned.name)
    return Part(planned.name, title, status, reason, shown(planned.text, hidden), seconds, busy, **found)


def _hidden() -> dict[str, str]:
    """Paths of this machine that do not belong into a file that is published."""
    return hidden_paths([(Path.home(), "~"), (Path.cwd(), ".")])


def read_output(name: str, done: Finished, found: dict[str, Any], readers: dict[str, Reader] = READERS) -> Reading:
    """Fills `found` with the fields of a `Part` from what a command printed.

    Raises:
        KeyError, TypeError, ValueError: The output is none of that benchmark's.
    """
    if not done.out.strip():
        return Reading("failed", f"Ended with {done.code} and no output. {last_line(done)}".strip())
    out = json.loads(done.out)
    if "error" in out:
        error = out["error"]
        missing = error["type"] == "MissingDependencyError"
        found["status"] = "unavailable" if missing else "failed"
        found["reason"] = f"{error['message']} {error['action']}".strip()
        return Reading("failed", found["reason"])
    read = readers[name](out)
    wrong = [check for check in read.checks if check.passed is False]
    found.update(
        title=read.title, figures=tuple(read.figures), checks=tuple(read.checks), bars=tuple(read.bars),
        left_out=read.left_out, curves=tuple(read.curves),
        raw={key: value for key, value in out.items() if key != "environment"},
    )  # fmt: skip
    if done.code:
        found["status"], found["reason"] = "failed", f"Ended with {done.code}. {last_line(done)}".strip()
    elif wrong:
        found["status"], found["reason"] = "wrong", "; ".join(check_text(check) for check in wrong)
    else:
        found["status"] = "passed"
    return Reading("passed")
