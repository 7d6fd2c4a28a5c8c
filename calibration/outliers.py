"""Puts outliers into a graph that computes the same: what breaks int8 in real transformers, on demand.

Trained transformers have a few channels whose activations are tens of times those of the others (Dettmers et al.
2022, "LLM.int8()", arXiv:2208.07339; Xiao et al. 2022). Small seeded models have none, so a calibration that would
fail on real ones looks fine on them. Here gains and biases of normalisations are multiplied on some channels, and the
rows of the weights that read those are divided.
"""

from __future__ import annotations

import numpy as np
import onnx

from pixano_edge.calibration.folds import folds, rescale
from pixano_edge.calibration.graph import Graph
from pixano_edge.engine.errors import CalibrationError

FACTOR = 50.0
CHANNELS = 3


def inject(model: onnx.ModelProto, seed: int, factor: float = FACTOR, channels: int = CHANNELS) -> onnx.ModelProto:
    """A copy of a graph with outliers behind every normalisation whose readers allow it.

    Args:
        model: fp32, see `graph.load_graph`; left as it is.
        seed: Of the choice of channels.
        factor: How many times larger the chosen channels become.
        channels: How many of each normalisation.

    Raises:
        CalibrationError: There is no such normalisation, or it has too few channels.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy)
    found = [fold for fold in folds(copy) if fold.source == "LayerNormalization"]
    if not found:
        raise CalibrationError(
            "No normalisation of the graph is read by Linears alone.", "Inject outliers into a transformer."
        )
    if min(fold.channels for fold in found) <= channels or not factor > 0:
        raise CalibrationError(f"Cannot make {channels} channels {factor} times as large.", "Choose fewer.")
    random = np.random.default_rng(seed)
    for fold in found:
        factors = np.ones(fold.channels)
        factors[random.choice(fold.channels, channels, replace=False)] = 1 / factor
        rescale(graph, fold, factors)
    graph.finish()
    onnx.checker.check_model(copy)
    return copy
