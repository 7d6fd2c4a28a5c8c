"""`doctor`: what it detects, and that its words and exit code follow."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixano_edge.engine.cli import doctor, libraries
from pixano_edge.engine.cli.host import parse_cpuinfo, read_host
from pixano_edge.engine.cli.libraries import Finding, Library
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.cli.probe import ProviderState, probe_graph, probe_provider
from pixano_edge.engine.runtime.base import DeviceInfo
from pixano_edge.engine.runtime.cuda_open import AutoDevice
from tests.support.system import write_system

INSTALLED = {"onnxruntime": "1.32.0", "opencv-python-headless": "5.0.0", "numpy": "2.0"}


def _no_problem(_: str) -> str | None:
    return None


def test_report_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert report["healthy"] is (result.exit_code == 0)
    assert report["host"]["usable_threads"] >= 1
    assert report["store"]["root"] == str(tmp_path / "bundles")
    names = {lib["name"] for lib in report["libraries"] if not lib["extra"]}
    assert {"numpy", "pydantic", "opencv-python-headless"} <= names
    assert {"export", "cpu", "cuda"} <= {lib["extra"] for lib in report["libraries"]}
    cpu = [p for p in report["providers"] if p["name"] == "CPUExecutionProvider"]
    assert cpu
    assert cpu[0]["loads"]
    if not report["gpus"]:
        assert report["gpu_reason"]


def test_the_table_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["doctor"])
    assert "CPUExecutionProvider" in result.stdout
    assert "numpy" in result.stdout
    assert str(tmp_path) in result.stdout


def test_both_onnxruntime_wheels_are_a_problem_with_the_way_out():
    versions = {**INSTALLED, "onnxruntime-gpu": "1.32.0"}
    (finding,) = libraries.wheel_conflicts(versions.get)
    assert finding.level == "problem"
    assert finding.action == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'pixano-edge[cuda]'"
    assert libraries.wheel_conflicts(INSTALLED.get) == []


def test_both_opencv_wheels_are_a_warning():
    (finding,) = libraries.wheel_conflicts({**INSTALLED, "opencv-python": "5.0.0"}.get)
    assert finding.level == "warning"
    assert "opencv-python-headless" in finding.action


def test_either_opencv_wheel_is_accepted():
    base = [Library("opencv-python-headless", ">=4.9", "", None)]
    assert libraries.base_findings(base, {"opencv-python": "5.0"}.get, _no_problem) == []
    (finding,) = libraries.base_findings(base, {}.get, _no_problem)
    assert finding.level == "problem"
    assert finding.action == "pip install 'opencv-python-headless>=4.9'"


def test_missing_libgl_names_the_headless_wheel():
    base = [Library("opencv-python-headless", ">=4.9", "", None)]
    (finding,) = libraries.base_findings(base, {"opencv-python": "5"}.get, lambda _: "libGL.so.1: cannot open")
    assert finding.action == "pip uninstall -y opencv-python && pip install opencv-python-headless"


def test_no_onnxruntime_and_a_gutted_one_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    (none,) = libraries.runtime_findings({}.get, lambda _: "No module named 'onnxruntime'")
    assert "No ONNX Runtime is installed" in none.message
    assert "pixano-edge[cpu]" in none.action
    # What uninstalling one of two overlapping wheels leaves: an importable, empty package.
    monkeypatch.setattr(libraries.importlib, "import_module", lambda _: object())
    (gutted,) = libraries.runtime_findings(INSTALLED.get, _no_problem)
    assert "incomplete" in gutted.message
    assert "pip uninstall -y onnxruntime" in gutted.action


def test_requirements_are_parsed():
    parse = libraries.parse_requirement
    assert parse("numpy>=1.26") == ("numpy", ">=1.26", "")
    assert parse('onnxruntime>=1.20; extra == "cpu"') == ("onnxruntime", ">=1.20", "cpu")
    assert parse("transformers<6,>=5; extra == 'export'") == ("transformers", "<6,>=5", "export")
    assert parse('pixano-edge[cpu]; extra == "test"') == ("pixano-edge", "", "test")


def test_install_line_never_adds_a_second_onnxruntime():
    absent = [Library("onnxruntime-gpu", ">=1.20", "cuda", None), Library("nvidia-ml-py", ">=12", "cuda", None)]
    line = doctor._install_line("cuda", absent, ["onnxruntime"])
    assert line.endswith("pip uninstall -y onnxruntime && pip install 'pixano-edge[cuda]'")
    assert doctor._install_line("cuda", absent, []) == "pip install 'pixano-edge[cuda]'"
    export = [Library("onnxruntime", ">=1.20", "export", None), Library("torch", ">=2.8", "export", None)]
    assert doctor._install_line("export", export, ["onnxruntime-gpu"]) == "pip install 'torch>=2.8'"


def test_a_provider_that_does_not_load_says_so():
    assert probe_provider("CPUExecutionProvider") == ProviderState("CPUExecutionProvider", True)
    # Not compiled into the CPU wheel: ONNX Runtime falls back in silence, the probe does not.
    state = probe_provider("CUDAExecutionProvider")
    if not state.loads:
        assert "CPUExecutionProvider" in state.reason
    assert len(probe_graph()) < 500


def test_probe_of_a_hanging_provider_ends():
    state = probe_provider("CPUExecutionProvider", timeout=0.001)
    assert not state.loads
    assert "no answer" in state.reason


@pytest.mark.parametrize(
    ("finding", "code"), [(Finding("problem", "broken", "mend it"), 1), (Finding("warning", "hm", "look"), 0)]
)
def test_only_problems_fail(monkeypatch: pytest.MonkeyPatch, finding: Finding, code: int):
    report = doctor.examine()
    monkeypatch.setattr(doctor, "examine", lambda: replace(report, findings=[finding]))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code
    assert finding.message in result.stdout
    assert f"fix: {finding.action}" in result.stdout


def test_whether_the_gpu_is_used_is_said():
    host = replace(read_host(), jetson=None)
    unused = AutoDevice((), "no CUDA device can be used: no library.", "pip install 'pixano-edge[cuda]'")
    for gpus, board in (([{"name": "GPU"}], None), ([], "NVIDIA Jetson AGX Orin")):
        (finding,) = doctor._gpu_findings(gpus, replace(host, jetson=board), unused)
        assert finding.level == "warning"
        assert "runs on the CPU: no CUDA device can be used" in finding.message
        assert finding.action == unused.action
    assert doctor._gpu_findings([], host, unused) == []
    (finding,) = doctor._gpu_findings([{"name": "GPU"}], host, AutoDevice(("cuda:0", "cuda:1"), "it works"))
    assert finding.level == "note"
    assert "'auto' is cuda:0" in finding.message


def test_a_gpu_is_one_line():
    text = doctor._gpu_text(asdict(DeviceInfo("GPU 0", "cuda", runtime="CUDA 13.2", temperature=61, utilisation=0)))
    assert text.startswith("GPU 0, compute capability")
    assert "CUDA 13.2" in text
    assert "load 0 %, 61 °C" in text
    assert " W" not in text
    shared = doctor._gpu_text({"name": "Orin", "extra": {"memory": "shared with the CPU"}})
    assert shared.endswith("memory shared with the CPU")


def test_a_cuda_provider_that_does_not_load_is_only_a_note():
    states = [ProviderState("CUDAExecutionProvider", False, "no libcudnn")]
    (finding,) = doctor._provider_findings(states, [], replace(read_host(), jetson=None))
    assert (finding.level, "no libcudnn" in finding.message, finding.action) == ("note", True, "")
    # On a machine with a GPU it is said once, with what to install (test_gpu_parts.py).
    assert doctor._provider_findings(states, [{"name": "GPU"}], replace(read_host(), jetson=None)) == []


@pytest.mark.parametrize("command", ["segment", "demo", "verify", "info"])
def test_help_says_what_works_now(command: str):
    shown = CliRunner().invoke(app, [command, "--help"]).stdout
    text = " ".join(shown.replace("│", " ").split())  # without the frame of the table, whose width varies
    for words in ("auto, cpu or cuda:N", "auto, onnxruntime, or tensorrt", "auto, or a precision that the bundle has"):
        assert words in text


def test_cpu_provider_that_fails_is_a_problem():
    host = replace(read_host(), jetson=None)
    (finding,) = doctor._provider_findings([ProviderState("CPUExecutionProvider", False, "boom")], [], host)
    assert finding.level == "problem"


def test_host_of_a_jetson(tmp_path: Path):
    files = {
        "proc/cpuinfo": "processor : 0\nFeatures : fp asimd asimdhp asimddp i8mm bf16\n",
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n",
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0\n",
        "etc/os-release": 'PRETTY_NAME="Ubuntu 22.04"\n',
    }
    host = read_host(write_system(tmp_path, files))
    assert host.jetson == "NVIDIA Jetson AGX Orin Developer Kit"
    assert host.l4t == "# R36 (release), REVISION: 4.0"
    assert host.cpu_flags == ("NEON", "FP16", "DOTPROD", "BF16", "I8MM")
    assert host.memory_total == 64_000_000 * 1024
    assert host.os == "Ubuntu 22.04"


def test_container_limits_are_seen(tmp_path: Path):
    files = {
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n",
        "sys/fs/cgroup/memory.max": "4000000000\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
    }
    host = read_host(write_system(tmp_path, files))
    assert host.memory_total == 4_000_000_000
    assert host.cpu_quota == 1.5


def test_x86_flags():
    model, flags = parse_cpuinfo("model name\t: Xeon\nflags\t: avx2 avx512f amx_bf16 amx_int8\n")
    assert model == "Xeon"
    assert flags == ("AVX2", "AVX512", "AMX-BF16", "AMX-INT8")
