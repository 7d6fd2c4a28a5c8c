"""The command's frame: lazy loading, errors, missing extras, exit codes."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pixano_edge.engine.cli import main as frame
from pixano_edge.engine.cli.output import JsonOption
from pixano_edge.engine.errors import BundleError

COMMANDS = ("bench", "build", "bundle", "demo", "doctor", "export", "info", "segment", "track", "verify")

fake = typer.Typer()


@fake.command()
def _fail(kind: str, as_json: JsonOption = False) -> None:
    if kind == "edge":
        raise BundleError("The bundle is broken.", "Export it again.")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "torch":
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    if kind == "bug":
        raise ModuleNotFoundError("No module named 'zzz'", name="zzz")
    typer.echo("fine")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    points = {
        name: importlib.metadata.EntryPoint(name, value, frame.GROUP)
        for name, value in {
            "fake": f"{__name__}:fake",
            "absent": f"{__name__}:nothing",
            "export": "a_module_that_is_not_there:app",
            "number": f"{__name__}:COMMANDS",
        }.items()
    }
    monkeypatch.setattr(frame, "command_entry_points", lambda: points)
    return CliRunner()


def test_edge_error_goes_to_stderr_with_its_action(runner: CliRunner):
    result = runner.invoke(frame.app, ["fake", "edge"])
    assert result.exit_code == 1
    assert "The bundle is broken." in result.stderr
    assert "Export it again." in result.stderr
    assert result.stdout == ""


def test_edge_error_is_json_with_json(runner: CliRunner):
    result = runner.invoke(frame.app, ["fake", "edge", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "error": {"type": "BundleError", "message": "The bundle is broken.", "action": "Export it again."}
    }


def test_usage_error_exits_with_2(runner: CliRunner):
    assert runner.invoke(frame.app, ["fake"]).exit_code == 2
    assert runner.invoke(frame.app, ["fake", "ok", "--nonsense"]).exit_code == 2
    assert runner.invoke(frame.app, ["nonsense"]).exit_code == 2


def test_ctrl_c_exits_with_130_and_no_traceback(runner: CliRunner):
    result = runner.invoke(frame.app, ["fake", "interrupt"])
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_missing_extra_at_run_time_names_its_install_line(runner: CliRunner):
    result = runner.invoke(frame.app, ["fake", "torch"])
    assert result.exit_code == 1
    assert "pip install 'pixano-edge[export]'" in result.stderr


def test_missing_extra_at_load_time_names_its_install_line(runner: CliRunner):
    result = runner.invoke(frame.app, ["export", "sam2"])
    assert result.exit_code == 1
    assert "a_module_that_is_not_there" in result.stderr
    assert "pip install 'pixano-edge[export]'" in result.stderr


def test_an_unknown_missing_module_is_a_bug_and_not_hidden(runner: CliRunner):
    assert isinstance(runner.invoke(frame.app, ["fake", "bug"]).exception, ModuleNotFoundError)


@pytest.mark.parametrize("name", ["absent", "number"])
def test_a_broken_entry_point_is_an_error_not_a_traceback(runner: CliRunner, name: str):
    result = runner.invoke(frame.app, [name])
    assert result.exit_code == 1
    assert name in result.stderr


def test_help_lists_commands_and_says_what_an_absent_extra_needs(runner: CliRunner, monkeypatch: pytest.MonkeyPatch):
    real = frame.importlib.util.find_spec
    monkeypatch.setattr(frame.importlib.util, "find_spec", lambda n, *a: None if n == "torch" else real(n, *a))
    result = runner.invoke(frame.app, ["--help"])
    assert result.exit_code == 0
    # Rich folds at the width of the terminal.
    text = " ".join(result.stdout.replace("│", " ").split())
    assert "needs pixano-edge[export]" in text
    assert "fake" in text


def test_every_command_of_the_issue_is_an_entry_point():
    assert set(COMMANDS) <= set(frame.command_entry_points())


def _run(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_imports_no_command_and_nothing_heavy():
    loaded = _run(
        "import json, sys\n"
        "from pixano_edge.engine.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    heavy = {"torch", "transformers", "onnxruntime", "onnx", "cv2", "numpy", "pixano_edge.export", "pydantic"}
    assert not heavy & set(loaded)
    assert not [m for m in loaded if m.startswith("pixano_edge.engine.cli.") and m.split(".")[-1] in COMMANDS]


def test_version():
    result = CliRunner().invoke(frame.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.strip() == f"pixano-edge {importlib.metadata.version('pixano-edge')}"
