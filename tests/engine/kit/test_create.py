"""Making kits: what goes in, what is left out, and that a kit appears whole or not at all."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixano_edge.engine.bundle.files import hash_file
from pixano_edge.engine.bundle.store import demo_path
from pixano_edge.engine.cli.kit import app
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.kit import create as module
from pixano_edge.engine.kit import signing
from pixano_edge.engine.kit.archive import MODULES, write_installer
from pixano_edge.engine.kit.create import Made, create
from pixano_edge.engine.kit.manifest import KitRefused
from pixano_edge.engine.kit.verify import verify
from pixano_edge.engine.kit.wheels import Target

from .small import make_wheel, small_wheels

HERE = Target.of(None, None)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    return small_wheels(tmp_path / "wheels")


def _make(tmp_path: Path, wheels: Path, **options: Any) -> Made:
    return create(tmp_path / "out" / "kit", target=HERE, wheels=wheels, **options)


def test_a_kit_holds_what_the_box_needs_and_nothing_else(tmp_path: Path, wheels: Path) -> None:
    make_wheel(wheels, "unrelated", "1")
    make_wheel(wheels, "small-part", "2.4")  # older
    made = _make(tmp_path, wheels)
    assert not made.signed
    assert {pin.name: pin.version for pin in made.manifest.pins if pin.name != "pip"} == {
        "pixano-edge": "1.2.3",
        "small-part": "2.5",
    }
    assert sorted(p.name for p in made.folder.iterdir()) == [
        "README.txt",
        "bundles",
        "install.pyz",
        "kit.json",
        "requirements.txt",
        "wheels",
    ]
    assert len(list((made.folder / "wheels").iterdir())) == 3
    lines = (made.folder / "requirements.txt").read_text().splitlines()
    assert len(lines) == 3
    assert all("==" in line and " --hash=sha256:" in line for line in lines)
    assert sorted(p.name for p in made.folder.parent.iterdir()) == ["kit"]  # no temporary folder is left
    with pytest.raises(KitRefused):
        verify(made.folder, None)


def test_more_requirements(tmp_path: Path, wheels: Path) -> None:
    make_wheel(wheels, "unrelated", "1")
    made = _make(tmp_path, wheels, more=["unrelated<2"])
    assert "unrelated" in [pin.name for pin in made.manifest.pins]


def test_what_is_missing_is_named(tmp_path: Path, wheels: Path) -> None:
    with pytest.raises(EdgeError, match="not-needed"):
        _make(tmp_path, wheels, extras=["gpu"])
    with pytest.raises(EdgeError, match="no extra 'none'"):
        _make(tmp_path, wheels, extras=["cpu", "none"])
    assert not (tmp_path / "out" / "kit").exists()
    assert list((tmp_path / "out").iterdir()) == []


def test_no_wheel_of_the_project(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(wheels.glob("pixano_edge-*")).unlink()
    monkeypatch.setattr(module, "source_checkout", lambda: None)
    with pytest.raises(EdgeError, match="no wheel of pixano-edge"):
        _make(tmp_path, wheels)


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, wheels: Path) -> None:
    (tmp_path / "out" / "kit").mkdir(parents=True)
    (tmp_path / "out" / "kit" / "mine").touch()
    with pytest.raises(EdgeError, match="exists already"):
        _make(tmp_path, wheels)


def test_names_of_bundles(tmp_path: Path, wheels: Path) -> None:
    with pytest.raises(EdgeError, match="Two bundles"):
        _make(tmp_path, wheels, bundles=[("a", demo_path()), ("a", demo_path())])
    with pytest.raises(EdgeError, match="name is taken"):
        _make(tmp_path, wheels, bundles=[("sam2-demo", demo_path())])


def test_a_damaged_bundle_is_refused(tmp_path: Path, wheels: Path) -> None:
    bundle = Path(shutil.copytree(demo_path(), tmp_path / "bundle"))
    next((bundle / "graphs").iterdir()).write_bytes(b"")
    with pytest.raises(EdgeError, match="truncated"):
        _make(tmp_path, wheels, bundles=[("a", bundle)])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_name_that_leads_out_is_refused(tmp_path: Path, wheels: Path) -> None:
    for name in ("../a", "a/b", ".a", ""):
        with pytest.raises((EdgeError, KitRefused)):
            _make(tmp_path, wheels, bundles=[(name, demo_path())])
    assert not (tmp_path / "out" / "a").exists()


def test_engines_travel_inside_their_bundle(tmp_path: Path, wheels: Path) -> None:
    from pixano_edge.engine.bundle import Bundle
    from pixano_edge.engine.runtime.engine_file import write_engine
    from tests.engine.build.keys import make_key

    bundle = Bundle.open(demo_path())
    graph = bundle.graph_path("image_encoder", "fp32")
    engines = tmp_path / "engines" / "deep"
    engines.mkdir(parents=True)
    (tmp_path / "plan").write_bytes(b"plan")
    for name, digest in (("fits", hash_file(graph)), ("other", "0" * 64)):
        key = make_key(graph="image_encoder", variant="fp32", graph_sha256=digest)
        write_engine(engines / f"{name}.engine", tmp_path / "plan", key.to_dict(), {})
    said: list[str] = []
    made = _make(tmp_path, wheels, bundles=[("mine", demo_path())], engines=tmp_path / "engines", say=said.append)
    copied = Bundle.open(made.folder / "bundles" / "mine")
    assert copied.hash == bundle.hash
    assert copied.engines is not None
    assert len(copied.engines.engines) == 1
    assert any("1 engines belong to other bundles" in line for line in said)
    (engines / "fits.engine").unlink()
    with pytest.raises(EdgeError, match="None of the 1 engines"):
        create(tmp_path / "second", target=HERE, wheels=wheels, bundles=[("m", demo_path())], engines=engines)


def test_the_installer_is_the_same_bytes_for_the_same_source(tmp_path: Path) -> None:
    write_installer(tmp_path / "a.pyz")
    write_installer(tmp_path / "b.pyz")
    assert (tmp_path / "a.pyz").read_bytes() == (tmp_path / "b.pyz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pyz") as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert len(archive.namelist()) == len(MODULES) + 2


def test_the_installer_imports_the_standard_library_alone() -> None:
    import ast

    folder = Path(module.__file__).parent
    for name in MODULES:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1
                assert node.module in MODULES
                continue
            else:
                continue
            assert set(found) <= set(sys.stdlib_module_names)


def test_keys(tmp_path: Path) -> None:
    public, digits = signing.generate(tmp_path / "key", "secret")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert "ENCRYPTED" in (tmp_path / "key").read_text()
    assert signing.public_digits(signing.load(tmp_path / "key", lambda: "secret")) == digits
    with pytest.raises(EdgeError, match="passphrase is wrong"):
        signing.load(tmp_path / "key", lambda: "other")
    with pytest.raises(EdgeError, match="exists already"):
        signing.generate(tmp_path / "key")
    (tmp_path / "key").unlink()
    with pytest.raises(EdgeError, match="exists already"):
        signing.generate(tmp_path / "key")
    assert not (tmp_path / "key").exists()
    with pytest.raises(EdgeError, match="no private key"):
        signing.load(public, str)
    with pytest.raises(EdgeError, match="cannot be read"):
        signing.load(tmp_path / "none", str)


def test_a_key_of_another_kind(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ec").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    with pytest.raises(EdgeError, match="not an Ed25519 key"):
        signing.load(tmp_path / "ec", str)


def test_the_commands(tmp_path: Path, wheels: Path) -> None:
    runner = CliRunner()

    def run(*arguments: object) -> Any:
        return runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)

    made = run("keygen", tmp_path / "key", "--no-passphrase")
    digits = made.stdout.strip()
    assert len(digits) == 64
    out = tmp_path / "kit"
    extras = ("--extras", "cpu", "--wheels", wheels, "--bundle", f"mine={demo_path()}")
    result = run("create", "--out", out, *extras, "--sign", tmp_path / "key", "--json")
    facts = json.loads(result.stdout)
    assert facts["bundles"] == ["mine"]
    assert facts["signed by"] == digits
    assert facts["install.pyz"] == hash_file(out / "install.pyz")
    checked = json.loads(run("verify", out, "--key", tmp_path / "key.pub", "--json").stdout)
    assert checked["signature"] == "verified"
    assert checked["packages"]["small-part"] == "2.5"
    unchecked = run("verify", out, "--allow-unsigned")
    assert "NOT CHECKED" in unchecked.output
    assert "WARNING: the origin of this kit is not checked" in unchecked.output
    with pytest.raises(EdgeError, match="No public key"):
        run("verify", out)
    (out / "README.txt").write_text("")
    with pytest.raises(EdgeError, match="truncated"):
        run("install", out, "--key", digits, "--venv", tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_installing_needs_no_library_of_the_extra(signed: Made, public: bytes) -> None:
    code = (
        "import sys\n"
        "sys.modules['cryptography'] = sys.modules['packaging'] = None\n"
        "from pixano_edge.engine.cli.kit import app\n"
        f"app(['verify', {str(signed.folder)!r}, '--key', {public.hex()!r}])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
