"""The report of a GPU box: each step on its own, an honest word for what did not run, Markdown and JSON."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixano_edge.benchmarks import gpu_report
from pixano_edge.benchmarks.gpu_markdown import answers_text, to_markdown
from pixano_edge.benchmarks.gpu_report import exit_status, make_steps, read_tests
from pixano_edge.benchmarks.report import environment
from pixano_edge.benchmarks.steps import Finished, Outcome, Reading, Step, run_command, run_steps
from pixano_edge.engine.cli.output import to_json
from pixano_edge.engine.provider.hardware import Hardware
from pixano_edge.engine.runtime import DeviceInfo

GPU = DeviceInfo("Some GPU", "cuda", 0, "8.9", "600.1", "CUDA 13.0", 24 * 10**9)
NO_GPU = Hardware(2, None, None, (), "No NVIDIA driver answers.")
ONE_GPU = Hardware(2, None, None, (GPU,), None)
DEMO = "sam2-demo"
ALL = ["CUDAExecutionProvider", "CPUExecutionProvider"]

VERIFIED = {
    "passed": True,
    "backend": "onnxruntime",
    "precision": "fp32",
    "product": "Some GPU",
    "samples": 2,
    "mean_iou": 0.9999,
    "min_iou": 0.9995,
    "problems": [],
    "warnings": [],
    "suspect": None,
    "tensors": [{"name": "masks", "graph": "mask_decoder", "max_rel": 1e-5, "tolerance": 1e-4, "max_abs": None}],
}
LATENCY = {"p50": 0.01, "p90": 0.02, "p99": 0.03, "mean": 0.01, "count": 3}
BENCHED = {
    "rows": [
        {
            "case": "encoder",
            "contender": "TensorRT fp16, graph",
            "wall": LATENCY,
            "device": LATENCY,
            "ratio": 3.0,
            "relative_error": 1e-3,
            "mask_iou": None,
        }
    ],
    "starts": {"TensorRT fp16, graph": {"load": 1.0, "first": 0.5, "settle": 0.2, "recorded": True, "memory": 10**9}},
    "powers": {"TensorRT fp16, graph": {"watts": 99.0, "joules": 1.5, "calls": 60}},
    "skipped": {"PyTorch CUDA fp32": "Without --checkpoint there are no weights."},
    "warnings": {"TensorRT fp16, graph": ["a warning"]},
}
FAILED_VERIFY = {
    **VERIFIED,
    "passed": False,
    "problems": ["masks: mean IoU 0.9000 < 0.99"],
    "suspect": {"graph": "mask_decoder", "tensor": "masks", "advice": ["look there"]},
}
DIAGNOSED = {
    "findings": [{"level": "note", "message": "a note", "action": "do it"}],
    "gpus": [],
    "gpu_reason": "",
    "providers": [{"name": "CUDAExecutionProvider", "loads": True, "reason": ""}],
    "gpu_parts": [{"name": "TensorRT (Python)", "version": "10.16", "works": True, "reason": "10.16 for CUDA 13"}],
}


def passes(_: Finished) -> Reading:
    return Reading("passed", "fine")


def step(name: str, *code: str, limit: float = 60, **kwargs: Any) -> Step:
    return Step(name, (sys.executable, "-c", *code), limit, kwargs.pop("read", passes), **kwargs)


def test_a_step_that_hangs_or_breaks_stops_no_other() -> None:
    def malformed(done: Finished) -> Reading:
        raise ValueError("no JSON")

    outcomes = run_steps(
        [
            step("hangs", "import time; time.sleep(60)", limit=1.0),
            step("breaks", "import sys; print('the last words', file=sys.stderr); sys.exit(3)", read=malformed),
            Step("absent", ("/no/such/program",), 5, passes),
            step("works", "pass"),
            step("needs", "pass", after="breaks"),
        ],
        120,
    )
    assert [o.status for o in outcomes] == ["timed out", "failed", "failed", "passed", "skipped"]
    assert "No end within 1 s" in outcomes[0].reason
    assert outcomes[0].seconds < 20
    assert "Ended with 3" in outcomes[1].reason
    assert "the last words" in outcomes[1].reason
    assert "could not be started" in outcomes[2].reason
    assert "'breaks' failed" in outcomes[4].reason


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(8); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    begin = time.monotonic()
    done = run_command((sys.executable, "-c", parent), 4.0)
    assert done.code is None
    time.sleep(max(0.0, begin + 14 - time.monotonic()))
    assert not mark.exists()


def test_the_total_is_kept() -> None:
    now = [0.0]
    limits: list[float] = []

    def run(command: Sequence[str], limit: float, folder: Path | None) -> Finished:
        limits.append(limit)
        now[0] += limit
        return Finished(0, "", "", limit)

    steps = [Step(str(i), ("x",), 150, passes) for i in range(5)]
    outcomes = run_steps(steps, 470, run=run, clock=lambda: now[0])
    assert limits == [150, 150, 150, 20]
    assert outcomes[4].status == "skipped"
    assert outcomes[4].reason == "No time left of 470 s."
    assert now[0] <= 470


def test_without_a_gpu_every_step_that_needs_one_says_why(tmp_path: Path) -> None:
    steps = make_steps(NO_GPU, [DEMO], "cuda:0", None, tmp_path)
    by_name = {s.name: s for s in steps}
    assert by_name["doctor"].skip == ""
    assert "source tree" in by_name["GPU tests"].skip
    others = [s for s in steps if s.name not in ("doctor", "GPU tests")]
    assert others
    assert all(s.skip == "No GPU: No NVIDIA driver answers." for s in others)


def test_with_a_gpu_everything_runs_and_tensorrt_only_where_it_is(tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_a.py").write_text(f"pytestmark = pytest.{'mark'}.gpu\n")  # in two parts: this file is none of them
    (tests / "test_b.py").write_text("import torch\n")
    steps = {
        s.name: s
        for s in make_steps(ONE_GPU, [DEMO], "cuda:0", tests, tmp_path, has=lambda m: True, providers=lambda: ALL)
    }
    assert not any(s.skip for s in steps.values())
    assert [f for f in steps["GPU tests"].command if f.endswith(".py")] == [str(tests / "test_a.py")]
    assert steps["GPU tests"].folder == tmp_path
    assert steps[f"verify {DEMO}, TensorRT fp16"].after == f"build {DEMO}"
    # TensorRT's tests need engines: they are built before.
    assert list(steps).index(f"build {DEMO}") < list(steps).index("GPU tests") < list(steps).index(f"bench {DEMO}")
    assert {s.split(",")[0] for s in steps} >= {"doctor", f"verify {DEMO}", f"build {DEMO}", f"bench {DEMO}"}
    plain = {
        s.name: s
        for s in make_steps(
            ONE_GPU, [DEMO], "cuda:0", tests, tmp_path, has=lambda m: m == "pytest", providers=lambda: ALL
        )
    }
    assert plain[f"build {DEMO}"].skip == "TensorRT is not installed."
    assert not plain[f"verify {DEMO}, ONNX Runtime fp32"].skip
    cpu = make_steps(ONE_GPU, [DEMO], "cuda:0", tests, tmp_path, providers=lambda: ["CPUExecutionProvider"])
    assert next(s for s in cpu if "ONNX Runtime" in s.name).skip == "This ONNX Runtime has no CUDA provider."
    assert not next(s for s in cpu if s.name.startswith("bench")).skip
    missing = {
        s.name: s
        for s in make_steps(ONE_GPU, ["no-such"], "cuda:0", None, tmp_path, has=lambda m: True, providers=lambda: ALL)
    }
    assert "no-such" in missing["bench no-such"].skip


def test_each_family_gets_the_steps_that_it_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["grounding-dino-demo", "smolvlm-demo"]
    steps = {
        s.name: s
        for s in make_steps(ONE_GPU, names, "cuda:0", None, tmp_path, has=lambda m: True, providers=lambda: ALL)
    }
    assert "measures SAM 2" in steps["bench grounding-dino-demo"].skip
    assert not steps["verify grounding-dino-demo, ONNX Runtime fp32"].skip
    assert not steps["verify smolvlm-demo, ONNX Runtime fp32"].skip  # its decoder has a form of plain operators
    assert not steps["verify smolvlm-demo, ONNX Runtime fp16"].skip
    assert not steps["verify smolvlm-demo, TensorRT fp32"].skip
    monkeypatch.setattr(gpu_report, "target_of", lambda *_: "onnx")
    steps = {
        s.name: s
        for s in make_steps(ONE_GPU, names, "cuda:0", None, tmp_path, has=lambda m: True, providers=lambda: ALL)
    }
    assert "half precision" in steps["verify smolvlm-demo, ONNX Runtime fp32"].skip
    assert not steps["verify smolvlm-demo, ONNX Runtime fp16"].skip


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"tokens": 64, "equal": 63, "ties": 1}, "63 of 64 tokens are PyTorch's, 1 more are ties"),
        ({"boxes": 10, "unmatched": 1, "max_box": 0.5, "max_score": 0.01}, "10 boxes, 1 without a partner"),
        ({"mean_iou": 0.99, "min_iou": 0.5}, "mean 0.9900, lowest 0.5000"),
    ],
)
def test_answers_of_each_family_are_told(answer: dict[str, float], said: str) -> None:
    assert said in answers_text(answer)


def test_commands_exist(tmp_path: Path) -> None:
    """Every option that the steps use is one of the command's own."""
    for one in make_steps(ONE_GPU, [DEMO], "cuda:0", None, tmp_path, tmp_path, has=lambda m: True):
        if one.name == "GPU tests":
            continue
        words = one.command[3:]  # after "python -m pixano_edge.engine.cli"
        package = "pixano_edge.benchmarks.cli" if words[0] == "bench" else f"pixano_edge.engine.cli.{words[0]}"
        app = importlib.import_module(package).app
        shown = CliRunner().invoke(app, [*words[1:2], "--help"] if words[0] == "bench" else ["--help"])
        assert shown.exit_code == 0, shown.output
        for option in (w for w in words if w.startswith("--")):
            assert option in shown.output, (one.name, option)


