"""Moves the difficulty of quantising from activations into weights (Xiao et al. 2022, "SmoothQuant", arXiv:2211.10438).

An activation has one scale for all of its channels, so one channel with values fifty times those of the others takes
the bits of all of them; a weight has a scale per output channel, and its rows may differ. Channel j is divided by

    s_j = max|x_j|^a / max|w_j|^(1 - a)

where w_j are row j of all weights that read it. The paper has a = 0.5; here each place gets the strength (or none)
whose layers have the smallest error on the rows that were kept of the activations.

The divisors go where the tensor is written, see `folds`. Behind a GELU there is no such place, and a Mul would be one
more pass over the widest tensor of the block: it is set only where it makes the error of the layer ten times smaller.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from pixano_edge.calibration.blocks import blocks as find_blocks
from pixano_edge.calibration.calibrators import Range, choose, levels
from pixano_edge.calibration.folds import Fold, folds, rescale, transposed
from pixano_edge.calibration.graph import LINEAR, Graph
from pixano_edge.calibration.histograms import Histogram
from pixano_edge.calibration.observe import Observations

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.75)
GAIN = 0.9
"""A place is rescaled when that leaves less than this part of its layers' squared error."""
MUL_GAIN = 0.1
"""The same where it costs a Mul."""
SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
"""Parts of the largest magnitude that are tried as the range of an activation."""


@dataclass(frozen=True)
class Smoothing:
    """One place that was rescaled.

    Attributes:
        observed: A name under which the tensor was observed.
        readers: Names of the nodes that read the tensor.
        strength: The exponent a.
        factors: (C,) divisors of the channels.
        gain: Squared error of the layers afterwards, relative to that before.
        explicit: Whether a Mul was set.
    """

    observed: str
    readers: tuple[str, ...]
    strength: float
    factors: NDArray[np.float64]
    gain: float
    explicit: bool


def smooth(
    graph: Graph, observations: Observations, blocks: Collection[str], strength: float | None = None
) -> dict[str, Smoothing]:
    """Rescales channels where the layers that read them become more exact in int8. In place.

    Args:
        graph: Of the fp32 model that was observed.
        observations: With rows of the tensors that Linears read.
        blocks: Names of the blocks that will be quantised; others are not looked at.
        strength: Of all places; None searches.

    Returns:
        By tensor that a Linear reads afterwards, what was done to it. What was observed of it is stale: see `smoothed`.
    """
    chosen = {node for block in find_blocks(graph.model) if block.name in blocks for node in block.nodes}
    nodes = {node.name: node for node in graph.model.graph.node if node.name in chosen and node.op_type in LINEAR}
    found = folds(graph.model)
    # Every place is judged by the weights as they were, so that none depends on what was decided for another.
    folded: list[tuple[Fold, Smoothing]] = []
    for fold in found:
        readers = [nodes[name] for name in fold.readers if name in nodes]
        if readers and (made := _best(graph, observations, readers, strength, GAIN, explicit=False)):
            folded.append((fold, made))
    foldable = {name for fold in found for name in fold.inputs}
    set_apart: list[tuple[str, Smoothing]] = []
    for tensor in dict.fromkeys(node.input[0] for node in nodes.values()):
        readers = [node for node in nodes.values() if node.input[0] == tensor]
        if tensor not in foldable and not _shared(graph, readers):
            made = _best(graph, observations, readers, strength, MUL_GAIN, explicit=True)
            if made is not None:
                set_apart.append((tensor, made))
    done: dict[str, Smoothing] = {}
    for fold, made in folded:
        rescale(graph, fold, made.factors)
        done |= {nodes[name].input[0]: made for name in fold.readers if name in nodes}
    for tensor, made in set_apart:
        done[_multiply(graph, tensor, [nodes[name] for name in made.readers], made.factors)] = made
    return done


def smoothed(observations: Observations, made: Smoothing, method: str) -> Range:
    """The range of a rescaled tensor, from its rows and the peaks of its channels."""
    return observations.remember(
        ("smoothed", made.observed, made.readers, made.strength, method),
        lambda: choose(_histogram(observations, made), method),
    )


