"""The variant ``int4`` of a vision-language bundle, made from the bundle itself and questions; see `weight_only`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from pixano_edge.calibration.decoder_int4 import LayerError, quantise_decoder, tapped_tensors
from pixano_edge.calibration.grams import GROUP_BYTES, collect
from pixano_edge.calibration.turns import TOKENS, Question, record_turns
from pixano_edge.calibration.weight_only import AUTO
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.files import os_errors
from pixano_edge.engine.bundle.manifest import GraphVariant
from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.contracts import qwen2_5_vl, smolvlm
from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.engine.errors import BundleError
from pixano_edge.export.decoder.store import WeightStore
from pixano_edge.export.graph_sizes import weight_bytes

INT4 = "int4"
_READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    smolvlm.FAMILY: smolvlm.SmolVlmConstants.from_dict,
    qwen2_5_vl.FAMILY: qwen2_5_vl.QwenVlConstants.from_dict,
}


@dataclass(frozen=True)
class Int4Variant:
    """Files and entries of a new variant; nothing of the bundle was changed.

    Attributes:
        graph: The decoder's file.
        weights: Its weights, which must lie beside it under this very name.
        entries: By graph, for the manifest: the decoder's new file, and of the others the fp32 files.
        layers: What each matrix costs.
    """

    graph: Path
    weights: Path
    entries: dict[str, GraphVariant]
    layers: tuple[LayerError, ...]


def make_int4(
    bundle: Bundle | Path | str,
    questions: Iterable[Question],
    folder: Path,
    *,
    method: str = AUTO,
    tokens: int = TOKENS,
    threads: int | None = None,
    group_bytes: int = GROUP_BYTES,
    on_turn: Callable[[], None] = lambda: None,
    on_collected: Callable[[], None] = lambda: None,
    on_matrix: Callable[[], None] = lambda: None,
) -> Int4Variant:
    """Collects what the decoder is given for questions and quantises it.

    Args:
        bundle: An open bundle or its folder; it must have fp32.
        questions: Real ones; 32 or more are better than fewer.
        folder: For what is collected, taken up again by a later call, and for the new files.
        method: See `weight_only`.
        tokens: Most tokens of an answer.
        threads: Threads of one call.
        group_bytes: See `grams.collect`.
        on_turn: Called after each question that was asked.
        on_collected: Called after each of them that activations were collected from, once for a group of matrices.
        on_matrix: Called after each matrix.

    Raises:
        BundleError: The bundle is no vision-language model with fp32, or the disk is full.
        EdgeError: As `record_turns`, `collect` and `quantise_decoder`.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    constants = decoder_constants(opened)
    file = opened.graph_path(contract.DECODER, "fp32")
    tensors = tapped_tensors(file)
    turns = record_turns(opened, questions, folder / "turns", tokens=tokens, threads=threads, on_turn=on_turn)
    grams = collect(
        file,
        constants,
        turns,
        tensors,
        folder / "grams",
        group_bytes=group_bytes,
        threads=threads,
        on_turn=on_collected,
    )
    graph, weights = folder / f"{contract.DECODER}.{INT4}.onnx", folder / f"{contract.DECODER}.{INT4}.weights"
    with os_errors(f"writing '{graph.name}'"):
        weights.unlink(missing_ok=True)
        with WeightStore(weights) as store:
            model, layers = quantise_decoder(file, constants, grams, store, method=method, on_matrix=on_matrix)
        store.seal(model)
        graph.write_bytes(model.SerializeToString(deterministic=True))
    return Int4Variant(graph, weights, _entries(opened, model), tuple(layers))


def decoder_constants(bundle: Bundle) -> DecoderConstants:
    """Of a bundle's language model; raises BundleError when it has none, or no fp32 to start from."""
    manifest = bundle.manifest
    if manifest.family not in _READERS:
        raise BundleError(
            f"Bundle '{manifest.name}' holds '{manifest.family}', which has no language model.",
            f"int4 is for {', '.join(_READERS)}; take --precision int8.",
        )
    if "fp32" not in bundle.variants():
        raise BundleError(f"Bundle '{manifest.name}' has no fp32 to start from.", "Export it again with fp32.")
    found: DecoderConstants = _READERS[manifest.family](manifest.constants).decoder
    return found


def _entries(bundle: Bundle, model: onnx.ModelProto) -> dict[str, GraphVariant]:
    graphs = bundle.manifest.graphs
    plain = {name: graph.variants["fp32"] for name, graph in graphs.items()}
    # As the exporter's: the other graphs run as they are, and belong to a variant of ONNX Runtime's own operators.
    entries = {
        name: entry.model_copy(update={"precision": INT4, "onnxruntime_only": True}) for name, entry in plain.items()
    }
    opset = next(o.version for o in model.opset_import if o.domain == "")
    entries[contract.DECODER] = entries[contract.DECODER].model_copy(
        update={
            "file": f"graphs/{contract.DECODER}.{INT4}.onnx",
            "opset": opset,
            "nodes": len(model.graph.node),
            "weight_bytes": weight_bytes(model),
        }
    )
    return entries
