"""Whether an engine is what the contract says: names, dtypes, shapes, memory layout and optimisation profiles."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..contracts.base import GraphSpec
from ..errors import ContractError, DeviceError
from .base import Shape
from .ort_check import check_graph
from .tensorrt_api import TrtEngine

_REBUILD = "Build the engine again from this bundle: pixano-edge build"


@dataclass(frozen=True)
class Profile:
    """One optimisation profile of an engine.

    Attributes:
        index: Number in the engine.
        shapes: (min, opt, max) shape of each input with open dimensions.
        scratch: Bytes of device memory that a context needs under it.
    """

    index: int
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]
    scratch: int

    @property
    def volume(self) -> int:
        """Elements of all its inputs at their largest."""
        return sum(int(np.prod(high, dtype=np.int64)) for _, _, high in self.shapes.values())

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes are within it."""
        return all(
            len(shapes[name]) == len(low) and all(a <= s <= b for a, s, b in zip(low, shapes[name], high))
            for name, (low, _, high) in self.shapes.items()
        )

    def away(self, shapes: Mapping[str, Shape]) -> int:
        """How far the shapes are from those that the profile was tuned for, in elements."""
        return sum(
            abs(int(np.prod(shapes[name], dtype=np.int64)) - int(np.prod(typical, dtype=np.int64)))
            for name, (_, typical, _) in self.shapes.items()
        )

    def describe(self) -> dict[str, object]:
        """JSON-ready."""
        shapes = {n: {"min": list(a), "opt": list(b), "max": list(c)} for n, (a, b, c) in self.shapes.items()}
        return {"index": self.index, "shapes": shapes, "scratch_bytes": self.scratch}


def tightest(profiles: Collection[Profile], shapes: Mapping[str, Shape]) -> Profile | None:
    """The smallest profile that takes the shapes, of equal ones the one tuned closest to them; None if none does."""
    fitting = [p for p in profiles if p.fits(shapes)]
    return min(fitting, key=lambda p: (p.volume, p.away(shapes), p.index)) if fitting else None


def read_profiles(engine: TrtEngine) -> list[Profile]:
    """All profiles; one without shapes for an engine whose shapes are fixed."""
    return [Profile(i, shapes, engine.scratch_bytes(i)) for i, shapes in enumerate(engine.profile_shapes())]


def check_engine(spec: GraphSpec, engine: TrtEngine) -> None:
    """Compares inputs and outputs with the contract.

    Raises:
        ContractError: Lists every difference in name, dtype, rank or fixed size.
        DeviceError: A tensor lies in host memory or in a packed layout, which plain buffers cannot hold.
    """
    tensors = engine.tensors().values()
    declared = {t.name: (t.dtype, [None if size < 0 else size for size in t.shape]) for t in tensors}
    inputs = {t.name for t in tensors if t.is_input}
    check_graph(
        spec,
        {name: seen for name, seen in declared.items() if name in inputs},
        {name: seen for name, seen in declared.items() if name not in inputs},
    )
    strange = [f"'{t.name}' is read on the host" for t in tensors if not t.on_device]
    strange += [f"'{t.name}' is not in plain C order" for t in tensors if not t.linear]
    if strange:
        raise DeviceError(f"The engine of graph '{spec.name}' cannot be bound: {'; '.join(strange)}.", _REBUILD)


def check_profiles(spec: GraphSpec, profiles: Sequence[Profile]) -> list[str]:
    """Compares the sizes that an engine takes with the contract's ranges.

    Returns:
        Warnings: sizes within the contract that no profile takes.

    Raises:
        ContractError: Not even the contract's typical sizes fit.
    """
    dims = {dim for tensor in spec.inputs for dim in tensor.dynamic}
    if not dims or not dims <= set(spec.ranges):
        return []
    corners = []
    for which in range(3):
        sizes = {dim: spec.ranges[dim][which] for dim in dims}
        shapes = {tensor.name: tensor.shape(sizes) for tensor in spec.inputs}
        corners.append((sizes, tightest(profiles, shapes) is not None))
    if not corners[1][1]:
        raise ContractError(
            f"The engine of graph '{spec.name}' does not take the contract's typical sizes {corners[1][0]}.", _REBUILD
        )
    return [f"the engine was built for less than the contract: not for {sizes}" for sizes, fits in corners if not fits]


def open_dimensions(spec: GraphSpec) -> dict[str, int]:
    """Dimensions that only outputs have, hence known after a run alone: name to the most that a buffer holds.

    Raises:
        ContractError: Such a dimension has no range.
    """
    given = {dim for tensor in spec.inputs for dim in tensor.dynamic}
    found = {dim for tensor in spec.outputs for dim in tensor.dynamic} - given
    if unknown := sorted(found - set(spec.ranges)):
        raise ContractError(
            f"Output sizes {unknown} of graph '{spec.name}' depend on data and have no range.",
            "Give them one in the contract; its maximum becomes the size of the buffer.",
        )
    return {dim: spec.ranges[dim][2] for dim in sorted(found)}
