"""The wheels of a kit: fetched with pip, and proven complete for the box that they are for.

pip evaluates environment markers (``; python_version < "3.11"``) for the Python that runs it, even when it downloads
for another one. So what it fetched is followed from wheel to wheel with the markers of the *target*; what is missing
is asked for by name in another round, and what the target does not need is left out.
"""

from __future__ import annotations

import email.parser
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EdgeError, MissingDependencyError

PROJECT = "pixano-edge"
_ROUNDS = 6
_GLIBC = re.compile(r"manylinux_2_(\d+)_(\w+)")
_ALIASES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


@dataclass(frozen=True)
class Target:
    """The box that a kit is for.

    Attributes:
        python: ``3.10``.
        machine: ``x86_64`` or ``aarch64``.
        platforms: Platform tags of wheels that it takes, best first; empty: this machine, with this Python.
    """

    python: str
    machine: str
    platforms: tuple[str, ...] = ()

    @classmethod
    def of(cls, platform: str | None, python: str | None) -> Target:
        """Reads ``--platform`` and ``--python-version``.

        Args:
            platform: ``manylinux_2_35_aarch64`` (glibc 2.35), ``manylinux2014_x86_64``, or None for this machine.
            python: ``3.10``, or None for this Python.

        Raises:
            EdgeError: Not of that form.
        """
        import platform as here

        own = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if python is not None and not re.fullmatch(r"3\.\d{1,2}", python):
            raise EdgeError(f"'{python}' is not a Python version.", "Write it as in --python-version 3.10")
        if platform is None and python in (None, own):
            return cls(own, here.machine())
        if platform is None:
            libc, version = here.libc_ver()
            minor = version.partition(".")[2]
            if libc != "glibc" or not minor.isdecimal():
                raise EdgeError("The C library of this machine is not known.", "Name the box with --platform.")
            platform = f"manylinux_2_{minor}_{here.machine()}"
        for minor_number, alias in _ALIASES.items():
            platform = re.sub(rf"^{alias}_", f"manylinux_2_{minor_number}_", platform)
        match = _GLIBC.fullmatch(platform)
        if match is None:
            raise EdgeError(
                f"'{platform}' is not a platform that kits are made for.",
                "Use manylinux_2_<glibc's minor version>_x86_64 or ..._aarch64; 'ldd --version' on the box tells it.",
            )
        tags = []
        for minor_number in range(int(match[1]), 4, -1):
            tags.append(f"manylinux_2_{minor_number}_{match[2]}")
            if minor_number in _ALIASES:
                tags.append(f"{_ALIASES[minor_number]}_{match[2]}")
        return cls(python or own, match[2], (*tags, f"linux_{match[2]}"))

    @property
    def pip_options(self) -> list[str]:
        """What makes ``pip download`` fetch for this box."""
        if not self.platforms:
            return []
        tags = [option for tag in self.platforms for option in ("--platform", tag)]
        return [*tags, "--python-version", self.python, "--implementation", "cp"]

    def environment(self) -> dict[str, str]:
        """Values of the environment markers there."""
        markers = _packaging("markers")
        if not self.platforms:
            return {**markers.default_environment(), "extra": ""}
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
            "extra": "",
        }

    def tags(self) -> frozenset[Any]:
        """Every tag of a wheel that installs there."""
        tags = _packaging("tags")
        if not self.platforms:
            return frozenset(tags.sys_tags())
        version = tuple(map(int, self.python.split(".")))
        return frozenset(
            (
                *tags.cpython_tags(version, platforms=self.platforms),
                *tags.compatible_tags(version, f"cp{version[0]}{version[1]}", self.platforms),
            )
        )


@dataclass(frozen=True)
class Wheel:
    """A wheel file: canonical name, version, requirements as they stand, sizes in bytes."""

    file: Path
    name: str
    version: str
    requires: tuple[str, ...]
    unpacked: int


@dataclass
class Closure:
    """What a set of requirements takes: the wheels for it, and the requirements that no wheel fulfils."""

    wheels: dict[str, Wheel] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def read_wheel(file: Path) -> Wheel:
    """Name, version and requirements of a wheel.

    Raises:
        EdgeError: Not a wheel, or damaged.
    """
    canonical = _packaging("utils").canonicalize_name
    try:
        with zipfile.ZipFile(file) as archive:
            names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            head = email.parser.Parser().parsestr(archive.read(names[0]).decode("utf-8", "replace"), headersonly=True)
            size = sum(info.file_size for info in archive.infolist())
        requires = tuple(head.get_all("Requires-Dist") or ())
        return Wheel(file, str(canonical(head["Name"])), str(head["Version"]), requires, size)
    except (OSError, zipfile.BadZipFile, IndexError, KeyError, TypeError, AttributeError) as error:
        raise EdgeError(f"'{file}' is not a wheel, or is damaged: {error}.", "Remove it or get it again.") from error