def _histogram(observations: Observations, made: Smoothing) -> Histogram:
    histogram = Histogram()
    histogram.update(observations.rows[made.observed].values / made.factors.astype(np.float32))
    channels = observations[made.observed].channels
    assert channels is not None
    histogram.reach(float((channels / made.factors).max()))
    return histogram


def _best(
    graph: Graph,
    observations: Observations,
    readers: list[NodeProto],
    strength: float | None,
    gain: float,
    *,
    explicit: bool,
) -> Smoothing | None:
    """What `_search` finds, remembered: a search over blocks asks for the same places again and again."""
    key = ("smooth", tuple(node.name for node in readers), strength)
    return observations.remember(key, lambda: _search(graph, observations, readers, strength, gain, explicit=explicit))


def _shared(graph: Graph, readers: list[NodeProto]) -> bool:
    """Whether a weight has another reader, which must not see it rescaled."""
    names = [node.input[1] for node in readers]
    return any(len(graph.readers(name)) > 1 for name in names)


def _search(
    graph: Graph,
    observations: Observations,
    readers: list[NodeProto],
    strength: float | None,
    gain: float,
    *,
    explicit: bool,
) -> Smoothing | None:
    """The best factors for a tensor; None when it is better left alone."""
    tensor = readers[0].input[0]
    channels = observations[tensor].channels
    rows = observations.rows[tensor].values.astype(np.float64)
    weights = []
    for node in readers:
        held = graph.weight(node)
        assert held is not None
        weights.append((held.T if transposed(node) else held).astype(np.float64))
    if channels is None or not channels.any() or rows.shape[-1] != len(channels):
        return None
    peaks = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
    plain = _layer_error(rows, weights, float(channels.max()))
    best: Smoothing | None = None
    for exponent in STRENGTHS if strength is None else (strength,):
        factors = _factors(channels.astype(np.float64), peaks, exponent)
        scaled = [w * factors[:, None] for w in weights]
        error = _layer_error(rows / factors, scaled, float((channels / factors).max()))
        if error < gain * plain and (best is None or error < best.gain * plain):
            names = tuple(node.name for node in readers)
            best = Smoothing(tensor, names, exponent, factors, error / plain, explicit)
    return best


def _factors(channels: NDArray[np.float64], peaks: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """s_j, with a geometric mean of 1; channels that are always 0, or that nothing reads, keep theirs."""
    live = (channels > 0) & (peaks > 0)
    factors = np.ones(len(channels))
    factors[live] = channels[live] ** strength / peaks[live] ** (1 - strength)
    factors[live] /= np.exp(np.log(factors[live]).mean()) if live.any() else 1.0
    return np.clip(factors, 1e-4, 1e4)


def _layer_error(rows: NDArray[np.float64], weights: list[NDArray[np.float64]], largest: float) -> float:
    """Squared error of the layers in int8, summed over outputs, with the best of a few ranges."""
    ranges = [share * largest for share in SHARES]
    quantised = [_round(rows, amax) for amax in ranges]
    amax_error = [float(((q - rows) ** 2).sum()) for q in quantised]
    activations = quantised[int(np.argmin(amax_error))]
    total = 0.0
    for weight in weights:
        peaks = np.abs(weight).max(axis=0)
        held = _round(weight, np.where(peaks > 0, peaks, 1.0))
        total += float(((activations @ held - rows @ weight) ** 2).sum())
    return total


def _round(values: NDArray[np.float64], amax: float | NDArray[np.float64]) -> NDArray[np.float64]:
    scale = amax / levels(8)
    return np.asarray(np.clip(np.rint(values / scale), -levels(8), levels(8)) * scale)


def _multiply(graph: Graph, tensor: str, readers: list[NodeProto], factors: NDArray[np.float64]) -> str:
    """Sets a Mul in front of the readers, and returns what they read now."""
    inverse = graph.add_constant(f"{tensor}_inverse", (1 / factors).astype(np.float32))
    scaled = graph.add_node("Mul", [tensor, inverse], f"{tensor}_smooth")
    for node in readers:
        held = graph.value(node.input[1])
        assert held is not None
        column = factors if transposed(node) else factors[:, None]
        graph.set_value(node.input[1], (held * column).astype(np.float32), owner=node, index=1)
        graph.move_input(node, 0, scaled)
    return scaled
