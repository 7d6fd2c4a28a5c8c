"""`bench all`: every part is there whatever becomes of it, and a fast wrong answer fails the run."""

from __future__ import annotations

import html
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixano_edge.benchmarks import plan, power_mode, run_all
from pixano_edge.benchmarks.page import to_page
from pixano_edge.benchmarks.readings import READERS, read_describe, read_detect, read_startup, read_track
from pixano_edge.benchmarks.results import Figure, parse_run, read_run
from pixano_edge.benchmarks.steps import Finished
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.cli.output import to_json
from pixano_edge.engine.errors import EdgeError
from tests.support.bench_run import MEMORY, Answers, example_run, segment_output, times


def _invoke(*args: object):
    return CliRunner().invoke(app, ["bench", *(str(a) for a in args)])


_run_all = run_all.run_all


def _all(monkeypatch: pytest.MonkeyPatch, answers: Answers, *args: object):
    monkeypatch.setattr(run_all, "run_all", lambda *a, **k: _run_all(*a, **k, run=answers))
    return _invoke("all", *args)


def test_every_part_has_a_command_and_a_reader() -> None:
    for size in plan.SIZES:
        planned = plan.make_plan(plan.Wanted(size, (*plan.PARTS, *plan.MORE), threads=3))
        assert {p.name for p in planned} == set(READERS) - (set() if size == "demo" else {"graphs-detect"})
        for one in planned:
            assert one.command[1:4] == ("-m", "pixano_edge.engine.cli", "bench")
            assert one.command[-1] == "--json"
            assert one.text.startswith("pixano-edge bench ")
            assert "--threads 3" in one.text
    described = next(p for p in plan.make_plan(plan.Wanted()) if p.name == "describe")
    packaged = plan.demo_vlm()
    assert described.arguments[1:3] == (("--size", "tiny") if packaged is None else ("--bundle", packaged))
    with pytest.raises(EdgeError, match="huge"):
        plan.make_plan(plan.Wanted("huge"))
    with pytest.raises(EdgeError, match="nothing"):
        plan.make_plan(plan.Wanted("demo", ("nothing",)))


def test_the_planned_commands_have_their_options() -> None:
    """Each command is parsed by the real application: an option that does not exist would fail the part."""
    from typer.main import get_command

    from pixano_edge.benchmarks.cli import app as bench

    group = get_command(bench)
    for size in ("demo", "tiny"):
        for quick in (False, True):
            wanted = plan.Wanted(size, (*plan.PARTS, *plan.MORE), quick, compiled=True)
            for one in plan.make_plan(wanted):
                name, *words = one.arguments
                command = group.commands[name]  # type: ignore[attr-defined]
                command.make_context(name, [*words, "--json"], resilient_parsing=False)


def test_figures_page_and_exit_status_of_a_good_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = Answers(segment=segment_output(), memory=MEMORY)
    file, page = tmp_path / "figures.json", tmp_path / "page.html"
    args = ("--only", "memory", "--only", "segment", "--threads", 1, "-o", file, "--page", page)
    result = _all(monkeypatch, answers, *args)
    assert result.exit_code == 0, result.output
    run = read_run(file)
    assert [p.name for p in run.parts] == ["segment", "memory"]
    assert all(p.status == "passed" for p in run.parts)
    figure = run.parts[0].figures[0]
    assert (figure.case, figure.contender, figure.value) == ("encoder", "pixano-edge fp32", 0.5)
    assert figure.ratio == pytest.approx(2)
    assert "encoder" in result.stdout
    assert "1.60x" in result.stdout  # ahead of PyTorch bf16, the fastest other one
    assert "2 of 2 accuracy checks passed" in result.stdout
    assert "not measured: OpenVINO fp32: not installed" in result.stdout
    assert run.environment["power"].keys() == power_mode.read_power_mode().keys()
    assert page.read_text() == to_page(run)
    again = _invoke("page", file, "-o", tmp_path / "again.html")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.html").read_text() == page.read_text()


