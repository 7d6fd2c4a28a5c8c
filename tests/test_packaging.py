"""The package mapping, the light install and the import rules."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.once import once

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("benchmarks", "calibration", "engine", "export")
BLOCKED = ("torch", "transformers", "optimum", "onnx", "onnxscript")


def _packages() -> set[str]:
    found = set()
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join(("pixano_edge", *init.parent.relative_to(ROOT).parts)))
    return found


def test_every_package_is_listed() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == _packages()


def test_typing_links_follow_the_mapping() -> None:
    for folder in FOLDERS:
        assert (ROOT / ".ci" / "typing" / "pixano_edge" / folder).resolve() == ROOT / folder


def test_base_dependencies_are_light() -> None:
    names = {d.split(">")[0].split("=")[0] for d in PROJECT["project"]["dependencies"]}
    assert not names & {"torch", "transformers", "optimum", "onnx", "onnxruntime", "onnxruntime-gpu"}


def test_entry_points_resolve() -> None:
    declared = PROJECT["project"]["entry-points"]["pixano_edge.commands"]
    found = {e.name: e for e in entry_points(group="pixano_edge.commands")}
    assert set(declared) <= set(found)
    for name in declared:
        assert found[name].load() is not None


def test_engine_never_imports_build_time_libraries() -> None:
    """Static check over the whole run time; the running check blocks the imports (test_no_torch.py)."""
    import ast

    for path in (ROOT / "engine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            bad = [
                n
                for n in names
                if n.split(".")[0] in BLOCKED or n.startswith(("pixano_edge.export", "pixano_edge.calibration"))
            ]
            assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_import_does_no_work() -> None:
    """Importing the provider loads no inference library and no CUDA."""
    code = (
        "import sys, pixano_edge.engine.provider, pixano_edge.engine.models.sam2.predictor\n"
        "heavy = {'onnxruntime', 'torch', 'pynvml', 'tensorrt', 'pycuda', 'cuda'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once for all workers: two builds at a time would write into one `build` folder of the source tree."""

    def make(out: Path) -> None:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(out), str(ROOT)]
        subprocess.run(command, check=True, timeout=300)

    return next(once(tmp_path_factory, "wheel", make).glob("pixano_edge-*.whl"))


def test_wheel_holds_the_mapping(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in FOLDERS:
        assert f"pixano_edge/{folder}/__init__.py" in names
    top = {n.split("/")[0] for n in names}
    assert top == {"pixano_edge", f"pixano_edge-{PROJECT['project']['version']}.dist-info"}
    assert "pixano_edge/engine/py.typed" in names
    shipped = {n.removeprefix("pixano_edge/") for n in names if n.startswith("pixano_edge/engine/assets/")}
    in_tree = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "engine" / "assets").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert shipped == in_tree


def test_base_install_is_small_and_pulls_no_torch(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`pip install pixano-edge`, then with [cpu], into an empty environment: sizes printed, no torch.

    The bar of 400 MB is for what a box needs to run: the base as a whole, and [cpu] without the demo's models and
    pictures, which are told beside it.
    """
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "v")], check=True)
    python = tmp_path / "v" / "bin" / "python"
    site = next((tmp_path / "v" / "lib").glob("python3*")) / "site-packages"

    def held(folder: Path) -> int:
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())

    bare = held(site)  # pip and setuptools come with the environment, not with us
    sizes = {}
    for what in (str(wheel), f"{wheel}[cpu]"):
        subprocess.run([python, "-m", "pip", "install", "-q", what], check=True, timeout=600)
        sizes[what] = held(site) - bare
    base, size = sizes.values()
    demo = held(site / "pixano_edge" / "engine" / "assets")
    packages = {p.name.split("-")[0].lower() for p in site.glob("*.dist-info")}
    with capsys.disabled():  # to stderr, which workers of pytest-xdist share
        told = f"base install: {base / 1e6:.0f} MB; with [cpu]: {size / 1e6:.0f} MB, {len(packages)} packages"
        print(f"\n{told}; the demo's models and pictures in both: {demo / 1e6:.0f} MB", file=sys.stderr)  # noqa: T201
    assert not packages & {"torch", "transformers", "optimum", "onnx"}
    assert base < 400e6
    assert size - demo < 400e6
    assert demo < 45e6
    shown = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout
    subprocess.run([tmp_path / "v" / "bin" / "pixano-edge", "--help"], check=True, capture_output=True)
