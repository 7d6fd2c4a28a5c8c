"""`build`: options, what it prints, and how it stops. TensorRT's work is done by a stand-in here."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixano_edge.engine.build import engines, library, plan
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli import build as command
from pixano_edge.engine.cli import main as frame
from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.runtime.base import DeviceInfo
from tests.engine.bundle.sample import make_bundle

LAYERS = [
    {"name": "c", "type": "CONSTANT", "op": None, "node": None, "inputs": [], "outputs": [["c", "float32", [4]]]},
    {
        "name": "sin[1]",
        "type": "UNARY",
        "op": "SIN",
        "node": "node_sin",
        "inputs": [["c", "float32", [4]]],
        "outputs": [["s", "float32", [-1, 4]]],
    },
]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def work(job: Mapping[str, Any], **calls: Any) -> dict[str, Any]:
        if job["action"] == "scratch":
            return {"scratch_bytes": [1]}
        seen.append(dict(job))
        if job["action"] == "describe":
            return {"version": "1.7.1", "compute_capabilities": ["SM86", "SM89"]}
        if job["action"] == "parse":
            return {"problems": [], "layers": LAYERS}
        calls["progress"]("Building engine", 0.5)
        Path(job["output"]).write_bytes(b"plan")
        return {"problems": [], "seconds": 2.5, "peak_memory_bytes": 5_000_000, "warnings": []}

    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(plan, "run_child", work)
    monkeypatch.setattr(engines, "run_child", work)
    monkeypatch.setattr(library, "installed", lambda: ["tensorrt", "tensorrt_rtx"])
    monkeypatch.setattr(library, "cuda_major", lambda flavour: 13)
    point = importlib.metadata.EntryPoint("build", "pixano_edge.engine.cli.build:app", frame.GROUP)
    monkeypatch.setattr(frame, "command_entry_points", lambda: {"build": point})
    return seen


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "sample")


def invoke(*args: object) -> Any:
    return CliRunner().invoke(frame.app, ["build", *(str(a) for a in args)])


def test_builds_for_targets_and_prints_a_table(jobs: list[dict[str, Any]], bundle: Path, tmp_path: Path) -> None:
    result = invoke(bundle, "--target", "sm_86,sm_89", "-p", "fp16", "--memory-limit", "2G", "--workspace", "512M")
    assert result.exit_code == 0, result.output
    builds = [job for job in jobs if job["action"] == "build"]
    assert [job["name"] for job in builds] == ["image_encoder", "mask_decoder"]
    assert {(job["memory_limit"], job["workspace"]) for job in builds} == {(2 << 30, 512 << 20)}
    assert "tensorrt_rtx 1.7.1 for sm_86, sm_89" in result.stdout
    assert "2.5 s" in result.stdout
    assert str(tmp_path / "home" / "engines") in result.stdout
    assert "no graph prepared for TensorRT for image_encoder fp16, mask_decoder fp16" in result.stderr
    again = invoke(bundle, "--target", "sm_86,sm_89", "-p", "fp16", "--workspace", "512M")
    assert again.stdout.count("cached") == 2
    assert len([job for job in jobs if job["action"] == "build"]) == 2


def test_json_with_layers_and_a_copy_with_the_engines(jobs: list[dict[str, Any]], bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    options = ["-t", "sm_86", "-g", "mask_decoder", "-p", "fp16", "--report", "--bundle-engines", "-o", copy, "--json"]
    result = invoke(bundle, *options)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    (engine,) = answer["engines"]
    assert engine["graph"] == "mask_decoder"
    assert engine["key"]["compute_capabilities"] == ["8.6"]
    (report,) = answer["layers"]
    assert [layer["name"] for layer in report["layers"]] == ["sin[1]"]
    assert list(report["kept_in_fp32"].values()) == [["sin[1]"]]
    assert answer["bundle"] == str(copy)
    opened = Bundle.open(copy)
    assert opened.engines is not None
    assert len(opened.engines.engines) == 1


def test_the_report_is_a_table_with_the_reasons(jobs: list[dict[str, Any]], bundle: Path) -> None:
    result = invoke(bundle, "-t", "sm_86", "-g", "mask_decoder", "-p", "fp16", "--report")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("node_sin")]
    assert line.split() == ["node_sin", "UNARY", "SIN", "float32", "?x4"]
    assert "1 layers, sine or cosine" in result.stdout
    assert "sin[1]" in result.stdout


def test_the_bundle_itself_gets_the_engines(jobs: list[dict[str, Any]], bundle: Path) -> None:
    before = Bundle.open(bundle).hash
    result = invoke(bundle, "-t", "sm_86", "--bundle-engines")
    assert result.exit_code == 0, result.output
    opened = Bundle.open(bundle)
    assert opened.hash == before
    assert opened.engines is not None
    assert len(opened.engines.engines) == 4


def test_without_a_target_the_gpu_is_asked(
    jobs: list[dict[str, Any]], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def describe(name: str) -> DeviceInfo:
        asked.append(name)
        return DeviceInfo("Orin", "cuda", compute_capability="8.7", extra={"multiprocessors": "16"})

    monkeypatch.setattr(command, "describe_device", describe)
    options = ["--device", "cuda:1", "--hardware-compatible", "same-compute-capability", "--version-compatible"]
    result = invoke(bundle, "-g", "mask_decoder", "-p", "fp32", *options, "--json")
    assert result.exit_code == 0, result.output
    assert asked == ["cuda:1"]
    build = jobs[-1]
    assert build["flavour"] == "tensorrt"
    assert build["flags"]["version_compatible"] is True
    assert build["flags"]["hardware_compatible"] == "same_compute_capability"
    assert build["timing_output"]


def test_without_a_gpu_and_a_target_it_says_what_to_do(
    jobs: list[dict[str, Any]], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(name: str) -> DeviceInfo:
        raise DeviceError("No NVIDIA driver answers.", "")

    monkeypatch.setattr(command, "describe_device", describe)
    result = invoke(bundle)
    assert result.exit_code == 1
    assert "There is no GPU here to build for" in result.stderr
    assert "--target" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-t", "sm_87"], "Jetson Orin"),
        (["-t", "sm_90"], "on the machine itself"),
        (["-t", "sm_86", "--memory-limit", "much"], "not a size"),
        (["-t", "sm_86", "--flavour", "onnx"], "Unknown TensorRT flavour"),
        (["-t", "sm_86", "-g", "other"], "no graph 'other'"),
        (["-t", "sm_86", "-p", "int8"], "no variant 'int8'"),
        (["-t", "sm_86", "-o", "x"], "--bundle-engines"),
        (["-t", "sm_86", "--version-compatible"], "no version- or hardware-compatible"),
    ],
)
def test_mistakes_are_named(jobs: list[dict[str, Any]], bundle: Path, options: list[str], words: str) -> None:
    result = invoke(bundle, *options)
    assert result.exit_code == 1
    assert words in result.stderr


def test_ctrl_c_stops_with_130_and_leaves_no_engine(
    jobs: list[dict[str, Any]], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(job: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        Path(job["output"]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "run_child", interrupted)
    result = invoke(bundle, "-t", "sm_86", "--bundle-engines")
    assert result.exit_code == 130
    assert [p for p in (tmp_path / "home").rglob("*") if p.is_file()] == []
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize(("text", "size"), [("6G", 6 << 30), ("1.5 GiB", 3 << 29), ("512m", 512 << 20), ("100", 100)])
def test_sizes(text: str, size: int) -> None:
    assert command.parse_size(text) == size


def test_the_default_limit_is_a_share_of_what_is_free(
    jobs: list[dict[str, Any]], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "memory", lambda: (16 << 30, 10 << 30))
    for option, limit in (((), 9 << 30), (("--memory-limit", "0"), None)):
        assert invoke(bundle, "-t", "sm_86", "-g", "mask_decoder", "--rebuild", *option).exit_code == 0
        assert jobs[-1]["memory_limit"] == limit
