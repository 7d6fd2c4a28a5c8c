"""One report of a GPU box: tests, golden samples, engine builds and speed, in less than eight minutes.

``python -m pixano_edge.benchmarks.gpu_report --out report.md`` writes Markdown and, beside it, JSON. Every step is a
process with a time limit of its own. Ends with 0 when all that ran passed, 1 when something failed or hung, and 3
when nothing ran on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pixano_edge.engine.bundle import DEMO_NAME, DEMO_NAMES, Bundle
from pixano_edge.engine.cli.options import resolve_bundle
from pixano_edge.engine.cli.output import make_folder, note, replacing
from pixano_edge.engine.cli.probe import compiled_providers
from pixano_edge.engine.contracts.decoder import DECODER
from pixano_edge.engine.contracts.sam2 import FAMILY as SAM2
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.models.decoder.opening import FAMILIES as LANGUAGE_MODELS
from pixano_edge.engine.models.opening import ONNXRUNTIME, TENSORRT, combinations, target_of
from pixano_edge.engine.provider.hardware import Hardware, read_hardware

from .gpu_markdown import answers_text, to_markdown
from .report import environment, write_json
from .steps import Finished, Outcome, Reading, Step, last_line, run_steps

TOTAL_SECONDS = 470.0
"""Eight minutes, less what starting and writing take."""
NOT_ON_A_GPU = 3
"""Exit status when nothing failed and nothing ran on a GPU."""
GPU_PRECISIONS = ("fp32", "fp16", "int8", "int4")
NO_FLOAT32_ATTENTION = "ONNX Runtime's CUDA provider has GroupQueryAttention in half precision alone."
"""Why the decoder of a language model does not run there in a precision for which there is no graph of plain operators:
but fp16 they compute in float32 around that one."""
_TENSORRT_MODULES = ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings")

app = typer.Typer(add_completion=False)


def gpu_tests(tests: Path) -> list[str]:
    """Files below `tests` that have GPU tests, so that the others' needs (torch) do not matter on the box."""
    return sorted(str(f) for f in tests.rglob("test_*.py") if "mark.gpu" in f.read_text(encoding="utf-8"))


def _in_onnxruntime_alone(bundle: Bundle, precision: str) -> bool:
    return precision != "fp16" and target_of(bundle, DECODER, ONNXRUNTIME, precision, "cuda") == "onnx"


def make_steps(
    hardware: Hardware,
    bundles: Sequence[str],
    device: str,
    tests: Path | None,
    scratch: Path,
    checkpoint: Path | None = None,
    has: Callable[[str], bool] = lambda module: importlib.util.find_spec(module) is not None,
    providers: Callable[[], Sequence[str]] = compiled_providers,
) -> list[Step]:
    """What is run, in the order of importance: what comes late may find no time left.

    Args:
        hardware: Of this machine.
        bundles: Folders or names in the local store.
        device: ``cuda:N``.
        tests: The source tree's tests; None where only the package is installed.
        scratch: Folder for the steps' own files.
        checkpoint: For the comparison with PyTorch, of the first SAM 2.
        has: Whether a module is installed.
        providers: Of the installed ONNX Runtime.
    """
    edge = (sys.executable, "-m", "pixano_edge.engine.cli")
    no_gpu = "" if hardware.gpus else f"No GPU: {hardware.reason}"
    no_ort = no_gpu or _no_cuda_provider(providers)
    no_trt = no_gpu or ("" if any(map(has, _TENSORRT_MODULES)) else "TensorRT is not installed.")
    steps = [Step("doctor", (*edge, "doctor", "--json"), 90, read_doctor)]
    tested = False
    for name in bundles:
        where = ("--device", device, "--json")
        try:
            opened = Bundle.open(resolve_bundle(name), verify=False)
            family, precisions = opened.manifest.family, [p for p in GPU_PRECISIONS if p in opened.variants()]
            engines = [p for p in precisions if combinations(opened, "cuda", TENSORRT, p)]
            fused = [p for p in precisions if family in LANGUAGE_MODELS and _in_onnxruntime_alone(opened, p)]
            broken = ""
        except EdgeError as error:
            family, precisions, broken = SAM2, list(GPU_PRECISIONS[:1]), error.message
            engines, fused = precisions, []
        for precision in precisions:
            command = (*edge, "verify", name, "--backend", "onnxruntime", "--precision", precision, *where)
            label = f"verify {name}, ONNX Runtime {precision}"
            no_kernel = NO_FLOAT32_ATTENTION if precision in fused else ""
            steps.append(Step(label, command, 60, read_verify, skip=broken or no_ort or no_kernel))
        build = f"build {name}"
        options = [text for p in engines for text in ("--precision", p)]
        making = (*edge, "build", name, "--device", device, *options, "--json")
        steps.append(Step(build, making, 150, read_build, skip=broken or no_trt))
        first = family == SAM2 and not tested
        if first:  # now: TensorRT's tests need engines of the packaged bundle
            steps.append(_test_step(tests, scratch, has))
            tested = True
        for precision in engines:
            command = (*edge, "verify", name, "--backend", "tensorrt", "--precision", precision, *where)
            label = f"verify {name}, TensorRT {precision}"
            steps.append(Step(label, command, 60, read_verify, skip=broken or no_trt, after=build))
        extra = ("--checkpoint", str(checkpoint)) if checkpoint is not None and first else ()
        bench = (*edge, "bench", "gpu", name, *where, "--rounds", "30", *extra)
        other = "" if family == SAM2 else f"'bench gpu' measures SAM 2, not {family}."
        steps.append(Step(f"bench {name}", bench, 180, read_bench, skip=broken or no_gpu or other))
    if not tested:
        steps.append(_test_step(tests, scratch, has))
    return steps


