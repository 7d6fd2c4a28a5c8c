"""`pixano-edge bundle ...` through the real frame."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.main import app
from tests.engine.bundle.sample import make_bundle


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return make_bundle(tmp_path / "sample", notes=["knows [shapes] only"])


def bundle(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bundle", *map(str, arguments)])


def ok(*arguments: object) -> str:
    result = bundle(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def failed(*arguments: object) -> str:
    result = bundle(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_inspect_folder_and_file_say_the_same(folder: Path, tmp_path: Path) -> None:
    ok("pack", folder, "-o", tmp_path / "a.pxe")
    one, two = json.loads(ok("inspect", folder, "--json")), json.loads(ok("inspect", tmp_path / "a.pxe", "--json"))
    assert one["hash"] == two["hash"] == Bundle.open(folder).hash
    assert one["manifest"] == two["manifest"]
    assert one["manifest"]["licence"]["spdx"] == "Apache-2.0"
    assert one["bytes"] > 12_000


def test_inspect_table(folder: Path) -> None:
    text = ok("inspect", folder)
    for word in (
        "sample",
        "Apache-2.0",
        "mask_decoder",
        "fp16",
        "Mean IoU",
        "passed",
        "knows [shapes] only",
        "org/sample",
    ):
        assert word in text


def test_inspect_without_parity(tmp_path: Path) -> None:
    assert "not measured" in ok("inspect", make_bundle(tmp_path / "b", parity=None))


def test_pack_unpack_default_names(folder: Path) -> None:
    assert "sample.pxe" in ok("pack", folder)
    assert "exists already" in failed("pack", folder)
    ok("pack", folder, "--force")
    assert ok("unpack", "sample.pxe").strip() == str(Path.cwd() / "sample")
    assert Bundle.open("sample").hash == Bundle.open(folder).hash
    assert "exists already" in failed("unpack", "sample.pxe")
    ok("unpack", "sample.pxe", "--force")
    ok("unpack", "sample.pxe", "-o", "other")
    assert "at most 100 " in failed("unpack", "sample.pxe", "-o", "third", "--max-bytes", "100")
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["other", "sample", "sample.pxe"]


def test_store(folder: Path, tmp_path: Path) -> None:
    assert ok("add", folder).strip() == str(tmp_path / "home" / "bundles" / "sample")
    names = [row["name"] for row in json.loads(ok("list", "--json"))]
    assert "sample" in names
    assert "sample" in ok("list")
    assert json.loads(ok("inspect", "sample", "--json"))["path"].endswith("bundles/sample")
    assert "already" in failed("add", folder)
    ok("add", folder, "--name", "second")
    ok("remove", "sample")
    assert "Known: " in failed("inspect", "sample")


def test_errors_are_one_message_with_an_action(folder: Path, tmp_path: Path) -> None:
    (folder / "golden/one.png").write_bytes(b"PNG")
    text = failed("inspect", folder)
    assert "damaged" in text
    assert "export it again" in text
    assert "no bundle" in failed("inspect", tmp_path / "none")
    (tmp_path / "bad.pxe").write_bytes(b"hello")
    assert "damaged, truncated" in failed("unpack", tmp_path / "bad.pxe")
    (tmp_path / "nosuffix").write_bytes(b"hello")
    assert "--output" in failed("unpack", tmp_path / "nosuffix")


def test_json_errors(folder: Path, tmp_path: Path) -> None:
    result = bundle("inspect", tmp_path / "none", "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "BundleError"
    assert error["action"]
