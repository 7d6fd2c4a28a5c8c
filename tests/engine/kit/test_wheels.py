"""Which wheels a box needs: markers and tags are the box's, not those of the machine that makes the kit."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.kit import wheels as module
from pixano_edge.engine.kit.wheels import Target, closure, download, fitting, read_wheel

from .small import make_wheel

HERE = Target.of(None, None)
JETSON = Target.of("manylinux_2_35_aarch64", "3.10")


def _names(requirements: list[str], folder: Path, target: Target = HERE) -> tuple[dict[str, str], list[str]]:
    found = closure(requirements, folder, target)
    return {name: wheel.version for name, wheel in found.wheels.items()}, found.missing


def test_this_machine() -> None:
    assert Target(f"{sys.version_info[0]}.{sys.version_info[1]}", platform.machine()) == HERE
    assert HERE.pip_options == []


def test_another_machine() -> None:
    assert (JETSON.python, JETSON.machine) == ("3.10", "aarch64")
    assert JETSON.platforms[0] == "manylinux_2_35_aarch64"
    assert "manylinux2014_aarch64" in JETSON.platforms
    assert "manylinux_2_36_aarch64" not in JETSON.platforms
    assert JETSON.pip_options[-4:] == ["--python-version", "3.10", "--implementation", "cp"]
    assert Target.of("manylinux2014_x86_64", "3.12").platforms[0] == "manylinux_2_17_x86_64"


def test_another_python_of_this_machine() -> None:
    target = Target.of(None, "3.99")
    assert (target.python, target.machine) == ("3.99", platform.machine())
    assert target.platforms


@pytest.mark.parametrize(
    ("where", "python"), [("jetson", None), ("win_amd64", None), ("manylinux_1_x86_64", None), (None, "3"), (None, "x")]
)
def test_what_is_no_target(where: str | None, python: str | None) -> None:
    with pytest.raises(EdgeError) as caught:
        Target.of(where, python)
    assert caught.value.action


def test_requirements_are_followed(tmp_path: Path) -> None:
    make_wheel(tmp_path, "a", "1", requires=["B>=2", "c; extra == 'more'", "d[x]"], extras=["more"])
    make_wheel(tmp_path, "b", "2.1")
    make_wheel(tmp_path, "c", "1")
    make_wheel(tmp_path, "d", "1", requires=["e; extra == 'x'", "f; extra == 'y'"], extras=["x", "y"])
    make_wheel(tmp_path, "e", "1", requires=["a"])
    make_wheel(tmp_path, "unrelated", "1")
    assert _names(["a"], tmp_path) == ({"a": "1", "b": "2.1", "d": "1", "e": "1"}, [])
    assert _names(["a[more]"], tmp_path)[0].keys() == {"a", "b", "c", "d", "e"}
    assert _names(["a", "f"], tmp_path)[1] == ["f"]


def test_the_markers_are_the_box_s(tmp_path: Path) -> None:
    """pip would take the markers of the Python that runs it, and leave out what only an older one needs."""
    requires = ["old; python_version < '3.11'", "arm; platform_machine == 'aarch64'", "win; sys_platform == 'win32'"]
    make_wheel(tmp_path, "a", "1", requires=requires)
    assert _names(["a"], tmp_path, JETSON)[1] == ["arm", "old"]
    assert _names(["a"], tmp_path, Target.of("manylinux_2_35_x86_64", "3.12"))[1] == []


def test_only_wheels_that_fit_count(tmp_path: Path) -> None:
    make_wheel(tmp_path, "a", "1", tag="cp310-cp310-manylinux2014_aarch64")
    make_wheel(tmp_path, "a", "2", tag="cp312-cp312-manylinux2014_aarch64")
    make_wheel(tmp_path, "a", "3", tag="cp310-cp310-manylinux_2_39_aarch64")
    make_wheel(tmp_path, "b", "1", tag="cp39-abi3-manylinux_2_28_aarch64")
    make_wheel(tmp_path, "c", "1", tag="cp310-cp310-win_arm64")
    assert {name: [w.version for w in held] for name, held in fitting(tmp_path, JETSON).items()} == {
        "a": ["1"],
        "b": ["1"],
    }


def test_versions_must_fit(tmp_path: Path) -> None:
    make_wheel(tmp_path, "a", "1", requires=["b<2"])
    make_wheel(tmp_path, "b", "1.9")
    make_wheel(tmp_path, "b", "2.0")
    make_wheel(tmp_path, "pre", "2.0rc1")
    assert _names(["a"], tmp_path) == ({"a": "1", "b": "1.9"}, [])
    assert _names(["a>1", "b"], tmp_path)[1] == ["a>1"]
    assert _names(["pre<3"], tmp_path) == ({"pre": "2.0rc1"}, [])
    # Two requirements that one version cannot fulfil are told, not half fulfilled.
    assert _names(["b>=2", "b<2"], tmp_path)[1]


def test_what_is_no_wheel(tmp_path: Path) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"PK")
    with pytest.raises(EdgeError, match="not a wheel"):
        read_wheel(tmp_path / "a-1-py3-none-any.whl")
    (tmp_path / "a-1-py3-none-any.whl").rename(tmp_path / "a.whl")
    with pytest.raises(EdgeError, match="not the name of a wheel"):
        fitting(tmp_path, HERE)


def test_what_pip_left_out_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pip that ignores what this machine's markers exclude."""
    rounds: list[list[str]] = []

    def pip(command: str, *arguments: str) -> None:
        asked = [a for a in arguments if not a.startswith("-") and a[0].islower() and "/" not in a]
        rounds.append([a for a in asked if a in ("a", "old>=1")])
        make_wheel(tmp_path, "a", "1", requires=["old>=1; python_version < '3.11'"])
        if "old>=1" in arguments:
            make_wheel(tmp_path, "old", "1.2")

    monkeypatch.setattr(module, "_pip", pip)
    found = download(["a"], tmp_path, JETSON)
    assert rounds == [["a"], ["a", "old>=1"]]
    assert set(found.wheels) == {"a", "old"}


def test_what_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_pip", lambda *arguments: make_wheel(tmp_path, "a", "1", requires=["gone>=3"]))
    with pytest.raises(EdgeError, match="gone>=3"):
        download(["a"], tmp_path, JETSON)


def test_pip_s_own_words_are_shown(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="pip download failed") as caught:
        download(["not a requirement"], tmp_path, HERE)
    assert "not a requirement" in caught.value.message