JUNIT = """<testsuites><testsuite name="pytest">
<testcase classname="a" name="ok"/>
<testcase classname="a" name="bad"><failure message="boom">trace</failure></testcase>
<testcase classname="a" name="no"><skipped message="no CUDA device on this machine"/></testcase>
</testsuite></testsuites>"""


TESTS = Path(__file__).resolve().parents[1]
COLLECT = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(["-m", "gpu", "-q", "--co", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_gpu_tests_collect_on_a_box_without_the_export_stack() -> None:
    """One file that does not import would keep pytest from running any of them."""
    absent = ("torch", "transformers", "onnx", "onnxscript", "skimage", "psutil", "tensorrt_rtx_bindings")
    files = gpu_report.gpu_tests(TESTS)
    assert len(files) >= 5
    done = run_command([sys.executable, "-c", COLLECT.format(absent=absent), *files], 120, TESTS.parent)
    assert done.code == 0, done.out + done.err
    for file in files:
        assert Path(file).name in done.out or "onnx" in Path(file).read_text(), file


def test_pytest_results_are_read(tmp_path: Path) -> None:
    file = tmp_path / "tests.xml"
    assert read_tests(Finished(4, "", "usage: no", 1), file).status == "failed"
    file.write_text(JUNIT)
    reading = read_tests(Finished(1, "", "", 1), file)
    assert reading.status == "failed"
    assert reading.reason == "1 failed, 1 passed, 1 skipped"
    assert reading.details["failures"] == ["a.bad: boom"]
    file.write_text(JUNIT.replace('<failure message="boom">trace</failure>', ""))
    assert read_tests(Finished(0, "", "", 1), file).status == "passed"
    assert read_tests(Finished(2, "", "", 1), file).status == "failed"  # interrupted
    file.write_text('<testsuite><testcase name="no"><skipped message="no GPU"/></testcase></testsuite>')
    only = read_tests(Finished(0, "", "", 1), file)
    assert (only.status, only.reason) == ("skipped", "1 skipped (1x no GPU)")


def done(answer: Any, code: int = 0) -> Finished:
    return Finished(code, "noise before\n" + to_json(answer), "", 1.0)


def test_answers_of_the_commands_are_read() -> None:
    assert gpu_report.read_verify(done(VERIFIED)).status == "passed"
    failed = gpu_report.read_verify(done(FAILED_VERIFY, 1))
    assert failed.status == "failed"
    assert "Look at mask_decoder, tensor 'masks'." in failed.reason
    error = {"error": {"type": "MissingDependencyError", "message": "No TensorRT.", "action": "pip install x"}}
    assert gpu_report.read_build(done(error, 1)) == Reading("skipped", "No TensorRT. pip install x")
    error["error"]["type"] = "DeviceError"
    assert gpu_report.read_verify(done(error, 1)).status == "failed"
    assert gpu_report.read_bench(done(error, 1)).status == "failed"
    assert gpu_report.read_bench(done(BENCHED)).reason == "1 figures; 1 way(s) not measured"
    assert gpu_report.read_doctor(done(DIAGNOSED)).status == "passed"
    broken = {**DIAGNOSED, "findings": [{"level": "problem", "message": "no driver", "action": ""}]}
    assert gpu_report.read_doctor(done(broken, 1)).reason == "no driver"
    with pytest.raises(ValueError, match="not found"):
        gpu_report.read_verify(Finished(1, "Traceback", "", 1.0))


def outcome(name: str, status: Any, reason: str = "", details: dict[str, Any] | None = None) -> Outcome:
    return Outcome(name, status, 1.0, reason, f"run {name}", details or {})


def test_exit_status() -> None:
    doctor = outcome("doctor", "passed")
    assert exit_status([doctor, outcome("x", "skipped")]) == 3
    assert exit_status([doctor, outcome("x", "passed"), outcome("y", "skipped")]) == 0
    assert exit_status([outcome("x", "passed"), outcome("y", "timed out")]) == 1


def content(gpus: list[DeviceInfo], outcomes: list[Outcome], reason: str | None = None) -> dict[str, Any]:
    facts = json.loads(to_json({**environment(None), "gpus": gpus}))
    steps = [o.to_dict() for o in outcomes]
    return {"device": "cuda:0", "gpu_reason": reason, "environment": facts, "steps": steps}


def test_markdown_names_device_and_figures() -> None:
    text = to_markdown(
        content(
            [GPU],
            [
                outcome("doctor", "passed", details=DIAGNOSED),
                outcome("GPU tests", "passed", "3 passed", {"failures": [], "skip_reasons": {"no TensorRT": 2}}),
                outcome("verify sam2-demo, TensorRT fp16", "failed", "a | b", FAILED_VERIFY),
                outcome("bench sam2-demo", "passed", details=BENCHED),
                outcome("build x", "skipped", "TensorRT is not installed."),
            ],
        )
    )
    for words in (
        "Run on Some GPU (cuda:0). Steps: 3 passed, 1 failed, 1 skipped.",
        "compute capability 8.9, driver 600.1, CUDA 13.0, 24.0 GB",
        "| build x | skipped | 1.0 | TensorRT is not installed. |",
        "| verify sam2-demo, TensorRT fp16 | **failed** | 1.0 | a \\| b |",
        "skipped 2x: no TensorRT",
        "| masks | mask_decoder | 1.0e-05 | 1.0e-04 | n/a |",
        "- look at: look there",
        "| encoder | TensorRT fp16, graph | 10.00 | 20.00 | 30.00 | 10.00 | 3.00x | 1.0e-03 | n/a |",
        "| TensorRT fp16, graph | 1.00 | 0.50 | 0.20 | 1000 | 99 | 1.50 |",
        "- not measured: PyTorch CUDA fp32: Without --checkpoint",
        "- note: a note Fix: `do it`",
        "| TensorRT (Python) | 10.16, loads | 10.16 for CUDA 13 |",
    ):
        assert words in text


def test_markdown_says_first_that_nothing_ran_on_a_gpu() -> None:
    text = to_markdown(content([], [outcome("bench x", "skipped", "No GPU: none")], "No NVIDIA driver answers."))
    assert text.splitlines()[2].startswith("**Nothing was run on a GPU.** No NVIDIA driver answers.")


def test_the_script_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "read_hardware", lambda: NO_GPU)
    monkeypatch.setattr(
        gpu_report, "run_steps", lambda steps, total, say: [outcome("doctor", "passed", details=DIAGNOSED)]
    )
    file = tmp_path / "sub" / "report.md"
    result = CliRunner().invoke(gpu_report.app, ["--out", str(file)])
    assert result.exit_code == 3, result.output
    assert "Nothing was run on a GPU" in file.read_text()
    assert json.loads(file.with_suffix(".json").read_text())["exit_status"] == 3
