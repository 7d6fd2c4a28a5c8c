"""Steps of a longer report, each a command of its own with a time limit; one that fails or hangs stops no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "timed out", "skipped"]

LEAST_SECONDS = 10.0
"""A step that would get less time is not started."""
_GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Finished:
    """A command that ended, or was ended.

    Attributes:
        code: Exit status; None when its time was over.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
        seconds: How long it ran.
    """

    code: int | None
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Reading:
    """What a finished command means."""

    status: Status
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: For the report.
        command: What is run.
        limit: Most seconds.
        read: Turns its end into a status; called when it ended by itself.
        skip: Why it is not run at all; empty when it is.
        after: Step that must have passed before.
        folder: Working directory; None for the current one.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    read: Callable[[Finished], Reading]
    skip: str = ""
    after: str = ""
    folder: Path | None = None

    @property
    def text(self) -> str:
        """The command as a reader of the report would type it in that folder."""
        inside = str(self.folder or Path.cwd()) + os.sep
        python = Path(sys.executable)
        words = ["python" if word == str(python) else word.replace(inside, "") for word in self.command]
        return " ".join(words)


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    status: Status
    seconds: float
    reason: str
    command: str
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run_command(command: Sequence[str], limit: float, folder: Path | None = None) -> Finished:
    """Runs a command; when its time is over, ends it and everything it started.

    Args:
        command: Program and arguments.
        limit: Seconds.
        folder: Working directory.

    Raises:
        OSError: It cannot be started.
    """
    begin = time.monotonic()
    # Files, not pipes: a process that the command left behind would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Finished(code, texts[0], texts[1], time.monotonic() - begin)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the command's own session of processes, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM:
            time.sleep(0.1)  # what it started may need a moment too; the second signal takes the rest
    process.wait()


def run_steps(
    steps: Sequence[Step],
    total: float,
    *,
    run: Callable[[Sequence[str], float, Path | None], Finished] = run_command,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Runs steps one after the other within a wall-clock limit.

    Args:
        steps: In order.
        total: Most seconds for all.
        run: As `run_command`.
        clock: Seconds.
        say: Told what starts.

    Returns:
        One outcome per step, skipped ones included.
    """
    begin = clock()
    outcomes: list[Outcome] = []
    for step in steps:
        left = total - (clock() - begin)
        reason = step.skip or _not_ready(step, outcomes, left, total)
        if reason:
            outcomes.append(Outcome(step.name, "skipped", 0.0, reason, step.text, {}))
            continue
        say(step.name)
        limit = min(step.limit, left)
        start = clock()
        try:
            done = run(step.command, limit, step.folder)
        except OSError as error:
            reading, seconds = Reading("failed", f"It could not be started: {error}."), clock() - start
        else:
            seconds = done.seconds
            if done.code is None:
                reading = Reading("timed out", f"No end within {limit:.0f} s. {last_line(done)}".strip())
            else:
                reading = _reading(step, done)
        outcomes.append(Outcome(step.name, reading.status, seconds, reading.reason, step.text, reading.details))
    return outcomes


def _not_ready(step: Step, outcomes: Sequence[Outcome], left: float, total: float) -> str:
    before = next((o for o in outcomes if o.name == step.after), None)
    if before is not None and before.status != "passed":
        return f"'{before.name}' {before.status}: {before.reason}"
    return f"No time left of {total:.0f} s." if left < LEAST_SECONDS else ""


def _reading(step: Step, done: Finished) -> Reading:
    try:
        return step.read(done)
    except (ValueError, KeyError, TypeError, OSError) as error:
        # Output of another shape than expected: the command broke, and the report goes on.
        return Reading("failed", f"Ended with {done.code}; its answer cannot be read ({error}). {last_line(done)}")


def last_line(done: Finished) -> str:
    """The last words of a command, errors first; at most 300 characters."""
    lines = [line.strip() for text in (done.err, done.out) for line in text.splitlines()[-1:] if line.strip()]
    return lines[0][-300:] if lines else ""
