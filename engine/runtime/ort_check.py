"""ONNX Runtime itself: importing it, the errors it raises, and comparing a loaded file with its contract."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..contracts.base import GraphSpec, TensorSpec
from ..errors import ContractError, DeviceError, MissingDependencyError

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}


def load_onnxruntime() -> ModuleType:
    """Imports ONNX Runtime at first use.

    Raises:
        MissingDependencyError: Not installed.
        DeviceError: Installed, but it does not load or its files are incomplete (two wheels overwrote each other).
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError("onnxruntime", "cpu", "Running graphs") from error
    except ImportError as error:
        raise DeviceError(
            f"onnxruntime is installed but does not load: {error}", "Run 'pixano-edge doctor'."
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise DeviceError(
            "onnxruntime is installed but its files are incomplete.",
            "Run 'pixano-edge doctor': onnxruntime and onnxruntime-gpu may have overwritten each other.",
        )
    module: ModuleType = onnxruntime
    return module


def error_types(ort: ModuleType) -> tuple[type[Exception], ...]:
    """Everything that ONNX Runtime raises: its own types have no common base below Exception."""
    state = ort.capi.onnxruntime_pybind11_state
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, ValueError, OSError)


def check_graph(
    spec: GraphSpec,
    inputs: Mapping[str, tuple[str, list[Any] | None]],
    outputs: Mapping[str, tuple[str, list[Any] | None]],
) -> None:
    """Compares what a file declares (type and shape by name) with the contract.

    A dimension that the file leaves open is accepted anywhere; a fixed one must be the contract's.

    Raises:
        ContractError: Lists every difference.
    """
    problems: list[str] = []
    for kind, specs, found in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        names = {s.name for s in specs}
        problems += [f"{kind} '{n}' is missing" for n in sorted(names - set(found))]
        problems += [f"{kind} '{n}' is not in the contract" for n in sorted(set(found) - names)]
        problems += [
            f"{kind} '{s.name}' {why}" for s in specs if s.name in found for why in _differs(s, *found[s.name])
        ]
    if problems:
        raise ContractError(
            f"The file of graph '{spec.name}' does not fit its contract: {'; '.join(problems)}.",
            "Export the bundle again with this version of pixano-edge.",
        )


def _differs(spec: TensorSpec, kind: str, shape: list[Any] | None) -> list[str]:
    dtype = _DTYPES.get(kind, kind)
    if dtype != spec.dtype:
        return [f"is {dtype} instead of {spec.dtype}"]
    if shape is None:
        return []
    if len(shape) != spec.rank:
        return [f"has rank {len(shape)} {shape} instead of {spec.rank} {list(spec.dims)}"]
    return [
        f"has {got} instead of {want} in dimension {axis}"
        for axis, (want, got) in enumerate(zip(spec.dims, shape))
        if isinstance(got, int) and got != want
    ]
