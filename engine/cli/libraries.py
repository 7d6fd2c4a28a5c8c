"""Installed libraries against what the distribution declares, and wheels that overwrite each other."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ..libraries import DISTRIBUTION, OPENCV_WHEELS, ORT_WHEELS, Versions, installed_version

_MODULE_OF = {"opencv-python-headless": "cv2", "pillow": "PIL"}

Level = Literal["problem", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something worth saying: `problem` stops pixano-edge from working, `warning` may, `note` does not."""

    level: Level
    message: str
    action: str = ""


@dataclass(frozen=True)
class Library:
    """One declared requirement; `version` is None where it is not installed, `extra` is empty for the base."""

    name: str
    required: str
    extra: str
    version: str | None


def parse_requirement(text: str) -> tuple[str, str, str]:
    """``onnxruntime>=1.20; extra == "cpu"`` -> (name, version constraint, extra)."""
    requirement, _, marker = text.partition(";")
    name = re.match(r"\s*([A-Za-z0-9._-]+)", requirement)
    extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", marker)
    constraint = re.sub(r"\[[^]]*\]", "", requirement[name.end() if name else 0 :]).strip()
    return (name.group(1) if name else requirement.strip()), constraint, extra.group(1) if extra else ""


def libraries(requirements: Iterable[str] | None = None, version_of: Versions = installed_version) -> list[Library]:
    """Every declared requirement with its installed version, base first; an extra that names others is left out."""
    if requirements is None:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    found = []
    for text in requirements:
        name, constraint, extra = parse_requirement(text)
        if name != DISTRIBUTION:
            found.append(Library(name, constraint, extra, version_of(name)))
    return sorted(found, key=lambda lib: (lib.extra != "", lib.extra, lib.name))


def import_problem(module: str) -> str | None:
    """Why `module` cannot be imported, or None when it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


def base_findings(
    found: Iterable[Library],
    version_of: Versions = installed_version,
    problem_of: Callable[[str], str | None] = import_problem,
) -> list[Finding]:
    """What is missing or broken among the libraries that every command needs."""
    findings = []
    for lib in found:
        if lib.extra:
            continue
        module = _MODULE_OF.get(lib.name, lib.name)
        if lib.version is None and not (module == "cv2" and any(version_of(w) for w in OPENCV_WHEELS)):
            findings.append(
                Finding("problem", f"{lib.name} is not installed.", f"pip install '{lib.name}{lib.required}'")
            )
        elif why := problem_of(module):
            action = f"pip install --force-reinstall '{lib.name}{lib.required}'"
            if module == "cv2" and "libGL" in why:
                action = "pip uninstall -y opencv-python && pip install opencv-python-headless"
            findings.append(Finding("problem", f"{module} cannot be imported: {why}", action))
    return findings


def wheel_conflicts(version_of: Versions = installed_version) -> list[Finding]:
    """Wheels that write the same files: several ONNX Runtimes, several OpenCVs."""
    findings = []
    runtimes = [w for w in ORT_WHEELS if version_of(w)]
    if len(runtimes) > 1:
        extra = "cuda" if "onnxruntime-gpu" in runtimes else "cpu"
        findings.append(
            Finding(
                "problem",
                f"{' and '.join(runtimes)} are both installed and overwrite each other's files: "
                "which one runs depends on the order of installation.",
                f"pip uninstall -y {' '.join(runtimes)} && pip install 'pixano-edge[{extra}]'",
            )
        )
    opencvs = [w for w in OPENCV_WHEELS if version_of(w)]
    if len(opencvs) > 1:
        findings.append(
            Finding(
                "warning",
                f"{' and '.join(opencvs)} are both installed and write the same cv2 folder.",
                f"pip uninstall -y {' '.join(opencvs)} && pip install opencv-python-headless",
            )
        )
    return findings


def runtime_findings(
    version_of: Versions = installed_version, problem_of: Callable[[str], str | None] = import_problem
) -> list[Finding]:
    """Whether exactly one working ONNX Runtime is there (a wheel or a system build)."""
    wheels = [w for w in ORT_WHEELS if version_of(w)]
    why = problem_of("onnxruntime")
    if why is None and not hasattr(importlib.import_module("onnxruntime"), "InferenceSession"):
        # What uninstalling one of two overlapping wheels leaves behind.
        why = "its files are incomplete"
    if why is None:
        return []
    if not wheels:
        return [
            Finding(
                "problem",
                "No ONNX Runtime is installed; nothing can run without one.",
                "pip install 'pixano-edge[cpu]'",
            )
        ]
    extra = "cuda" if "onnxruntime-gpu" in wheels else "cpu"
    return [
        Finding(
            "problem",
            f"{wheels[0]} {version_of(wheels[0])} is installed but does not work: {why}.",
            f"pip uninstall -y {' '.join(wheels)} && pip install 'pixano-edge[{extra}]'",
        )
    ]
