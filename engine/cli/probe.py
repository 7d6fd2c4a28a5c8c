"""Which ONNX Runtime providers really load: each is tried in a child process on a graph of one node.

``onnxruntime.get_available_providers()`` says what was compiled in. A provider whose libraries are missing falls
back to the CPU in silence, and a broken driver can end the process, so each try has a process of its own.
"""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
from dataclasses import dataclass

import typer

TIMEOUT_SECONDS = 120.0
# Sends requests to a cloud service; never used by pixano-edge.
_REMOTE = ("AzureExecutionProvider",)


@dataclass(frozen=True)
class ProviderState:
    """One provider: compiled into this ONNX Runtime, and whether a session on it really opened and ran."""

    name: str
    loads: bool
    reason: str = ""


def probe_graph() -> bytes:
    """``y = x + x`` on float32[4] (made by tests/support/make_double_onnx.py)."""
    return importlib.resources.files("pixano_edge.engine.assets").joinpath("double.onnx").read_bytes()


def try_provider(provider: str) -> tuple[bool, str]:
    """Opens and runs the probe graph on `provider` in this process; the second value is the reason for a no.

    ONNX Runtime's own exceptions pass through: in the child process they end it, and the parent reads the log.
    """
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(probe_graph(), options, providers=[provider])
    values = session.run(None, {"x": np.arange(4, dtype=np.float32)})[0]
    if session.get_providers()[0] != provider:
        return False, f"fell back to {session.get_providers()[0]}"
    if list(values) != [0.0, 2.0, 4.0, 6.0]:
        return False, f"computed {list(values)} instead of [0, 2, 4, 6]"
    return True, ""


def _native_reason(stderr: str) -> str:
    """The part of ONNX Runtime's log that names what is missing."""
    for line in stderr.splitlines():
        for mark in ("Failed to load", "error code", "cannot open shared object", "CUDA failure", "CUDA error"):
            if mark in line:
                return line[line.find(mark) :].strip()[:300] if mark == "Failed to load" else line.strip()[-300:]
    lines = stderr.strip().splitlines()
    return lines[-1][-300:] if lines else ""


def probe_provider(provider: str, timeout: float = TIMEOUT_SECONDS) -> ProviderState:
    """Tries one provider in a child process."""
    if provider in _REMOTE:
        return ProviderState(provider, False, "not tried: calls a remote service, pixano-edge never uses it")
    command = [sys.executable, "-m", "pixano_edge.engine.cli.probe", provider]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return ProviderState(provider, False, f"no answer within {timeout:.0f} s")
    if done.returncode:
        reason = _native_reason(done.stderr)
        return ProviderState(provider, False, f"the try ended with code {done.returncode}. {reason}".strip())
    answer = json.loads(done.stdout.splitlines()[-1])
    reason = answer["reason"]
    if not answer["loads"]:
        reason = f"{reason}. {_native_reason(done.stderr)}".strip(". ")
    return ProviderState(provider, answer["loads"], reason)


def compiled_providers() -> list[str]:
    """Providers compiled into the installed ONNX Runtime; raises ImportError without one."""
    import onnxruntime as ort

    return list(ort.get_available_providers())


if __name__ == "__main__":
    loads, why = try_provider(sys.argv[1])
    typer.echo(json.dumps({"loads": loads, "reason": why}))
