"""Environments of their own for packages whose dependencies clash with ours.

``python -m tests.support.environments pixano`` (or ``ray``) makes one in ``.venvs/``, or in the folder that
``PIXANO_EDGE_TEST_VENVS`` names; tests find them there. They hold this project as an editable install without its
dependencies, which are listed here beside the guest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_OWN = ("onnxruntime>=1.20", "orjson>=3.9", "tokenizers>=0.20", "pytest>=8", "pytest-asyncio>=0.24")


@dataclass(frozen=True)
class Environment:
    """What an environment holds.

    Attributes:
        requirements: For pip.
        overlays: Folder -> a package that is installed there alone, to be put on ``PYTHONPATH`` before the others.
    """

    requirements: tuple[str, ...]
    overlays: Mapping[str, str]


ENVIRONMENTS = {
    # Pixano brings opencv-python, which has the same cv2 as our opencv-python-headless.
    "pixano": Environment(("pixano==0.8.0", *_OWN), {"pixano-0.7.2": "pixano==0.7.2"}),
    "ray": Environment(
        ("pixano-inference[server]==0.7.1", "opencv-python-headless>=4.9", "rich>=13", "jinja2>=3.1", *_OWN),
        overlays={},
    ),
}


def folder(name: str) -> Path:
    """Where an environment is or would be."""
    return Path(os.environ.get("PIXANO_EDGE_TEST_VENVS", ROOT / ".venvs")) / name


def python(name: str) -> Path | None:
    """Interpreter of an environment, None where it is not there."""
    found = folder(name) / "bin" / "python"
    return found if found.is_file() else None


def missing(name: str) -> str:
    """Why a test of an environment is skipped, and what makes it run."""
    return f"no environment '{name}' in {folder(name).parent}: make it with python -m tests.support.environments {name}"


def variables(name: str, overlay: str | None = None) -> dict[str, str]:
    """Environment variables of a process there: this checkout comes first, whichever was installed."""
    paths = [ROOT / ".ci" / "typing"] + ([folder(name) / overlay] if overlay else [])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def make(name: str) -> None:
    """Makes an environment, or completes it; raises CalledProcessError."""
    wanted, home = ENVIRONMENTS[name], folder(name)
    if python(name) is None:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted.requirements], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
    for target, requirement in wanted.overlays.items():
        if not (home / target).is_dir():
            subprocess.run([*pip, "--no-deps", "--target", str(home / target), requirement], check=True)
    check = "import importlib.util as u; assert u.find_spec('torch') is None, 'torch was pulled in'"
    subprocess.run([str(home / "bin" / "python"), "-c", check], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=ENVIRONMENTS)
    make(parser.parse_args().name)
