"""Random inputs for SAM 2's graphs that mean something: labels that exist, points inside the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts import sam2_video
from pixano_edge.engine.contracts.base import GraphSpec, TensorSpec
from pixano_edge.export.differences import Arrays


def random_feeds(spec: GraphSpec, sizes: Mapping[str, int], seed: int) -> Arrays:
    """Inputs for `spec` by name, deterministic in `seed`.

    Args:
        spec: One of the family's graphs.
        sizes: Of its dynamic dimensions.
        seed: Another seed, other values; odd seeds use the mask prompts of every second object.
    """
    rng = np.random.default_rng(seed)
    return {t.name: _value(t, spec, t.shape(sizes), seed, rng).astype(t.np_dtype) for t in spec.inputs}


def _value(
    tensor: TensorSpec, spec: GraphSpec, shape: tuple[int, ...], seed: int, rng: np.random.Generator
) -> npt.NDArray[Any]:
    if tensor.name == contract.POINT_LABELS:
        return rng.integers(contract.LABEL_PAD, contract.LABEL_BOX_BOTTOM_RIGHT + 1, shape)
    if tensor.name == contract.POINT_COORDS:
        # The mask input is a quarter of the picture's side.
        side = spec.tensor(contract.MASK_INPUT).dims[-1]
        return rng.uniform(0.0, 4.0 * float(side), shape)
    if tensor.name in (contract.HAS_MASK_INPUT, sam2_video.SKIP_NO_MEMORY, sam2_video.BINARIZE):
        return (np.arange(shape[0]) + seed) % 2
    if tensor.name == sam2_video.MEMORY_TIME:
        # A memory has a row of the temporal table; as many rows as memories of recent frames.
        return rng.integers(0, spec.ranges["M"][1], shape)
    if tensor.name == sam2_video.POINTER_TIME:
        return rng.uniform(0.0, 1.0, shape)
    return rng.standard_normal(shape)
