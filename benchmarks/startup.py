"""How long `pixano-edge serve` takes to start, what the first request pays, and how much memory the service takes.

Every start is a process of its own. Bytecode is compiled before (as pip does at install) and files are in the system's
cache: what is timed is this program, not the disk. The very first start, with neither, is told beside the others.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import grounding_dino, owlv2, sam2
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.provider.needs import declared
from pixano_edge.engine.provider.settings import LoadOptions

from .metrics import latency
from .results import Bar
from .serving import SEGMENTATION, Client, ServerProcess, click_body, jpeg_uri, photo

DETECTION = "/v1/inference/detection"
DETECTORS = (*owlv2.FAMILIES, grounding_dino.FAMILY)
IMPORTED = "pixano_edge.engine.provider"

IMPORT_SECONDS = 0.25
DEMO_SECONDS = 2.0
REAL_SECONDS = 6.0
FIRST_RATIO = 1.2
ACTIVATIONS = 1.1
"""Bars of the project; the last one multiplies the measured peak of activations."""

WORDS = (
    ["circle", "red square"], ["star", "blue ring"], ["cross", "green heart"], ["triangle", "orange bar"],
    ["hexagon", "purple star"], ["crescent", "yellow circle"],
)  # fmt: skip
"""Classes of a detector's requests: no word twice with the same neighbour."""

_EMPTY = """
import sys
import cv2, onnxruntime, PIL.Image, pixano_edge.engine.server.run
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for line in open("/proc/self/status") if sys.platform == "linux" else ():
    if line.startswith("VmHWM:"):
        print(int(line.split()[1]) * 1024)
"""

_CHILD = f"""
import json, time
wall, cpu = time.perf_counter(), time.process_time()
import {IMPORTED}
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""


@contextmanager
def compiled_environment() -> Iterator[dict[str, str]]:
    """Variables for children that find and keep bytecode, whatever this process was told; in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="pixano-edge-bench-") as folder:
        yield {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}


