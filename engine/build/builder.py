"""Runs the child process that parses and builds: memory limit, progress, errors and cancelling."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import BuildError, ContractError, DeviceError, EdgeError, MissingDependencyError
from ..machine import read_text
from .key import FLAVOURS
from .library import EXTRAS

Progress = Callable[[str, float], None]
"""Called with the phase's name and the fraction done, 0 to 1."""

DEFAULT_TIMEOUT = 4 * 3600.0
"""Seconds; large engines on a Jetson take the better part of an hour."""
POLL_SECONDS = 0.2
END_SECONDS = 10.0
"""How long a child that says no more may take to end."""
NEAR_LIMIT = 0.8
"""Part of the memory limit from which a crash without a reason is taken for a lack of memory."""

_HOST_MEMORY = re.compile(r"bad_alloc|MemoryError|cannot allocate memory|std::length_error", re.IGNORECASE)
_DEVICE_MEMORY = re.compile(r"out ?of ?memory|cudaError 2\b|requested size was", re.IGNORECASE)
_DRIVER = re.compile(r"driver version is insufficient|cudaError(\.| )(35|100)\b|no cuda-capable device", re.IGNORECASE)
# On a machine without a driver the parser of TensorRT for RTX ends such a complaint with CUDA error 35.
_GRAPH_FAULT = re.compile(r"INVALID_NODE|UNSUPPORTED_NODE|INVALID_GRAPH|UNSUPPORTED_GRAPH|API Usage Error")
_KINDS: Mapping[str, type[EdgeError]] = {e.__name__: e for e in (ContractError, DeviceError, BuildError)}


