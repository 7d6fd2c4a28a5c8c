"""`bench compare` and `bench readme`: regressions beyond noise, and README as the command makes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixano_edge.benchmarks import readme
from pixano_edge.benchmarks.comparison import compare_runs
from pixano_edge.benchmarks.results import Run, read_run
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.cli.output import to_json
from pixano_edge.engine.errors import EdgeError
from tests.conftest import ROOT
from tests.support.bench_run import example_run, segment_output


def _invoke(*args: object):
    return CliRunner().invoke(app, ["bench", *(str(a) for a in args)])


def _run(engine: float = 0.5, torch: float = 1.0, **more: Any) -> Run:
    return example_run(segment_output(engine, torch, **more))


def _verdicts(before: Run, after: Run, threshold: float = 0.05) -> set[str]:
    return {c.verdict for c in compare_runs(before, after, threshold).changes if c.part == "segment"}


def test_a_slower_engine_is_a_regression_and_a_slower_machine_is_none() -> None:
    assert _verdicts(_run(), _run()) == {"same"}
    assert _verdicts(_run(), _run(0.6)) == {"slower"}
    assert _verdicts(_run(), _run(0.4)) == {"faster"}
    assert _verdicts(_run(), _run(1.0, 2.0)) == {"same"}  # everything takes twice as long
    assert _verdicts(_run(), _run(0.51)) == {"same"}
    assert _verdicts(_run(), _run(0.53)) == {"slower"}
    assert _verdicts(_run(), _run(0.53), threshold=0.1) == {"same"}


def _noisier(run: Run, p90: float) -> Run:
    part = run.parts[0]
    figures = tuple(replace(f, p90=f.value * p90) for f in part.figures)
    return Run(run.settings, run.environment, (replace(part, figures=figures), *run.parts[1:]))


def test_noise_counts() -> None:
    assert _verdicts(_noisier(_run(), 1.5), _noisier(_run(0.6), 1.5)) == {"same"}
    few = [replace(f, count=3) for f in _run(0.9).parts[0].figures]
    run = _run(0.9)
    after = Run(run.settings, run.environment, (replace(run.parts[0], figures=tuple(few)), *run.parts[1:]))
    assert _verdicts(_run(), after) == {"too few"}
    assert not compare_runs(_run(), after).regressed


def test_wrong_answers_and_lost_parts_are_regressions() -> None:
    found = compare_runs(_run(), _run(0.1, iou=0.5))
    assert found.regressed
    assert "mask IoU" in found.wrong[0]
    assert "as before" in compare_runs(_run(iou=0.5), _run(iou=0.5)).wrong[0]
    run = _run()
    broken = replace(run.parts[0], status="failed", reason="It broke.", figures=(), checks=())
    found = compare_runs(run, Run(run.settings, run.environment, (broken, run.parts[1])))
    assert found.lost == {"segment": "It broke."}
    assert found.regressed
    fewer = replace(run.parts[0], figures=run.parts[0].figures[1:])
    found = compare_runs(run, Run(run.settings, run.environment, (fewer, run.parts[1])))
    assert [c.verdict for c in found.changes if c.part == "segment"] == ["lost", "same"]
    assert found.regressed
    # A part that was not asked for is no loss, and said.
    found = compare_runs(run, Run(run.settings, run.environment, run.parts[1:]))
    assert not found.regressed
    assert "segment" in found.notes[0]


def test_other_machines_and_other_commands() -> None:
    run = _run()
    host = {**run.environment["host"], "cpu": "Another CPU"}
    other = Run(run.settings, {**run.environment, "host": host}, _run(0.6, 1.0).parts)
    found = compare_runs(run, other)
    assert {c.verdict for c in found.changes if c.part == "segment"} == {"slower"}
    assert {c.verdict for c in found.changes if c.part == "memory"} == {"other machine"}
    assert "different machines" in found.notes[0]
    with pytest.raises(EdgeError, match="'size'"):
        compare_runs(run, Run({**run.settings, "size": "tiny"}, run.environment, run.parts))


def test_the_command_ends_with_1_on_a_regression(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(to_json(_run().to_dict()))
    b.write_text(to_json(_run(0.7).to_dict()))
    result = _invoke("compare", a, b)
    assert result.exit_code == 1, result.output
    assert "slower" in result.stdout
    assert "1.40" in result.stdout
    result = _invoke("compare", a, a)
    assert result.exit_code == 0, result.output
    assert "4 of 4 figures are the same" in result.stdout
    assert _invoke("compare", a, tmp_path / "none.json").exit_code == 1


def _quiet(run: Run, busy: float = 0.01) -> Run:
    return Run(run.settings, run.environment, tuple(replace(p, busy=busy) for p in run.parts))


def test_readme_is_written_between_its_markers(tmp_path: Path) -> None:
    kept = tmp_path / "docs" / "figures.json"
    kept.parent.mkdir()
    run = _quiet(_run())
    kept.write_text(to_json(run.to_dict()))
    text = tmp_path / "README.md"
    text.write_text("# Title\n\nBefore\n")
    result = _invoke("readme", kept, "--write", text)
    assert result.exit_code == 1
    assert "<!-- bench: docs/figures.json -->" in result.stderr
    text.write_text(f"# Title\n\n{readme.BEGIN.format(file='x')}\nformer text\n{readme.END}\n\nAfter \\1\n")
    result = _invoke("readme", kept, "--write", text)
    assert result.exit_code == 0, result.output
    made = text.read_text()
    assert made.startswith("# Title\n\n<!-- bench: docs/figures.json -->\n")
    assert made.endswith("<!-- /bench -->\n\nAfter \\1\n")
    assert "former text" not in made
    assert readme.embedded(made) == {"docs/figures.json": readme.to_block(read_run(kept), "docs/figures.json")}
    assert "| encoder | pixano-edge fp32 | 500 ms / 50" in made
    assert "1000 ms, 2.00x" in made  # PyTorch fp32
    assert "PyTorch bf16 | 800 ms, 1.60x" in made  # the fastest other
    assert "2 of 2 accuracy checks passed" in made
    assert "Not measured: OpenVINO fp32" in made
    assert "`pixano-edge bench segment" in made
    once = text.read_text()
    assert _invoke("readme", kept, "--write", text).exit_code == 0
    assert text.read_text() == once
    printed = _invoke("readme", kept)
    assert printed.exit_code == 0
    assert "| encoder | pixano-edge fp32 |" in printed.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [("quick", "quick run"), ("wrong", "wrong"), ("busy", "Others used 40 %")],
)
def test_readme_refuses_what_should_not_be_published(change: str, said: str) -> None:
    run = _quiet(_run(iou=0.5 if change == "wrong" else 1.0), 0.4 if change == "busy" else 0.0)
    if change == "quick":
        run = Run({**run.settings, "quick": True}, run.environment, run.parts)
    with pytest.raises(EdgeError, match=said):
        readme.check_publishable(run)
    if change == "busy":
        readme.check_publishable(run, busy_ok=True)
        assert "Others used at most 40 %" in readme.to_block(run, "x.json")


def test_readme_of_this_repository_is_what_the_command_makes() -> None:
    """The figures in README are those of the file that it names; a kept file must be shown."""
    found = readme.embedded((ROOT / "README.md").read_text(encoding="utf-8"))
    kept = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "benchmarks").glob("*.json"))
    assert sorted(found) == kept, "README shows the kept figures: add the markers, see docs/benchmarks.md"
    for file, body in found.items():
        assert body == readme.to_block(read_run(ROOT / file), file), (
            f"run: pixano-edge bench readme {file} --write README.md"
        )


def test_several_blocks_are_made_anew_each_by_its_file() -> None:
    one, two = (f"{readme.BEGIN.format(file=name)}\n{name}\n{readme.END}\n" for name in ("a.json", "b.json"))
    made = readme.embedded(readme.replaced(one + two, _run(), "b.json"))
    assert made["a.json"] == "a.json\n"
    assert made["b.json"] == readme.to_block(_run(), "b.json")
    with pytest.raises(EdgeError, match="no place"):
        readme.replaced(one + two, _run(), "c.json")
    with pytest.raises(EdgeError, match="same file"):
        readme.embedded(one + one)
