"""Running a decoder's graph over a given answer, to compare its logits with a reference at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.contracts.decoder import TENSORRT, DecoderConstants
from pixano_edge.export.extras import missing
from pixano_edge.export.fp16 import rounded

Floats = npt.NDArray[np.float32]
MAX_ROUNDED_BYTES = 1 << 29
"""Bytes of fp16 weights up to which a graph is made that rounds every value; it holds them in fp32, in one message."""


class DecoderRun:
    """One decoder file in ONNX Runtime on the CPU.

    Args:
        file: ONNX file; its weights lie beside it.
        constants: Of the decoder.
        target: ``onnx``: one buffer per cache tensor, bound as past and present; ``tensorrt``: presents become pasts.
        threads: Threads within an operator; ONNX Runtime's choice if None.
        optimise: Whether ONNX Runtime may rewrite the graph.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        file: Path,
        constants: DecoderConstants,
        target: str = contract.ONNX,
        threads: int | None = None,
        optimise: bool = True,
    ) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise missing("onnxruntime", "Measuring parity") from error
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if threads:
            options.intra_op_num_threads = threads
        self._ort, self._constants, self._target = ort, constants, target
        self._session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        kinds = {node.name: node.type for node in self._session.get_inputs()}
        self._dtype = np.dtype("float16" if "float16" in kinds[contract.past_key(0)] else "float32")

    def logits(
        self, parts: list[Floats], positions: list[npt.NDArray[np.int32]] | None = None, slots: int | None = None
    ) -> Floats:
        """Logits after each part.

        Args:
            parts: (1, S, D) embeddings each: a prompt, whole or in pieces, then the answer's tokens one by one.
            positions: (3, S) rotary positions of each part, for a decoder with M-RoPE.
            slots: Length of the cache; as long as all parts together if None.

        Returns:
            (len(parts), V).
        """
        lengths = [part.shape[1] for part in parts]
        extra = [{contract.POSITION_IDS: p} for p in positions] if positions is not None else [{} for _ in parts]
        run = self._grow if self._target == TENSORRT else self._in_place
        return run(parts, lengths, extra, slots or sum(lengths))

    def _in_place(self, parts: list[Floats], lengths: list[int], extra: list[dict[str, Any]], slots: int) -> Floats:
        value = self._ort.OrtValue.ortvalue_from_numpy
        # What lies beyond the filled slots must not matter, so it is not 0.
        caches = [np.full(self._constants.cache_shape(slots), 3, self._dtype) for _ in self._constants.cache_names]
        bound = [(names, value(cache)) for names, cache in zip(self._constants.cache_names, caches)]
        found, filled = [], 0
        for part, length, more in zip(parts, lengths, extra):
            filled += length
            logits = np.zeros((1, self._constants.vocab_size), np.float32)
            feeds = {
                contract.INPUTS_EMBEDS: np.ascontiguousarray(part),
                contract.SEQLENS_K: np.array([filled - 1], np.int32),
                **more,
            }
            binding = self._session.io_binding()
            for name, array in feeds.items():
                binding.bind_ortvalue_input(name, value(array))
            for (past, present), cache in bound:
                binding.bind_ortvalue_input(past, cache)
                binding.bind_ortvalue_output(present, cache)
            binding.bind_ortvalue_output(contract.LOGITS, value(logits))
            self._session.run_with_iobinding(binding)
            found.append(logits)
        return np.concatenate(found)

    def _grow(self, parts: list[Floats], lengths: list[int], extra: list[dict[str, Any]], slots: int) -> Floats:
        names = self._constants.cache_names
        pasts = {past: np.zeros(self._constants.cache_shape(0), self._dtype) for past, _ in names}
        found, filled = [], 0
        for part, length, more in zip(parts, lengths, extra):
            at = np.arange(filled, filled + length, dtype=np.int32)
            feeds = {contract.INPUTS_EMBEDS: part, contract.CACHE_POSITION: at, **more, **pasts}
            logits, *presents = self._session.run([contract.LOGITS, *(present for _, present in names)], feeds)
            pasts = {past: present for (past, _), present in zip(names, presents)}
            found.append(logits)
            filled += length
        return np.concatenate(found)


def rounded_decoder(file: Path) -> onnx.ModelProto | None:
    """A graph that computes as a GPU does in fp16, every value rounded, from an fp16 graph of plain operators.

    Returns:
        Its cache is fp32; None where the weights are too many for one message.
    """
    model = onnx.load(file)
    if model.ByteSize() > MAX_ROUNDED_BYTES:
        return None
    graph = model.graph
    casts = []
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            for node in graph.node:
                for index, name in enumerate(node.input):
                    if name == value.name:
                        node.input[index] = f"{value.name}.half"
            casts.append(helper.make_node("Cast", [value.name], [f"{value.name}.half"], to=TensorProto.FLOAT16))
    ends = []
    for value in graph.output:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            for node in graph.node:
                for names in (node.input, node.output):
                    for index, name in enumerate(names):
                        if name == value.name:
                            names[index] = f"{value.name}.half"
            ends.append(helper.make_node("Cast", [f"{value.name}.half"], [value.name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node, *ends]
    del graph.node[:]
    graph.node.extend(nodes)
    return rounded(model)
