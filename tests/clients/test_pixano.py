"""Pixano itself, in its own environment, against a running server and with `EdgeProvider` inside.

The checks are in `in_pixano` and run there, by its own pytest.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import VLM, Live
from tests.support import environments

CHECKS = Path(__file__).parent / "in_pixano"

pytestmark = [
    pytest.mark.pixano,
    pytest.mark.skipif(environments.python("pixano") is None, reason=environments.missing("pixano")),
]


@pytest.mark.parametrize("check", sorted(path.name for path in CHECKS.glob("check_*.py")))
def test_in_pixano(check: str, live: Live, tiny_vlm_bundle: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    shutil.copytree(tiny_vlm_bundle, tmp_path / "bundles" / VLM)
    overlay = "pixano-0.7.2" if "_07_" in check else None
    command = [environments.python("pixano"), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    options = ["-o", "addopts=", "-o", "python_files=check_*.py", "--confcutdir", str(CHECKS), str(CHECKS / check)]
    done = subprocess.run(
        [*map(str, command), *options],
        env={**environments.variables("pixano", overlay), "EDGE_URL": live.url, "PIXANO_EDGE_HOME": str(tmp_path)},
        cwd=environments.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    terminal: Any = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    for line in done.stdout.splitlines():
        if line.startswith("SKIPPED"):
            terminal.write_line(f"in Pixano's environment: {line}")
