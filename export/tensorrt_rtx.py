"""Ahead-of-time build with TensorRT for RTX: proves without a GPU that a graph parses, types and compiles.

The work is done by `pixano_edge.engine.build`, in a child process; the engine is thrown away. Networks of TensorRT
for RTX are always strongly typed, so a graph that mixes fp16 and fp32 wrongly fails here. A build says nothing about
the numbers; those need a GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pixano_edge.engine.build import library
from pixano_edge.engine.build.builder import check_problems, run_child
from pixano_edge.engine.build.key import TENSORRT_RTX
from pixano_edge.engine.build.profiles import profiles
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import BuildError, DeviceError, ExportError, MissingDependencyError

COMPUTE_CAPABILITIES = ("SM86", "SM89")
"""Ampere and Ada cards; 1.7 knows SM75, 80, 86, 89, 120 and 121, neither Orin (87) nor Hopper (90)."""


@dataclass(frozen=True)
class Build:
    """What a build gave.

    Attributes:
        engine_bytes: Size of the serialised engine; the engine itself is thrown away.
        seconds: Duration of the build.
        version: Version of TensorRT for RTX.
    """

    engine_bytes: int
    seconds: float
    version: str


def missing_module() -> str | None:
    """Name of the module that is not installed, or None."""
    return None if TENSORRT_RTX in library.installed() else TENSORRT_RTX


def check_build(
    file: Path,
    spec: GraphSpec,
    compute_capabilities: Sequence[str] = COMPUTE_CAPABILITIES,
    timeout: float = 900.0,
) -> Build:
    """Builds one engine for the given GPUs and compares the parsed network with the contract.

    Args:
        file: ONNX file; external weights lie beside it.
        spec: Contract; its ranges become the optimisation profiles.
        compute_capabilities: Names such as ``SM89``.
        timeout: Seconds until the child is ended.

    Raises:
        MissingDependencyError: The wheels are not installed.
        ExportError: The graph does not parse or build, or differs from its contract.
    """
    if absent := missing_module():
        raise MissingDependencyError(absent, library.EXTRAS[TENSORRT_RTX], "Building for TensorRT")
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "action": "build",
            "name": spec.name,
            "flavour": TENSORRT_RTX,
            "file": str(file),
            "spec": asdict(spec),
            "profiles": profiles(spec),
            "flags": {},
            "compute_capabilities": list(compute_capabilities),
            "output": str(Path(folder) / "engine"),
        }
        try:
            answer = run_child(job, timeout=timeout)
            check_problems(job, answer)
        except (BuildError, DeviceError) as error:
            raise ExportError(error.message, error.action) from error
    return Build(answer["engine_bytes"], answer["seconds"], answer["version"])
