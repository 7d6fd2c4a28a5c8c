"""Installing a kit: what comes of it, what stands in its way, and that nothing half-done is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixano_edge.engine.bundle import Bundle, BundleStore
from pixano_edge.engine.kit import install as module
from pixano_edge.engine.kit.install import MARKER, install
from pixano_edge.engine.kit.manifest import KitRefused

from .small import pip_wheel

needs_pip = pytest.mark.skipif(pip_wheel() is None, reason="this Python brings no pip wheel to put into a kit")


def _refused(kit: Path, key: bytes, venv: Path, store: Path) -> str:
    with pytest.raises(KitRefused) as caught:
        install(kit, key, venv=venv, store=store)
    assert caught.value.action
    return caught.value.message


def _fake_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the environment, which takes seconds; the test below makes a real one."""

    def fill(kit: Path, manifest: object, place: Path, system: bool, say: object) -> None:
        place.mkdir(parents=True, exist_ok=True)
        (place / MARKER).touch()

    monkeypatch.setattr(module, "_fill_venv", fill)


@needs_pip
def test_it_installs_and_runs(kit: Path, public: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With settings of pip that would break it, had they any effect."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "none.txt"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    venv, store = tmp_path / "box" / "venv", tmp_path / "store"
    assert install(kit, public, venv=venv, store=store) == (venv, ["mine"])
    shown = subprocess.run([venv / "bin" / "pixano-edge"], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["42", str(venv)]
    assert not (tmp_path / "elsewhere").exists()
    assert sorted(p.name for p in venv.iterdir() if p.name.startswith(".")) == []
    assert (venv / "bin" / "pip").exists()
    assert BundleStore(store).path("mine") == store / "mine"
    Bundle.open(store / "mine")
    # Again, beside it: the bundle is there already and stays as it is.
    _fake_packages(monkeypatch)
    assert install(kit, public, venv=tmp_path / "second", store=store) == (tmp_path / "second", [])


@needs_pip
def test_a_wheel_that_does_not_install_leaves_nothing(
    kit: Path, public: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.requirements_text
    monkeypatch.setattr(module, "requirements_text", lambda manifest: real(manifest).replace("sha256:", "sha256:00", 1))
    assert "A package did not install" in _refused(kit, public, tmp_path / "venv", tmp_path / "store")
    assert not (tmp_path / "venv").exists()
    assert not (tmp_path / "store").exists()


def test_nothing_is_made_before_everything_is_checked(kit: Path, public: bytes, tmp_path: Path) -> None:
    (kit / "bundles" / "mine" / "manifest.json").write_text("{}")
    _refused(kit, public, tmp_path / "venv", tmp_path / "store")
    assert not (tmp_path / "venv").exists()
    assert not (tmp_path / "store").exists()


def test_an_environment_that_exists_is_left_alone(kit: Path, public: bytes, tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine.txt").write_text("x")
    assert "exists already" in _refused(kit, public, tmp_path / "venv", tmp_path / "store")
    assert (tmp_path / "venv" / "mine.txt").read_text() == "x"


def test_a_link_in_the_place_of_the_environment(kit: Path, public: bytes, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "venv").symlink_to(tmp_path / "real")
    assert "not a folder" in _refused(kit, public, tmp_path / "venv", tmp_path / "store")


def test_half_an_environment_is_cleared(
    kit: Path, public: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut: the marker is still there."""
    _fake_packages(monkeypatch)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / MARKER).touch()
    (tmp_path / "store" / ".mine.kit-partial").mkdir(parents=True)
    (tmp_path / "store" / ".mine.kit-partial" / "half").touch()
    install(kit, public, venv=tmp_path / "venv", store=tmp_path / "store")
    assert not (tmp_path / "venv" / MARKER).exists()
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["mine"]


def test_another_bundle_of_that_name_is_in_the_way(kit: Path, public: bytes, tmp_path: Path) -> None:
    (tmp_path / "store" / "mine").mkdir(parents=True)
    (tmp_path / "store" / "mine" / "manifest.json").write_text("other")
    assert "another bundle 'mine'" in _refused(kit, public, tmp_path / "venv", tmp_path / "store")
    assert (tmp_path / "store" / "mine" / "manifest.json").read_text() == "other"
    assert not (tmp_path / "venv").exists()


def test_a_full_disk_while_copying_a_bundle(
    kit: Path, public: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_packages(monkeypatch)
    real, calls = os.fsync, [0]

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert "The disk is full" in _refused(kit, public, tmp_path / "venv", tmp_path / "store")
    assert calls[0] == 5
    assert not (tmp_path / "venv").exists()
    assert list((tmp_path / "store").iterdir()) == []


def test_ctrl_c_while_copying_a_bundle(
    kit: Path, public: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_packages(monkeypatch)

    def fsync(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        install(kit, public, venv=tmp_path / "venv", store=tmp_path / "store")
    assert not (tmp_path / "venv").exists()
    assert list((tmp_path / "store").iterdir()) == []


def test_a_file_that_changes_after_it_was_checked(
    kit: Path, public: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied is checked while it is copied."""
    graph = next((kit / "bundles" / "mine" / "graphs").iterdir())

    def fill(source: Path, manifest: object, place: Path, system: bool, say: object) -> None:
        place.mkdir()
        data = bytearray(graph.read_bytes())
        data[100] ^= 1
        graph.write_bytes(data)

    monkeypatch.setattr(module, "_fill_venv", fill)
    assert "SHA-256 differs" in _refused(kit, public, tmp_path / "venv", tmp_path / "store")
    assert not (tmp_path / "venv").exists()
    assert list((tmp_path / "store").iterdir()) == []


def test_too_little_space_is_told_before_anything(
    kit: Path, public: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    assert "MB free" in _refused(kit, public, tmp_path / "venv", tmp_path / "store")
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(("field", "value"), [("python", "3.99"), ("machine", "riscv64")])
def test_another_machine(kit: Path, tmp_path: Path, field: str, value: str) -> None:
    manifest = json.loads((kit / "kit.json").read_text())
    manifest[field] = value
    (kit / "kit.json").write_text(json.dumps(manifest))
    with pytest.raises(KitRefused, match=value):
        install(kit, None, venv=tmp_path / "venv", store=tmp_path / "store", allow_unsigned=True)


def _run(kit: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installer of the kit, by a Python that has nothing else: no packages, no paths from outside."""
    env = {"HOME": str(cwd), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-S", str(kit / "install.pyz"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_the_installer_stands_alone(kit: Path, public: bytes, tmp_path: Path) -> None:
    done = _run(kit, "--key", public.hex(), "--verify-only", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "files verified: pixano-edge 1.2.3" in done.stderr
    done = _run(kit, "--verify-only", cwd=tmp_path)
    assert done.returncode == 1
    assert "No public key" in done.stderr
    done = _run(kit, "--verify-only", "--allow-unsigned", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("WARNING: the origin of this kit is not checked")


def test_modules_beside_the_installer_are_not_run(kit: Path, public: bytes, tmp_path: Path) -> None:
    """A script's own folder is where Python looks for modules first; an archive's is not."""
    for name in ("argparse", "json", "hashlib", "pathlib", "sitecustomize", "pixano_edge_kit"):
        (kit / f"{name}.py").write_text("raise SystemExit('evil code ran')\n")
    for cwd in (tmp_path, kit):
        done = _run(kit, "--key", public.hex(), cwd=cwd)
        assert done.returncode == 1
        assert "evil" not in done.stderr
        assert "does not list" in done.stderr


@needs_pip
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_installer_leaves_nothing(kit: Path, public: bytes, tmp_path: Path, number: int) -> None:
    """Stopped while the environment is being made, in a real process."""
    command = [sys.executable, "-S", str(kit / "install.pyz"), "--key", public.hex(), "--venv", str(tmp_path / "venv")]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={"HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell in the background starts its programs with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(600):
        if (tmp_path / "venv" / "pyvenv.cfg").exists():
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Nothing was kept" in said
    assert not (tmp_path / "venv").exists()
    assert not (tmp_path / ".local/share/pixano-edge/bundles/mine").exists()