def run_child(
    job: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    check: Callable[[], None] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> dict[str, Any]:
    """Runs one job of `pixano_edge.engine.build.child` and returns its answer.

    Whatever ends this call (also KeyboardInterrupt, or what `check` raises) kills the child first.

    Args:
        job: ``action``, ``flavour`` and what the action needs; ``name`` for messages, ``memory_limit`` in bytes.
        progress: Gets the events of a build.
        check: Called several times per second.
        timeout: Seconds until the child is ended.

    Raises:
        BuildError: It crashed, ran out of time or memory; says which.
        DeviceError: TensorRT is installed but does not load, or finds no driver.
        MissingDependencyError: The flavour is not installed.
    """
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile() as noise:
        child = subprocess.Popen(
            child_command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            env=environment,
            # Ctrl-C in a terminal goes to the whole group; only the parent shall act on it.
            start_new_session=True,
        )
        usage = _Usage(child.pid)

        def tick() -> None:
            usage.read()
            if check is not None:
                check()

        try:
            answer = _converse(child, job, progress, tick, timeout)
            if answer is None:  # its output ended: it shall come to its own end, or the exit code would be our kill's
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(END_SECONDS)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
        noise.seek(0)
        tail = noise.read()[-20_000:].decode("utf-8", "replace")
    if answer is None:
        raise _crash(job, child.returncode, tail, usage.peak)
    if answer["event"] == "failure":
        raise _failure(job, answer)
    return answer


def child_command() -> list[str]:
    """Command line of the child."""
    # -P: a file of the current folder must not stand in for a module; Python 3.10 does not know the option.
    safe = ("-P",) if sys.version_info >= (3, 11) else ()
    return [sys.executable, *safe, "-m", "pixano_edge.engine.build.child"]


def check_problems(job: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Raises what the problems in the child's answer mean: see `run_child`; BuildError for the graph itself."""
    if not answer["problems"]:
        return
    text = "; ".join(dict.fromkeys(answer["problems"]))
    if error := _resources(job, text):
        raise error
    raise BuildError(
        f"TensorRT does not take '{job['name']}': {text}",
        "The graph must be changed: export the bundle again with this version, or report it.",
    )


def _converse(
    child: subprocess.Popen[bytes],
    job: Mapping[str, Any],
    progress: Progress | None,
    tick: Callable[[], None],
    timeout: float,
) -> dict[str, Any] | None:
    """The child's last event, or None when it ended without one."""
    assert child.stdin is not None  # both are pipes; for the type checker
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(job).encode() + b"\n")
        child.stdin.flush()  # stays open: its end would end the child
    except BrokenPipeError:
        return None
    deadline = time.monotonic() + timeout
    for line in _lines(child.stdout, tick, deadline):
        if line is None:
            raise BuildError(f"Building '{job['name']}' took over {timeout:.0f} s.", "Raise the timeout.")
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:  # cut off: the child died while it wrote
            return None
        if event["event"] != "progress":
            return event
        if progress is not None:
            progress(event["phase"], event["fraction"])
    return None


def _lines(pipe: IO[bytes], tick: Callable[[], None], deadline: float) -> Iterator[bytes | None]:
    """Whole lines as they come; None once when the time is over; ends with the pipe."""
    waiting = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            tick()
            if time.monotonic() > deadline:
                yield None
                return
            if not selector.select(POLL_SECONDS):
                continue
            data = os.read(pipe.fileno(), 1 << 16)
            if not data:
                return
            *lines, waiting = (waiting + data).split(b"\n")
            yield from lines


def _failure(job: Mapping[str, Any], answer: Mapping[str, Any]) -> EdgeError:
    """The error that the child raised."""
    if answer["kind"] == MissingDependencyError.__name__:
        flavour = job["flavour"] or FLAVOURS[0]
        return MissingDependencyError(flavour, EXTRAS[flavour], "Building for TensorRT")
    return _KINDS.get(answer["kind"], BuildError)(answer["message"], answer["action"])


class _Usage:
    """Most private memory of a process so far: what RLIMIT_DATA counts."""

    def __init__(self, pid: int) -> None:
        self._file = Path(f"/proc/{pid}/status")
        self.peak = 0

    def read(self) -> None:
        for line in read_text(self._file).splitlines():
            if line.startswith("VmData:"):
                self.peak = max(self.peak, int(line.split()[1]) * 1024)


def _crash(job: Mapping[str, Any], code: int, tail: str, peak: int) -> EdgeError:
    if error := _resources(job, tail):
        return error
    last = " ".join(tail.strip().splitlines()[-3:])
    # A library that cannot start a thread or gets no memory need not say so before it aborts.
    if (limit := job.get("memory_limit")) and peak > NEAR_LIMIT * limit:
        return _over_limit(job, f" (it ended with code {code} at {peak / (1 << 20):.0f} MiB: {last})")
    if code == -signal.SIGKILL:
        return BuildError(
            f"The TensorRT build of '{job['name']}' was killed, most likely because the machine ran out of memory.",
            "Free memory or give --memory-limit, so that it ends with a message.",
        )
    return BuildError(
        f"The TensorRT build of '{job['name']}' ended with code {code}: {last}",
        "The builder crashed; check the memory that is free.",
    )


def _resources(job: Mapping[str, Any], text: str) -> EdgeError | None:
    """The error for a lack of memory or of a GPU, as far as TensorRT's words tell."""
    if _HOST_MEMORY.search(text):
        return _over_limit(job)
    if _DRIVER.search(text) and not _GRAPH_FAULT.search(text):
        return DeviceError(
            f"TensorRT finds no usable NVIDIA driver: {text.strip().splitlines()[-1][:300]}",
            "Run 'pixano-edge doctor'. Only TensorRT for RTX builds without a GPU, for the GPUs named by --target.",
        )
    if _DEVICE_MEMORY.search(text):
        return BuildError(
            f"The GPU has too little memory to build '{job['name']}': {text.strip()[:300]}",
            "Stop what else runs on it, or lower --workspace.",
        )
    return None


def _over_limit(job: Mapping[str, Any], detail: str = "") -> BuildError:
    limit = job.get("memory_limit")
    bound = f"the limit of {limit / (1 << 20):.0f} MiB" if limit else "what this machine has"
    return BuildError(
        f"Building '{job['name']}' needs more memory than {bound}{detail}.",
        "Raise --memory-limit, free memory, or build one graph at a time (--graph).",
    )