def _no_cuda_provider(providers: Callable[[], Sequence[str]]) -> str:
    """Why ONNX Runtime is not checked on the GPU; native TensorRT serves without it, so that is no failure."""
    try:
        compiled = "CUDAExecutionProvider" in providers()
    except ImportError:
        return "ONNX Runtime is not installed."
    return "" if compiled else "This ONNX Runtime has no CUDA provider."


def _test_step(tests: Path | None, scratch: Path, has: Callable[[str], bool]) -> Step:
    name, result = "GPU tests", scratch / "tests.xml"
    if tests is None or not tests.is_dir():
        return Step(
            name, ("pytest", "-m", "gpu"), 0, _unread, skip="The tests are in the source tree only: give --tests."
        )
    files = gpu_tests(tests)
    if not files or not has("pytest"):
        why = "pytest is not installed: pip install pytest pytest-asyncio" if files else f"No GPU tests in '{tests}'."
        return Step(name, ("pytest", "-m", "gpu"), 0, _unread, skip=why)
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        f"--junitxml={result}",
        *files,
    )
    return Step(name, command, 150, lambda done: read_tests(done, result), folder=tests.parent)


def _unread(done: Finished) -> Reading:
    raise ValueError("the step was not to run")


def read_doctor(done: Finished) -> Reading:
    """Healthy, or the problems it found."""
    answer = _answer(done)
    problems = [f["message"] for f in answer["findings"] if f["level"] == "problem"]
    details = {key: answer[key] for key in ("gpus", "gpu_reason", "providers", "gpu_parts", "findings")}
    return Reading("failed" if problems else "passed", "; ".join(problems), details)


def read_tests(done: Finished, result: Path) -> Reading:
    """Counts and reasons of pytest's own report."""
    if not result.is_file():
        return Reading("failed", f"pytest ended with {done.code} and wrote no result. {last_line(done)}")
    counts, reasons, failures = Counter[str](), Counter[str](), []
    for case in ElementTree.parse(result).getroot().iter("testcase"):
        skipped = case.find("skipped")
        broken = next((b for b in (case.find("failure"), case.find("error")) if b is not None), None)
        if broken is not None:
            counts["failed"] += 1
            failures.append(f"{case.get('classname')}.{case.get('name')}: {(broken.get('message') or '')[:300]}")
        elif skipped is not None:
            counts["skipped"] += 1
            reasons[skipped.get("message") or "no reason given"] += 1
        else:
            counts["passed"] += 1
    details = {"counts": dict(counts), "skip_reasons": dict(reasons), "failures": failures}
    text = ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "no tests"
    if failures or done.code not in (0, 5):
        return Reading("failed", text if failures else f"{text}; pytest ended with {done.code}", details)
    if not counts["passed"]:
        why = "; ".join(f"{n}x {reason}" for reason, n in reasons.most_common(3))
        return Reading("skipped", f"{text} ({why})" if why else text, details)
    return Reading("passed", text, details)


