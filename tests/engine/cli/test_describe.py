"""`describe` end to end against a fake model: the terminal, JSON, several images, and files that go on."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pixano_edge.engine.cli import describe as command
from pixano_edge.engine.cli import main
from pixano_edge.engine.cli.describe import printable
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.models.decoder import opening
from tests.support.fake_vlm import FakeVlm


def _invoke(*args: object) -> Any:
    return CliRunner().invoke(app, ["describe", *(str(a) for a in args)])


class _Opened:
    def __init__(self) -> None:
        self.vlms: list[FakeVlm] = []
        self.asked: list[dict[str, Any]] = []
        self.prepare: Any = lambda vlm: None

    def __call__(self, bundle: Any, **asked: Any) -> FakeVlm:
        self.asked.append(asked)
        self.vlms.append(FakeVlm())
        self.prepare(self.vlms[-1])
        return self.vlms[-1]


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> _Opened:
    """The bundle ``fake``."""
    found = _Opened()
    monkeypatch.setattr(opening, "open_vlm", found)
    real = command.open_bundle

    def open_bundle(name: str) -> Any:
        fake = SimpleNamespace(manifest=SimpleNamespace(name="fake", family="smolvlm"), hash="abc")
        return fake if name == "fake" else real(name)

    monkeypatch.setattr(command, "open_bundle", open_bundle)
    # Whatever version of the package is installed around these sources.
    point = EntryPoint("describe", "pixano_edge.engine.cli.describe:app", main.GROUP)
    monkeypatch.setattr(main, "command_entry_points", lambda: {"describe": point})
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "in"
    found.mkdir()
    for index, name in enumerate(("a.png", "b.jpg", "c.png")):
        Image.fromarray(np.full((20 + index, 30, 3), 40 * index, np.uint8)).save(found / name)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_image(folder: Path, opened: _Opened) -> None:
    result = _invoke(folder / "a.png", "--bundle", "fake", "--prompt", "what is it", "--max-new-tokens", 20)
    assert result.exit_code == 0, result.output
    assert result.stdout == "1 images: what is it\n"
    assert "10 tokens of prompt, 5 of answer" in result.stderr
    assert "Warning: a warning" in result.stderr
    (vlm,) = opened.vlms
    ((conversation, shapes, options),) = vlm.asked
    assert shapes == [(20, 30, 3)]
    assert (options.max_new_tokens, options.sampling.greedy) == (20, True)
    assert len(conversation.messages) == 1
    assert vlm.closed


def test_options_reach_the_model(folder: Path, opened: _Opened) -> None:
    result = _invoke(
        folder / "a.png", "--bundle", "fake", "--temperature", 0.5, "--top-p", 0.9, "--seed", 3, "--stop", "x",
        "--system", "be short", "--context", 99, "--device", "cpu", "--precision", "fp32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((conversation, _, options),) = opened.vlms[0].asked
    sampling = options.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, options.stops) == (0.5, 0.9, 3, ("x",))
    assert conversation.messages[0].role == "system"
    assert (opened.asked[0]["context"], opened.asked[0]["device"], opened.asked[0]["precision"]) == (99, "cpu", "fp32")


def test_several_images_one_by_one(folder: Path, opened: _Opened) -> None:
    result = _invoke(folder / "a.png", folder / "b.jpg", "--bundle", "fake", "-p", "what")
    assert result.stdout == "a.png:\n1 images: what\nb.jpg:\n1 images: what\n"
    assert len(opened.vlms) == 1


def test_several_images_together(folder: Path, opened: _Opened) -> None:
    result = _invoke(folder, "--bundle", "fake", "-p", "compare", "--together")
    assert result.stdout == "3 images: compare\n"
    assert opened.vlms[0].asked[0][1] == [(20, 30, 3), (21, 30, 3), (22, 30, 3)]


def test_json(folder: Path) -> None:
    result = _invoke(folder / "a.png", "--bundle", "fake", "-p", "what", "--json")
    told = json.loads(result.stdout)
    (found,) = told["answers"]
    assert found["text"] == "1 images: what"
    assert found["usage"] == {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13, "reused_tokens": 0}
    assert found["finish"] == "stop"
    assert found["files"] == [str(folder / "a.png")]
    assert told["failed"] == []


def test_broken_image_is_skipped(folder: Path) -> None:
    (folder / "b.jpg").write_bytes(b"no picture")
    result = _invoke(folder, "--bundle", "fake", "-p", "what")
    assert result.exit_code == 1
    assert result.stdout.count("1 images: what") == 2
    assert "Skipped b.jpg" in result.stderr
    assert _invoke(folder / "b.jpg", "--bundle", "fake").exit_code == 1


def test_failing_model(folder: Path, opened: _Opened) -> None:
    def fail(vlm: FakeVlm) -> None:
        vlm.error, vlm.error_at = DeviceError("it failed", "try again"), 1

    opened.prepare = fail
    result = _invoke(folder / "a.png", "--bundle", "fake", "-p", "what")
    assert result.exit_code == 1
    assert "it failed" in result.output
    assert opened.vlms[0].closed


@pytest.mark.parametrize(
    "args",
    [
        ["--max-new-tokens", 0],
        ["--temperature", -1],
        ["--seed", 3],
        ["--top-p", 0.5],
        ["--together", "-o", "x.jsonl"],
    ],
)
def test_senseless_options(folder: Path, args: list[object]) -> None:
    result = _invoke(folder / "a.png", "--bundle", "fake", *args)
    assert result.exit_code == 2, result.output


def test_terminal_is_safe_from_the_model() -> None:
    assert printable("a\x1b[2Jb\rc\n\td é漢") == "a [2Jb c\n\td é漢"


def test_lines_go_on_where_they_were(folder: Path, tmp_path: Path, opened: _Opened) -> None:
    out = tmp_path / "deep" / "captions.jsonl"
    args = (folder, "--bundle", "fake", "-p", "what", "-o", out)
    first = _invoke(*args)
    assert first.exit_code == 0, first.output
    assert "3 of 3 images described, 0 were" in first.stdout
    lines = _lines(out)
    assert [Path(line["file"]).name for line in lines] == ["a.png", "b.jpg", "c.png"]
    assert {line["text"] for line in lines} == {"1 images: what"}
    assert all(len(line["sha256"]) == 64 for line in lines)
    assert lines[0]["usage"]["completion_tokens"] == 3

    assert "0 of 3 images described, 3 were" in _invoke(*args).stdout
    assert _lines(out) == lines
    assert opened.vlms[1].asked == []

    shutil.copy(folder / "a.png", folder / "same.png")
    Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(folder / "b.jpg")
    assert _invoke(*args).exit_code == 0
    more = _lines(out)[3:]
    assert [(Path(line["file"]).name, Path(line.get("same_as", "none")).name) for line in more] == [
        ("b.jpg", "none"),
        ("same.png", "a.png"),
    ]
    assert [len(vlm.asked) for vlm in opened.vlms] == [3, 0, 1]


def test_another_prompt_is_another_line(folder: Path, tmp_path: Path, opened: _Opened) -> None:
    out = tmp_path / "captions.jsonl"
    for prompt in ("what", "who", "what"):
        assert _invoke(folder, "--bundle", "fake", "-p", prompt, "-o", out).exit_code == 0
    assert [line["prompt"] for line in _lines(out)] == ["what"] * 3 + ["who"] * 3


@pytest.mark.parametrize("cut", [1, 10, 1000])
def test_half_a_line_is_done_again(folder: Path, tmp_path: Path, opened: _Opened, cut: int) -> None:
    out = tmp_path / "captions.jsonl"
    args = (folder, "--bundle", "fake", "-p", "what", "-o", out)
    _invoke(*args)
    whole = _lines(out)
    content = out.read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    out.write_bytes(content[: -min(cut, last - 1)])
    result = _invoke(*args)
    assert "1 of 3 images described, 2 were" in result.stdout
    assert "cut off" in result.stderr
    assert [{**line, "first_token_seconds": 0} for line in _lines(out)] == [
        {**line, "first_token_seconds": 0} for line in whole
    ]


def test_file_of_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("my notes\nmore\n")
    result = _invoke(folder, "--bundle", "fake", "-o", out)
    assert result.exit_code == 1
    assert "Line 1" in result.output
    assert out.read_text() == "my notes\nmore\n"


def test_failed_image_is_tried_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    args = (folder, "--bundle", "fake", "-p", "what", "-o", out)
    good = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(b"no picture")
    assert _invoke(*args).exit_code == 1
    assert len(_lines(out)) == 2
    (folder / "b.jpg").write_bytes(good)
    assert _invoke(*args).exit_code == 0
    assert [Path(line["file"]).name for line in _lines(out)] == ["a.png", "c.png", "b.jpg"]