def fitting(folder: Path, target: Target) -> dict[str, list[Wheel]]:
    """Wheels of a folder that install on the target, by name, newest version first."""
    utils, accepted = _packaging("utils"), target.tags()
    version = _packaging("version").Version
    found: dict[str, list[Wheel]] = {}
    for file in sorted(folder.glob("*.whl")):
        try:
            tags = utils.parse_wheel_filename(file.name)[3]
        except utils.InvalidWheelFilename as error:
            raise EdgeError(f"'{file.name}' is not the name of a wheel: {error}.", "Remove or rename it.") from error
        if tags & accepted:
            wheel = read_wheel(file)
            found.setdefault(wheel.name, []).append(wheel)
    for wheels in found.values():
        wheels.sort(key=lambda w: version(w.version), reverse=True)
    return found


def closure(requirements: Iterable[str], folder: Path, target: Target) -> Closure:
    """Follows requirements from wheel to wheel, with the target's markers.

    Args:
        requirements: As in a requirements file.
        folder: The wheels.
        target: Whose markers and tags count.
    """
    requirement, canonical = _packaging("requirements").Requirement, _packaging("utils").canonicalize_name
    environment, have = target.environment(), fitting(folder, target)
    result, done = Closure(), set()
    queue = [(requirement(text), ("",)) for text in requirements]
    while queue:
        wanted, extras = queue.pop()
        if wanted.marker is not None and not any(wanted.marker.evaluate({**environment, "extra": e}) for e in extras):
            continue
        name = str(canonical(wanted.name))
        held = [w for w in have.get(name, ()) if wanted.specifier.contains(w.version, prereleases=True)]
        chosen = result.wheels.get(name)
        if chosen is not None and chosen not in held:
            held = []  # two requirements that no single wheel fulfils
        if not held:
            result.missing.append(_plain(wanted))
            continue
        wheel = result.wheels.setdefault(name, chosen or held[0])
        for extra in ("", *sorted(wanted.extras)):
            if (name, extra) not in done:
                done.add((name, extra))
                queue += [(requirement(text), (extra,)) for text in wheel.requires]
    result.missing = sorted(set(result.missing))
    return result


def download(requirements: Sequence[str], folder: Path, target: Target) -> Closure:
    """Fetches wheels for `requirements` into `folder` until nothing is missing; uses the network, through pip.

    Args:
        requirements: As in a requirements file.
        folder: May hold wheels already, which are taken where they fit (pixano-edge's own).
        target: The box.

    Raises:
        EdgeError: pip failed (its last lines are in the message), or something has no wheel for the target.
    """
    asked = list(requirements)
    for _ in range(_ROUNDS):
        _pip("download", "--dest", str(folder), "--find-links", str(folder), *target.pip_options, *asked)
        found = closure(requirements, folder, target)
        if not found.missing:
            return found
        if set(found.missing) <= set(asked):
            break
        asked += [text for text in found.missing if text not in asked]
    raise incomplete(found)


def incomplete(found: Closure) -> EdgeError:
    """The error for wheels that are missing."""
    return EdgeError(
        f"No wheel fulfils: {', '.join(found.missing[:10])}.",
        "Put wheels that fit the box into a folder and name it with --wheels, or choose other versions with --with.",
    )


def build_project(source: Path, folder: Path) -> Path:
    """Builds pixano-edge's own wheel from a source checkout.

    Raises:
        EdgeError: The build failed.
    """
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("pixano_edge-*.whl"))


def _pip(command: str, *arguments: str) -> None:
    only = ["--only-binary", ":all:"] if command == "download" else []
    line = [sys.executable, "-m", "pip", command, "--disable-pip-version-check", "-q", *only, *arguments]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-12:])
        raise EdgeError(
            f"pip {command} failed:\n{last}\n",
            "Kits hold wheels only. Check the network, --platform, --python-version, --extras and --with.",
        )


def _plain(requirement: Any) -> str:
    """A requirement without its marker, as pip takes it on the command line."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _packaging(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"packaging.{module}")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("packaging", "kit", "Making a kit") from error
