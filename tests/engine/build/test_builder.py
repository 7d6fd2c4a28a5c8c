"""The parent's side: what the child says, how it ends, and that nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.build import builder
from pixano_edge.engine.build.builder import check_problems, run_child
from pixano_edge.engine.errors import BuildError, CancelledError, DeviceError, EdgeError, MissingDependencyError

JOB = {"action": "build", "name": "mask_decoder", "flavour": "tensorrt_rtx"}
START = "import json, os, signal, sys, time\njob = json.loads(sys.stdin.readline())\n"


def use(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a script in the child's place."""
    monkeypatch.setattr(builder, "child_command", lambda: [sys.executable, "-c", START + script])


def test_progress_comes_while_it_runs_and_the_result_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    use(
        monkeypatch,
        "for i in range(3): print(json.dumps({'event': 'progress', 'phase': f'p{i}', 'fraction': i / 3}), flush=True)\n"
        "print(json.dumps({'event': 'result', 'name': job['name']}), flush=True)",
    )
    seen: list[tuple[str, float]] = []
    answer = run_child(JOB, progress=lambda phase, fraction: seen.append((phase, fraction)))
    assert answer["name"] == "mask_decoder"
    assert [phase for phase, _ in seen] == ["p0", "p1", "p2"]


@pytest.mark.parametrize(
    ("script", "kind", "message", "action"),
    [
        ("sys.exit(7)", BuildError, "ended with code 7", "memory"),
        ("sys.stderr.write('first\\nSegmentation fault\\n'); sys.exit(1)", BuildError, "Segmentation fault", "memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", BuildError, "killed, most likely", "--memory-limit"),
        ("print('{\"event\": \"pro', end='')", BuildError, "ended with code 0", ""),
        ("sys.stderr.write('std::bad_alloc'); os.abort()", BuildError, "the limit of 300 MiB", "--memory-limit"),
        ("raise MemoryError", BuildError, "the limit of 300 MiB", "--memory-limit"),
        (
            "print(json.dumps({'event': 'failure', 'kind': 'DeviceError', 'message': 'm', 'action': 'a'}))",
            DeviceError,
            "m",
            "a",
        ),
        (
            "print(json.dumps({'event': 'failure', 'kind': 'Odd', 'message': 'm', 'action': 'a'}))",
            BuildError,
            "m",
            "a",
        ),
        (
            "print(json.dumps({'event': 'failure', 'kind': 'MissingDependencyError', 'message': 'm', 'action': 'a'}))",
            MissingDependencyError,
            "tensorrt_rtx",
            "pixano-edge[tensorrt-rtx]",
        ),
    ],
)
def test_each_end_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, script: str, kind: type[EdgeError], message: str, action: str
) -> None:
    use(monkeypatch, script)
    with pytest.raises(kind) as caught:
        run_child(JOB | {"memory_limit": 300 << 20})
    assert message in caught.value.message
    assert action in caught.value.action


@pytest.mark.parametrize(("limit", "words"), [(64 << 20, "more memory than the limit of 64 MiB"), (8 << 30, "code -6")])
def test_a_crash_near_the_limit_is_taken_for_it(monkeypatch: pytest.MonkeyPatch, limit: int, words: str) -> None:
    """Seen from TensorRT: 'terminate called without an active exception' where a thread got no stack."""
    use(
        monkeypatch,
        "held = bytearray(100 << 20)\n"
        "print(json.dumps({'event': 'progress', 'phase': 'p', 'fraction': 0}), flush=True)\n"
        "time.sleep(1)\nsys.stderr.write('terminate called without an active exception'); sys.stderr.flush()\n"
        "os.abort()",
    )
    with pytest.raises(BuildError) as caught:
        run_child(JOB | {"memory_limit": limit})
    assert words in caught.value.message
    assert "without an active exception" in caught.value.message


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "time.sleep(60)")
    with pytest.raises(BuildError, match="took over 1 s"):
        run_child(JOB, timeout=1.0)


@pytest.mark.parametrize("stop", [CancelledError("Stopped."), KeyboardInterrupt()])
def test_cancelling_kills_the_child_before_it_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: BaseException
) -> None:
    note = tmp_path / "pid"
    use(
        monkeypatch,
        f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"open({str(note)!r} + '.new', 'w').write(str(os.getpid())); os.rename({str(note)!r} + '.new', {str(note)!r})\n"
        "time.sleep(60)",
    )

    def check() -> None:
        if note.exists():
            raise stop

    with pytest.raises(type(stop)):
        run_child(JOB, check=check)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


PARENT = """
import sys
from pixano_edge.engine.build.builder import run_child
def tell(phase, fraction):
    print("running", flush=True)
run_child({"action": "build", "name": "g", "flavour": "tensorrt_rtx", "wait": True}, progress=tell)
"""


def test_a_killed_parent_leaves_no_child(tmp_path: Path) -> None:
    """The real child's watch on stdin, with its job replaced by sleeping."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys, threading, time\n"
        "from pixano_edge.engine.build.child import _end_with_parent\n"
        "sys.stdin.readline()\n"
        "threading.Thread(target=_end_with_parent, daemon=True).start()\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "print(json.dumps({'event': 'progress', 'phase': 'p', 'fraction': 0}), flush=True)\n"
        "time.sleep(120)\n"
    )
    patch = (
        "import pixano_edge.engine.build.builder as b, sys\n"
        f"b.child_command = lambda: [sys.executable, {str(script)!r}]\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", patch + PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"running\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while _alive(pid):
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("problem", "kind", "words"),
    [
        ("Unsupported operator BitShift", BuildError, "does not take 'mask_decoder'"),
        ("Unexpected exception std::bad_alloc In compileGraph", BuildError, "more memory than what this machine has"),
        ("CUDA initialization failure with error: 35 (cudaError 35: ...)", DeviceError, "no usable NVIDIA driver"),
        ("OutOfMemory (Requested size was 4294967296 bytes.)", BuildError, "GPU has too little memory"),
    ],
)
def test_problems_that_tensorrt_names(problem: str, kind: type[EdgeError], words: str) -> None:
    answer: dict[str, Any] = {"problems": [problem, problem]}
    with pytest.raises(kind) as caught:
        check_problems(JOB, answer)
    assert words in caught.value.message
    assert caught.value.message.count(problem) <= 1
    check_problems(JOB, {"problems": []})