@pytest.mark.parametrize(("wrong", "said"), [({"iou": 0.9}, "mask IoU"), ({"error": 0.01}, "relative error")])
def test_a_fast_wrong_answer_fails_the_run(wrong: dict, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _all(monkeypatch, Answers(segment=segment_output(engine=0.001, **wrong)), "--only", "segment")
    assert result.exit_code == 2, result.output
    assert f"WRONG: segment: pixano-edge fp32: {said}" in result.stdout


def test_what_fails_hangs_or_is_missing_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"error": {"type": "MissingDependencyError", "message": "Needs 'torch'.", "action": "pip install x"}}
    failed = {"error": {"type": "BundleError", "message": "No bundle.", "action": "Make one."}}
    answers = Answers(
        segment=Finished(1, json.dumps(missing), "", 1.0), track=Finished(1, json.dumps(failed), "", 1.0),
        detect=Finished(None, "", "last words", 9.0), serve=Finished(-9, "", "Killed", 1.0),
        startup=Finished(0, '{"benchmark": "startup"}', "", 1.0), memory=MEMORY,
    )  # fmt: skip
    only = [w for name in ("segment", "track", "detect", "serve", "startup", "memory") for w in ("--only", name)]
    result = _all(monkeypatch, answers, *only, "--limit", 9, "--json")
    assert result.exit_code == 1, result.output
    run = parse_run(json.loads(result.stdout), "stdout")
    states = {p.name: (p.status, p.reason) for p in run.parts}
    assert states["segment"] == ("unavailable", "Needs 'torch'. pip install x")
    assert states["track"] == ("failed", "No bundle. Make one.")
    assert states["detect"][0] == states["detect-dino"][0] == "timed out"
    assert "last words" in states["detect"][1]
    assert states["serve"][0] == "failed"
    assert "Killed" in states["serve"][1]
    assert states["startup"][0] == "failed"
    assert states["memory"] == ("passed", "")
    page = to_page(run)
    for _, reason in states.values():
        assert html.escape(reason) in page
    # What is only missing here is no failure.
    answers = Answers(segment=Finished(1, json.dumps(missing), "", 1.0), memory=MEMORY)
    assert _all(monkeypatch, answers, "--only", "segment", "--only", "memory").exit_code == 0