def read_verify(done: Finished) -> Reading:
    """Whether the golden samples passed, with every figure."""
    answer = _answer(done)
    if said := _error(answer):
        return said
    if answer["passed"]:
        return Reading("passed", answers_text(answer), answer)
    suspect = answer.get("suspect") or {}
    look = f" Look at {suspect['graph']}, tensor '{suspect['tensor']}'." if suspect else ""
    return Reading("failed", "; ".join(answer["problems"]) + "." + look, answer)


def read_build(done: Finished) -> Reading:
    """Whether the engines were built."""
    answer = _answer(done)
    return _error(answer) or Reading(
        "passed" if done.code == 0 else "failed", last_line(done) if done.code else "", answer
    )


def read_bench(done: Finished) -> Reading:
    """Figures; what could not be measured is among them."""
    answer = _answer(done)
    if said := _error(answer):
        return said
    skipped = answer["skipped"]
    left_out = f"; {len(skipped)} way(s) not measured" if skipped else ""
    return Reading("passed", f"{len(answer['rows'])} figures{left_out}", answer)


def _answer(done: Finished) -> dict[str, Any]:
    """The JSON that a command printed last; ValueError where there is none."""
    answer = json.loads(done.out[done.out.index("{") :])
    if not isinstance(answer, dict):
        raise ValueError("not an object")
    return answer


def _error(answer: dict[str, Any]) -> Reading | None:
    """What an error of a command means: a library that is not installed is no failure of the box."""
    error = answer.get("error")
    if error is None:
        return None
    skipped = error["type"] == "MissingDependencyError"
    return Reading("skipped" if skipped else "failed", f"{error['message']} {error['action']}".strip())


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0, 1 or 3; see the module. `doctor` proves nothing about a GPU."""
    statuses = {o.status for o in outcomes}
    if statuses & {"failed", "timed out"}:
        return 1
    return 0 if any(o.status == "passed" and o.name != "doctor" for o in outcomes) else NOT_ON_A_GPU


def _source_tests() -> Path | None:
    """The tests beside a source tree's `benchmarks` folder."""
    folder = Path(__file__).resolve().parent.parent / "tests"
    return folder if (folder / "conftest.py").is_file() else None


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Markdown file; the JSON goes beside it.")] = Path("gpu-report.md"),
    bundle: Annotated[list[str] | None, typer.Option(help="Bundles to check; default: the packaged demos.")] = None,
    device: Annotated[str, typer.Option(help="cuda:N.")] = "cuda:0",
    checkpoint: Annotated[Path | None, typer.Option(help="Of the first SAM 2, for PyTorch beside it.")] = None,
    tests: Annotated[Path | None, typer.Option(help="Folder of the tests; default: that of the source tree.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Wall-clock limit of everything.")] = TOTAL_SECONDS,
) -> None:
    """Run all GPU tests, golden samples and benchmarks of this box and write one report."""
    hardware = read_hardware()
    with tempfile.TemporaryDirectory(prefix="pixano-edge-report-") as scratch:
        # SAM 2 first: what comes late may find no time left.
        bundles = bundle or sorted(DEMO_NAMES, key=lambda name: name != DEMO_NAME)
        steps = make_steps(hardware, bundles, device, tests or _source_tests(), Path(scratch), checkpoint)
        outcomes = run_steps(steps, seconds, say=note)
    status = exit_status(outcomes)
    content = {
        "report": "gpu",
        "device": device,
        "exit_status": status,
        "gpu_reason": hardware.reason,
        "environment": environment(None),
        "steps": [o.to_dict() for o in outcomes],
    }
    make_folder(out.parent)
    with replacing(out) as partial:
        partial.write_text(to_markdown(content), encoding="utf-8")
    write_json(out.with_suffix(".json"), content)
    for outcome in outcomes:
        note(f"{outcome.status:>9}  {outcome.name}  {outcome.reason}")
    note(f"Report: {out} and {out.with_suffix('.json')}")
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
