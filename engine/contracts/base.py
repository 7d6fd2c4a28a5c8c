"""What a graph looks like from outside: tensor names, dtypes, ranks and dynamic dimensions.

Export, calibration, run time and tests all read these objects, so a name is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError

Dim = int | str
"""A fixed size, or the name of a dynamic dimension."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: Tensor name in the graph.
        dtype: numpy dtype name, for example ``float32``.
        dims: Sizes; a string names a dynamic dimension, equal names mean equal sizes within one call.
    """

    name: str
    dtype: str
    dims: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def np_dtype(self) -> np.dtype[np.generic]:
        return np.dtype(self.dtype)

    @property
    def dynamic(self) -> tuple[str, ...]:
        """Names of the dynamic dimensions, in order of appearance."""
        return tuple(d for d in self.dims if isinstance(d, str))

    def shape(self, sizes: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Concrete shape for the given sizes of the dynamic dimensions.

        Raises:
            ContractError: A dynamic dimension has no size.
        """
        sizes = sizes or {}
        missing = [d for d in self.dynamic if d not in sizes]
        if missing:
            raise ContractError(f"Tensor '{self.name}' needs sizes for {missing}.", "Pass them to prepare().")
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.dims)

    def check(self, array: npt.NDArray[np.generic]) -> None:
        """Refuses an array whose dtype, rank or fixed dimensions differ; never converts.

        Raises:
            ContractError: With expected and given dtype and shape.
        """
        fits = array.ndim == self.rank and all(
            isinstance(want, str) or want == got for want, got in zip(self.dims, array.shape)
        )
        if not fits or array.dtype != self.np_dtype:
            raise ContractError(
                f"Tensor '{self.name}' expects {self.dtype}{list(self.dims)}, got {array.dtype}{list(array.shape)}.",
                "Convert it before the call; Pixano Edge never changes a dtype silently.",
            )


@dataclass(frozen=True)
class GraphSpec:
    """One exported graph: ordered inputs and outputs, and the range of each dynamic dimension.

    Attributes:
        name: Graph name, the key in the bundle's manifest.
        inputs: Inputs in graph order.
        outputs: Outputs in graph order.
        ranges: Per dynamic dimension ``(min, typical, max)``, used for TensorRT profiles and checks.
        profiles: Ranges of TensorRT's profiles, the tight one first, for a graph whose dimensions are not all large
            at once: a profile of the whole range would ask for memory that does not exist. Every size that callers use
            fits one of them. Empty: profiles are derived from `ranges`.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    profiles: tuple[Mapping[str, tuple[int, int, int]], ...] = ()

    def tensor(self, name: str) -> TensorSpec:
        """The input or output called `name`; raises ContractError if there is none."""
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        raise ContractError(
            f"Graph '{self.name}' has no tensor '{name}'.",
            f"Known: {[s.name for s in (*self.inputs, *self.outputs)]}.",
        )


Kind = tuple[Callable[[Any], bool], str]
"""Whether a value is of a kind, and the kind in words."""


def is_whole(value: Any) -> bool:
    """A whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_finite(value: Any) -> bool:
    """A number that is neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_triple(value: Any) -> bool:
    """Three finite numbers."""
    return isinstance(value, list | tuple) and len(value) == 3 and all(is_finite(v) for v in value)


TRIPLE: Kind = (is_triple, "three finite numbers")
POSITIVE_TRIPLE: Kind = (lambda v: is_triple(v) and min(v) > 0, "three finite numbers above 0")


def read_constants(family: str, values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The constants of a manifest with lists as tuples, where every key of `kinds` must be and no other may.

    Args:
        family: For the message.
        values: As the manifest has them.
        kinds: By key.

    Raises:
        ContractError: Unknown or missing keys, or values of another kind.
    """
    missing, unknown = sorted(kinds.keys() - values.keys()), sorted(values.keys() - kinds.keys())
    problems = [f"'{key}' is missing" for key in missing] + [f"'{key}' is unknown" for key in unknown]
    problems += [
        f"'{key}' must be {meaning}, got {values[key]!r}"
        for key, (fits, meaning) in kinds.items()
        if key in values and not fits(values[key])
    ]
    if problems:
        raise ContractError(
            f"The {family} constants in the manifest do not fit: {'; '.join(problems)}.",
            "Export the bundle again with this version of pixano-edge.",
        )
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
