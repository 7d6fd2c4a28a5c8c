"""Which provider runs which nodes: counted after loading, refused where the CPU would do the work of another one.

ONNX Runtime gives every node that a provider does not take to the CPU without a word. Since 1.24 it tells where they
went (``InferenceSession.get_provider_graph_assignment_info``); older ones are told not to use the CPU at all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DeviceError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
ATTENTION = "GroupQueryAttention"
HALF_ATTENTION = (
    f"That provider has {ATTENTION} in half precision alone: of a language model it runs fp16, and fp32 and int8 by "
    "the decoder that is made for TensorRT, which this bundle lacks (export it again, or calibrate int8 again; int4 "
    "has none)."
)
RECORD = ("session.record_ep_graph_assignment_info", "1")
"""Session config entry without which there is nothing to tell."""
NO_CPU = ("session.disable_cpu_ep_fallback", "1")
"""Session config entry for versions that cannot tell: the session fails if a node goes to the CPU."""

# fmt: off
SHAPE_OPS = frozenset((
    "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor",
    "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Not",
    "Or", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
))
# fmt: on
"""Operators that ONNX Runtime moves to the CPU on purpose where they compute sizes: a few integers that come from
``Shape`` or constants (core/framework/fallback_cpu_capability.cc). CUDA has kernels of all of them, so on tensors of
a model they stay there. Where the GPU needs such integers they are copied to it; whether that happens cannot be seen
here, so a session with any node on the CPU is not offered for capture (`OrtSession.capturable`)."""


@dataclass(frozen=True)
class Placement:
    """Number of nodes by operator, by provider. Nodes that a provider fuses are counted one by one."""

    nodes: Mapping[str, Mapping[str, int]]

    @property
    def counts(self) -> dict[str, int]:
        """Number of nodes by provider."""
        return {provider: sum(ops.values()) for provider, ops in self.nodes.items()}

    @property
    def cpu_work(self) -> dict[str, int]:
        """CPU nodes, by operator, that compute more than shapes."""
        return {op: count for op, count in self.nodes.get(CPU, {}).items() if op not in SHAPE_OPS}

    @property
    def cpu_shapes(self) -> int:
        """Number of CPU nodes that compute shapes."""
        return sum(count for op, count in self.nodes.get(CPU, {}).items() if op in SHAPE_OPS)


def tells_placement(ort: Any) -> bool:
    """Whether this ONNX Runtime can say where nodes run."""
    return hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")


def read_placement(session: Any) -> Placement:
    """Where the nodes of a session are, whose options had the entry `RECORD`."""
    nodes: dict[str, Counter[str]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        nodes.setdefault(subgraph.ep_name, Counter()).update(node.op_type for node in subgraph.get_nodes())
    return Placement({provider: dict(sorted(ops.items())) for provider, ops in nodes.items()})


def check_placement(placement: Placement, provider: str, graph: str, *, allow_cpu_nodes: bool) -> list[str]:
    """Refuses a session whose provider does not do the work.

    Args:
        placement: Of the open session.
        provider: Full name of the provider that was asked for; not the CPU's.
        graph: Name for messages.
        allow_cpu_nodes: Accept CPU nodes that compute more than shapes.

    Returns:
        Warnings: nodes that other providers run, the CPU's shape computations included.

    Raises:
        DeviceError: The provider runs no node, or the CPU runs some that it may not.
    """
    counts, work = placement.counts, placement.cpu_work
    if not counts.get(provider):
        raise DeviceError(
            f"{provider} runs no node of graph '{graph}'; ONNX Runtime gave them to {counts or 'nobody'}.",
            "Use another provider for this graph.",
        )
    if work and not allow_cpu_nodes:
        why = f" {HALF_ATTENTION}" if ATTENTION in work and provider == CUDA else ""
        raise DeviceError(
            f"{sum(work.values())} nodes of graph '{graph}' would run on the CPU instead of {provider}: {work}.{why}",
            "Use another --precision or --backend; or allow it with the session's option allow_cpu_nodes.",
        )
    warnings = []
    if work:
        warnings.append(f"{sum(work.values())} nodes run on the CPU and copy tensors at every run: {work}")
    if placement.cpu_shapes:
        warnings.append(f"{placement.cpu_shapes} nodes that compute shapes run on the CPU, on a few integers each")
    warnings += [f"{n} nodes run on {name}" for name, n in counts.items() if name not in (provider, CPU) and n]
    return warnings


def read_profile(path: Path) -> dict[str, dict[str, int]]:
    """Kernels that one profile of ONNX Runtime saw running: count by operator, by provider.

    Copies between host and device are in it as ``MemcpyToHost`` and ``MemcpyFromHost``.

    Raises:
        DeviceError: The file is missing or no profile.
    """
    try:
        events = json.loads(path.read_text())
        found: dict[str, Counter[str]] = {}
        for event in events:
            details = event.get("args", {})
            if event.get("cat") == "Node" and details.get("provider") and event["name"].endswith("_kernel_time"):
                found.setdefault(details["provider"], Counter())[details["op_name"]] += 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeviceError(f"'{path}' is no profile of ONNX Runtime: {error}", "Profile the session again.") from error
    return {provider: dict(ops) for provider, ops in found.items()}