class _Tags(HTMLParser):
    """Which tags a page has, whether they are closed, and everything it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in ("meta", "path", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "circle"):
            assert self.open.pop() == tag


def test_the_page_is_whole_loads_nothing_and_escapes() -> None:
    output = segment_output()
    output["bundle"] = "<script>alert(1)</script>"
    page = to_page(example_run(output))
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.loads == []
    assert "script" not in tags.seen
    assert tags.seen.count("svg") == 4  # two cases of segment, two of memory
    assert "prefers-color-scheme:dark" in page
    assert "pixano-edge bench segment" in page
    assert "url(" not in page


def test_curves_are_plotted_with_their_fit() -> None:
    from dataclasses import replace

    from pixano_edge.benchmarks.fitting import make_curve
    from pixano_edge.benchmarks.results import Run

    curve = make_curve("a frame", "objects", "object", {1: [0.03], 2: [0.04], 4: [0.06]})
    run = example_run()
    page = to_page(Run(run.settings, run.environment, (replace(run.parts[0], curves=(curve,)),)))
    assert page.count("<circle") == 3
    assert "20 ms + 10 ms * object; R2 1.000" in page


def test_detection_tracking_answers_and_start_are_judged() -> None:
    rows = [{"case": "first call", "contender": "pixano-edge fp32", "seconds": times(1), "ratio": None, "texts": 1}]
    accuracy = {"contender": "pixano-edge fp32", "unmatched": 0, "worst_box": 0.1, "worst_score": 1e-6}
    output = {"bundle": "b", "classes": ["a"], "rows": rows, "accuracy": [accuracy], "left_out": {}}
    assert all(c.passed for c in read_detect(output).checks)
    for name, value in (("unmatched", 1), ("worst_box", 3.0), ("worst_score", 0.1)):
        checks = read_detect({**output, "accuracy": [{**accuracy, name: value}]}).checks
        assert [c.passed for c in checks].count(False) == 1
    unjudged = read_detect({**output, "accuracy": []})
    assert [c.passed for c in unjudged.checks] == [None]
    assert "PyTorch" in unjudged.left_out

    frame = {"contender": "pixano-edge fp32", "objects": 1, "seconds": times(1), "ratio": 1.0}
    for error, iou, passed in ((1e-5, 1.0, True), (1e-2, 1.0, False), (1e-5, 0.9, False), (None, None, None)):
        read = read_track({"bundle": "b", "rows": [{**frame, "relative_error": error, "mask_iou": iou}]})
        verdicts = {c.passed for c in read.checks}
        assert (False in verdicts) == (passed is False)
        assert verdicts == {passed} or passed is False

    answer = {"case": "text", "contender": "pixano-edge fp32", "first": 0.1, "rate": 9.0, "ratio": None}
    judged = {"contender": "pixano-edge fp32", "tokens": 8, "equal": 7, "max_rel": 1e-5}
    output = {"bundle": "b", "tokens": 8, "rounds": 1, "rows": [answer], "accuracy": [judged], "left_out": {}}
    assert [c.passed for c in read_describe(output).checks] == [True, False]
    int4 = {**judged, "contender": "pixano-edge int4", "max_rel": 0.3}
    assert [c.passed for c in read_describe({**output, "accuracy": [int4]}).checks] == [None]

    request = {"task": "sam2-demo", "first": times(2), "steady": times(1), "times_slower": 2.0, "different": 1}
    start = {
        "models": ["sam2-demo"], "import": {"wall": times(0.2), "cpu": times(0.2), "modules": []},
        "cold_start": {"healthy": times(1), "ready": times(2), "very_first": 3.0}, "requests": [request],
        "memory": {"peak": None, "idle": None}, "bars": [],
    }  # fmt: skip
    assert [c.passed for c in read_startup(start).checks] == [False]


def test_noise_is_unknown_with_few_measurements() -> None:
    assert Figure("c", "w", 1.0, p90=1.1, count=4).noise is None
    few, many = (Figure("c", "w", 1.0, p90=1.1, count=n).noise for n in (5, 500))
    assert few == pytest.approx(10 * many)
    assert Figure("c", "w", 1.0, "1/s", count=5).noise == 0.05
    assert few == pytest.approx(1.2533 * 0.1 / 1.2816 / 5**0.5)


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text, said in (
        ("{", "cannot be read"), ("[]", "no figures"), ('{"schema": "pixano-edge-bench", "schema_version": 99}', "99"),
        ('{"schema": "pixano-edge-bench", "schema_version": 1, "parts": [{}]}', "damaged"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(EdgeError, match=said):
            read_run(file)
    run = example_run()
    file.write_text(to_json(run.to_dict()))
    assert read_run(file) == parse_run(json.loads(to_json(run.to_dict())), "")
    assert read_run(file).parts[0].figures == run.parts[0].figures


def test_power_mode_and_load_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    assert set(power_mode.read_power_mode(tmp_path).values()) == {None}
    write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n")
    write("sys/devices/system/cpu/intel_pstate/no_turbo", "1\n")
    write("sys/class/power_supply/AC/type", "Mains\n")
    write("sys/class/power_supply/AC/online", "0\n")
    write("var/lib/nvpmodel/status", "pmode:0002")
    write("proc/cpuinfo", "processor : 0\nflags\t\t: fpu avx2 hypervisor\n")
    found = power_mode.read_power_mode(tmp_path)
    text = power_mode.power_text(found)
    assert text == "governor powersave, boost off, on battery, Jetson power mode 0002 (virtual machine)"

    tick = power_mode.os.sysconf("SC_CLK_TCK")
    watch = power_mode.LoadWatch(tmp_path)
    assert watch.stop() is None
    write("proc/stat", "cpu 0 0 0 0 0 0 0 0 0 0\n")
    watch.start()
    write("proc/stat", f"cpu {1000 * tick} 0 0 {2990 * tick} 0 0 0 {10 * tick} 0 0\n")
    assert watch.stop() == pytest.approx(1010 / 4000, abs=0.01)  # this process used next to nothing itself


def test_a_real_part_in_a_process_of_its_own() -> None:
    """Nothing is made up here: the command runs, its output is read, and others' use of the machine is told."""
    pytest.importorskip("psutil", reason="memory needs pixano-edge[benchmarks]")
    run = run_all.run_all(plan.Wanted(parts=("memory",), quick=True, threads=1), "typed")
    (part,) = run.parts
    assert (part.status, part.reason) == ("passed", "")
    assert part.command == "pixano-edge bench memory --calls 20 --threads 1"
    assert part.raw["calls"] == 20
    assert {f.unit for f in part.figures} == {"B"}
    assert part.seconds > 0
    assert part.busy is None or 0 <= part.busy <= 1
    assert run.settings["command"] == "typed"
