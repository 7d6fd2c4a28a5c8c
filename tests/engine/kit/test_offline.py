"""The whole way: wheels from the package index into a kit, and from the kit onto a box without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pixano_edge.engine.bundle.store import demo_path
from pixano_edge.engine.kit import signing
from pixano_edge.engine.kit.create import create
from pixano_edge.engine.kit.wheels import Target

pytestmark = pytest.mark.slow  # fetches 150 MB and installs them: a minute or two


def _cut_off() -> list[str]:
    """What runs a command without any network: a network namespace of its own, where this user may make one."""
    for command in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


def test_a_kit_for_this_machine_installs_and_works_without_a_network(tmp_path: Path) -> None:
    _, digits = signing.generate(tmp_path / "key")
    key = signing.load(tmp_path / "key", str)
    made = create(
        tmp_path / "kit",
        target=Target.of(None, None),
        extras=["cpu", "detection"],
        bundles=[("mine", demo_path())],
        key=key,
    )
    assert made.signed
    home = tmp_path / "home"
    home.mkdir()
    # An index that answers nobody, for the case that no namespace can be made; the installer ignores it anyway.
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin", "PIP_INDEX_URL": "http://127.0.0.1:9/", "OMP_NUM_THREADS": "2"}

    def run(*command: object) -> str:
        line = [*_cut_off(), *map(str, command)]
        done = subprocess.run(line, cwd=home, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    python = os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix else sys._base_executable  # type: ignore[attr-defined]
    run(python, "-S", made.folder / "install.pyz", "--key", digits, "--venv", tmp_path / "venv")
    edge = tmp_path / "venv" / "bin" / "pixano-edge"
    assert "No problems found" in run(edge, "doctor")
    assert "mine" in run(edge, "bundle", "list")
    shown = run(edge, "demo", "--out", tmp_path / "demo")
    assert "IoU clicks" in shown
    assert list((tmp_path / "demo").glob("*.png"))
    assert "passed" in run(edge, "verify", "mine").lower()


def test_a_kit_for_a_jetson_is_made_elsewhere(tmp_path: Path) -> None:
    """JetPack 6: Python 3.10 on aarch64. That it *installs* there was not tested; its wheels are the right ones."""
    made = create(
        tmp_path / "kit",
        target=Target.of("manylinux_2_35_aarch64", "3.10"),
        extras=["detection"],
        more=["cuda-bindings==12.*", "nvidia-ml-py"],
    )
    assert (made.manifest.python, made.manifest.machine) == ("3.10", "aarch64")
    names = [wheel.name for wheel in (made.folder / "wheels").iterdir()]
    assert not [name for name in names if "x86_64" in name]
    assert any(name.startswith("cuda_bindings-12") and "cp310" in name for name in names)
    # Asked for by wheels only where Python is older than this one: pip alone leaves them out.
    assert any(name.startswith("numpy-2.2") for name in names)  # the last with wheels for Python 3.10