def import_seconds(starts: int, environ: Mapping[str, str]) -> dict[str, Any]:
    """Import of `engine.provider` in new processes, after one that compiles; and the slowest modules.

    Returns:
        ``wall`` and ``cpu`` as of `metrics.Latency`, ``modules`` as (name, seconds of its own) of one run.
    """
    env = {**os.environ, **environ}
    found = []
    for _ in range(starts + 1):
        done = subprocess.run([sys.executable, "-c", _CHILD], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EdgeError(f"{IMPORTED} cannot be imported: {done.stderr[-500:]}", "Run: pixano-edge doctor")
        found.append(json.loads(done.stdout))
    traced = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {IMPORTED}"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wall, cpu = zip(*found[1:])
    return {"wall": asdict(latency(wall)), "cpu": asdict(latency(cpu)), "modules": slowest(traced.stderr)}


def slowest(text: str, count: int = 12) -> list[tuple[str, float]]:
    """Modules that took longest by themselves, in seconds, from what ``-X importtime`` writes."""
    found = []
    for line in text.splitlines():
        head, _, rest = line.partition("import time:")
        own, _, rest = rest.partition("|")
        if not head and own.strip().isdigit():
            found.append((rest.rpartition("|")[2].strip(), int(own) / 1e6))
    return sorted(found, key=lambda pair: -pair[1])[:count]


def measure(
    bundles: Sequence[Bundle],
    *,
    starts: int,
    threads: int,
    demo: bool = False,
    step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Everything; JSON-ready.

    Args:
        bundles: Served and loaded at start.
        starts: Of the server, and imports; the median counts.
        threads: CPU threads of the engine.
        demo: Whether the bundles are the packaged ones, which are served under their own names.
        step: Told what is timed.

    Raises:
        EdgeError: The server does not start, or refuses a request.
    """
    with compiled_environment() as environ, tempfile.TemporaryDirectory(prefix="pixano-edge-bench-") as store:
        names = {}
        for bundle in bundles:  # the store keeps the names of the packaged bundles for these
            name = bundle.manifest.name if demo else f"bench-{bundle.manifest.name}"
            names[name] = bundle
            if not demo:
                (Path(store) / name).symlink_to(bundle.root.resolve(), target_is_directory=True)
        settings = {
            **environ,
            "PIXANO_EDGE_THREADS": str(threads),
            "PIXANO_EDGE_DEVICE": "cpu",
            "PIXANO_EDGE_HOME": store,
        }
        preload = [word for name in names for word in ("--preload", name)]
        options = ("--jobs", "memory", "--log-level", "warning", *(("--demo",) if demo else ()))

        def started(*more: str) -> tuple[ServerProcess, float, float]:
            return start(Path(store), settings, (*options, *more), len(names) if more else 0)

        step("the very first start")
        server, _, very_first = started(*preload)
        server.close()
        step("import")
        imported = import_seconds(starts, environ)
        healthy, ready = [], []
        requests: list[dict[str, Any]] = []
        peaks: list[int | None] = []
        for turn in range(starts):
            step(f"start {turn + 1} of {starts}")
            server, alive, loaded = started(*preload)
            with server:
                healthy.append(alive)
                ready.append(loaded)
                requests.append(first_requests(server.port, names, turn))
                peaks.append(peak_bytes(server.process.pid))
        step("a server without a model")
        idle_server, _, _ = started()
        with idle_server:
            idle = peak_bytes(idle_server.process.pid)
        empty = empty_bytes(environ)
    memory = {**memory_parts(bundles, empty, peaks), "idle": idle}
    merged = [merge(names[task].manifest.name, [r[task] for r in requests]) for task in requests[0]]
    out = {
        "benchmark": "startup", "models": [bundle.manifest.name for bundle in bundles], "starts": starts,
        "import": imported,
        "cold_start": {"healthy": asdict(latency(healthy)), "ready": asdict(latency(ready)), "very_first": very_first},
        "requests": merged, "memory": memory,
    }  # fmt: skip
    return {**out, "bars": [{**asdict(bar), "met": bar.met} for bar in bars(out, demo)]}


def start(
    store: Path, settings: Mapping[str, str], options: tuple[str, ...], models: int, seconds: float = 600
) -> tuple[ServerProcess, float, float]:
    """A server that has loaded so many models; seconds until it answered at all, and until they were loaded.

    Raises:
        EdgeError: It does not start, or not all of them load.
    """
    begun = time.perf_counter()
    server = ServerProcess(store, settings, options, seconds)
    healthy = time.perf_counter() - begun
    try:
        with Client(server.port) as client:
            while True:
                status, answer = client.get("/v1/ready")
                told = json.loads(answer)
                if status == 200 and told["models_loaded"] >= models:
                    return server, healthy, time.perf_counter() - begun
                if status == 200 or time.perf_counter() - begun > seconds:
                    raise EdgeError(
                        f"{told['models_loaded']} of {models} models were loaded at start: {server.log()[-500:]}",
                        "Try by hand: pixano-edge serve --preload NAME",
                    )
                time.sleep(0.01)
    except BaseException:
        server.close()
        raise


def first_requests(port: int, names: Mapping[str, Bundle], seed: int, steady: int = 5) -> dict[str, dict[str, Any]]:
    """The first request of each model and those after it, each on another picture; and whether equal ones get equal
    answers. A language model is only loaded.

    A detector's first request brings words that were not asked for before, so those that it is held against bring
    other words each time; a repeat with the same words is cheaper, whenever it comes.

    Returns:
        By model: ``first`` (seconds), ``steady`` (a list), ``known_words`` (a list of repeats with the first words;
        empty for SAM 2) and ``different`` (answers to the first picture that differ).
    """
    found = {}
    pixels = photo(1.0, seed)
    images = []
    for turn in range(2 * steady + 1):
        one = pixels.copy()
        one[:32, :32] = 16 * turn
        images.append(jpeg_uri(one))
    with Client(port) as client:
        for name, bundle in names.items():
            segments = bundle.manifest.family == sam2.FAMILY
            if not segments and bundle.manifest.family not in DETECTORS:
                continue
            path = SEGMENTATION if segments else DETECTION

            def body(turn: int, words: int, name: str = name, segments: bool = segments) -> bytes:
                if segments:
                    x, y = pixels.shape[1] // 2, pixels.shape[0] // 2
                    return click_body(name, images[turn], x, y, returnLogits=False)
                asked = {"model": name, "image": images[turn], "classes": WORDS[words], "boxThreshold": 0.1}
                return json.dumps(asked).encode()

            # The first; others of its kind; repeats with its words; the first once more.
            turns = [(turn, turn) for turn in range(steady + 1)]
            turns += [] if segments else [(turn, 0) for turn in range(steady + 1, 2 * steady + 1)]
            answers, times = [], []
            for turn, words in [*turns, (0, 0)]:
                status, answer, taken = client.post(path, body(turn, words))
                if status != 200:
                    raise EdgeError(f"{name}: the server answered {status}: {answer[:300]!r}", "Look at its log.")
                answers.append(json.loads(answer)["data"])
                times.append(taken)
            found[name] = {
                "first": times[0], "steady": times[1 : steady + 1], "known_words": times[steady + 1 : -1],
                "different": int(answers[0] != answers[-1]),
            }  # fmt: skip
    return found


def merge(task: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all starts: first requests, later ones, and how many times slower the first one is, by medians."""
    first = latency([one["first"] for one in found])
    steady = latency([value for one in found for value in one["steady"]])
    known = [value for one in found for value in one["known_words"]]
    return {
        "task": task, "first": asdict(first), "steady": asdict(steady), "times_slower": first.p50 / steady.p50,
        **({"known_words": asdict(latency(known))} if known else {}),
        "different": sum(one["different"] for one in found),
    }  # fmt: skip


def peak_bytes(pid: int) -> int | None:
    """Largest resident set that a process ever had; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def empty_bytes(environ: Mapping[str, str]) -> int | None:
    """Largest resident set of a process with the server's code and libraries, ONNX Runtime among them, that opened no
    model; None where the system does not tell."""
    double = Path(str(importlib.resources.files("pixano_edge.engine.assets"))) / "double.onnx"
    done = subprocess.run(
        [sys.executable, "-c", _EMPTY, str(double)],
        env={**os.environ, **environ}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise EdgeError(f"The server's libraries do not load: {done.stderr[-500:]}", "Run: pixano-edge doctor")
    return int(done.stdout) if done.stdout.strip() else None


def memory_parts(bundles: Sequence[Bundle], empty: int | None, peaks: Sequence[int | None]) -> dict[str, Any]:
    """The server's peak and what it should not exceed: an empty process, one copy of the weights, the activations.

    Weights and activations are what the bundles declare for this device (activations were measured at export); models
    share the scratch memory of a device, so the largest counts.
    """
    told = [declared(bundle.root, LoadOptions(device="cpu")).use for bundle in bundles]
    weights = sum(use.weights or 0 for use in told)
    work = sum(use.activations or 0 for use in told) + max((use.shared or 0 for use in told), default=0)
    bound = sum(use.bindings or 0 for use in told)
    known = [p for p in peaks if p is not None]
    return {
        "peak": max(known) if known else None, "empty": empty, "weights": weights, "activations": work,
        "bindings": bound, "limit": None if empty is None else round(empty + weights + ACTIVATIONS * (work + bound)),
    }  # fmt: skip


def bars(out: Mapping[str, Any], demo: bool) -> list[Bar]:
    """The project's bars."""
    memory = out["memory"]
    seconds = DEMO_SECONDS if demo else REAL_SECONDS
    found = [
        Bar(
            f"import of {IMPORTED.removeprefix('pixano_edge.')}",
            out["import"]["wall"]["p50"],
            IMPORT_SECONDS,
            "<=",
            "s",
        ),
        Bar(
            f"serve until {len(out['models'])} models are ready", out["cold_start"]["ready"]["p50"], seconds, "<=", "s"
        ),
    ]
    found += [Bar(f"first request over later ones, {r['task']}", r["times_slower"], FIRST_RATIO, "<=", "x")
              for r in out["requests"]]  # fmt: skip
    if memory["limit"] is not None:
        text = f"peak memory (empty process + weights + {ACTIVATIONS} x activations and bound tensors)"
        found.append(Bar(text, memory["peak"], memory["limit"], "<=", "B"))
    return found


def module_rows(out: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Cells of the table of slow modules."""
    return [(name, f"{1000 * own:.1f}") for name, own in out["import"]["modules"]]


def table_rows(out: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Cells of the table of bars: bar, measured, wanted, whether it is met."""
    from .texts import bar_text, value_text

    return [
        (b.what, value_text(b.value, b.unit), f"{b.rule} {value_text(b.limit, b.unit)}", bar_text(b))
        for b in (Bar(**{k: v for k, v in one.items() if k != "met"}) for one in out["bars"])
    ]


COLUMNS = ("bar", "measured", "wanted", "")
