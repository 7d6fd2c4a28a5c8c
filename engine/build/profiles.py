"""Optimisation profiles of a graph: shapes that an engine takes and those that it is tuned for."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..contracts.base import GraphSpec
from ..errors import ContractError
from .key import Profile, Shapes

SPREAD = 4
"""The first profile reaches to this many times the typical size of each dimension."""


def profiles(spec: GraphSpec) -> tuple[Profile, ...]:
    """Profiles for the ranges of a contract, the tight one first; none where every size is fixed.

    TensorRT times its tactics at the middle shape and sizes a context's scratch memory by the largest one. So there
    is one profile for the typical case (a few prompts at a time), and one for the whole range, tuned halfway between
    typical and largest on a logarithmic scale. A session takes the tightest one that fits. A contract that lists
    profiles itself gets those.

    Raises:
        ContractError: An input has an open dimension without a range.
    """
    dims = list(dict.fromkeys(dim for tensor in spec.inputs for dim in tensor.dynamic))
    if not dims:
        return ()
    if missing := [dim for dim in dims if dim not in spec.ranges]:
        raise ContractError(
            f"Graph '{spec.name}' has no range for {missing}.", "Give each dynamic dimension one in the contract."
        )
    if spec.profiles:
        return tuple(_profile(spec, ranges) for ranges in spec.profiles)
    typical, whole = {}, {}
    for dim in dims:
        low, usual, high = spec.ranges[dim]
        typical[dim] = (low, usual, min(high, SPREAD * usual))
        whole[dim] = (low, max(low, round(math.sqrt(usual * high))), high)
    wanted = [typical, whole] if any(typical[d][2] != whole[d][2] for d in dims) else [typical]
    return tuple(_profile(spec, ranges) for ranges in wanted)


def _profile(spec: GraphSpec, ranges: Mapping[str, tuple[int, int, int]]) -> Profile:
    result: list[tuple[str, Shapes]] = []
    for tensor in spec.inputs:
        if tensor.dynamic:
            low, usual, high = (tensor.shape({d: ranges[d][which] for d in tensor.dynamic}) for which in range(3))
            result.append((tensor.name, (low, usual, high)))
    return tuple(result)
