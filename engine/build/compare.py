"""Whether a network as TensorRT parsed it is what the contract says, and takes the profiles it gets.

Runs in the child. Works on TensorRT's objects, which are arguments; nothing is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_NUMPY = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def dtype_name(dtype: Any) -> str:
    """numpy's name of a TensorRT ``DataType``, or its own where numpy has none."""
    name = str(dtype.name)
    return _NUMPY.get(name, name.lower())


def compare_tensors(network: Any, spec: Mapping[str, Any]) -> list[str]:
    """Differences between the network's inputs and outputs and the contract: names, order, dtypes, ranks and sizes.

    Args:
        network: ``INetworkDefinition``.
        spec: `GraphSpec` as a dictionary.
    """
    problems = []
    for kind, found in (
        ("inputs", [network.get_input(i) for i in range(network.num_inputs)]),
        ("outputs", [network.get_output(i) for i in range(network.num_outputs)]),
    ):
        wanted = spec[kind]
        if [t.name for t in found] != [t["name"] for t in wanted]:
            problems.append(f"{kind} are {[t.name for t in found]}")
            continue
        for parsed, tensor in zip(found, wanted):
            shape, dtype = tuple(parsed.shape), dtype_name(parsed.dtype)
            fits = len(shape) == len(tensor["dims"]) and all(
                got == -1 if isinstance(want, str) else got in (want, -1) for got, want in zip(shape, tensor["dims"])
            )
            if dtype != tensor["dtype"] or not fits:
                problems.append(f"{tensor['name']} is {dtype} {shape}, expected {tensor['dtype']} {tensor['dims']}")
            if kind == "inputs" and parsed.is_shape_tensor:
                problems.append(f"{tensor['name']} is read on the host (a shape tensor)")
    return problems


def compare_profiles(network: Any, profiles: Iterable[Iterable[Any]]) -> list[str]:
    """Open inputs without a shape in a profile, and profiles for inputs that are not open."""
    opened = {network.get_input(i).name for i in range(network.num_inputs) if -1 in tuple(network.get_input(i).shape)}
    problems = []
    given = [{name for name, _ in profile} for profile in profiles]
    if opened and not given:
        problems.append(f"inputs {sorted(opened)} have open sizes and there is no profile for them")
    for index, named in enumerate(given):
        if missing := sorted(opened - named):
            problems.append(f"profile {index} has no shapes for {missing}")
        if fixed := sorted(named - opened):
            problems.append(f"profile {index} has shapes for {fixed}, whose sizes are fixed in the graph")
    return problems
