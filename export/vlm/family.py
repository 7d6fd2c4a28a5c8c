"""What the common pipeline of vision-language models needs of a family, and what PyTorch answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from torch import Tensor, nn

from pixano_edge.engine.bundle.manifest import Licence, Preprocess, Source
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.export.decoder.weights import DecoderWeights
from pixano_edge.export.differences import Arrays
from pixano_edge.export.photos import Photo

Floats = npt.NDArray[np.float32]


@dataclass
class GraphRun:
    """Inputs of a vision graph and PyTorch's outputs for them.

    Attributes:
        graph: Name of the graph.
        feeds: Inputs.
        want: Outputs.
        rows: Which rows of the graph's outputs, all but the last dimension flattened, are compared; None: everything.
    """

    graph: str
    feeds: Arrays
    want: Arrays
    rows: npt.NDArray[np.int64] | None = None


@dataclass
class Answer:
    """PyTorch's greedy answer to a question about one photo.

    Attributes:
        photo: Asked about.
        question: Asked.
        input_ids: (N,) tokens of the prompt, image tokens expanded.
        embeds: (1, N, D) what enters the decoder: words and features.
        tokens: (M,) of the answer; tokens that would end it do not.
        logits: (M, V) that each of them was chosen by.
        token_embeds: (M, D) of `tokens`.
        runs: Inputs of the vision graphs and what PyTorch makes of them; not all, where one image takes many runs.
        pixel_values: Everything that the vision graphs see of the photo.
        features: (F, D) everything that they should give.
        positions: (3, N + M) rotary positions, for a decoder with M-RoPE.
    """

    photo: Photo
    question: str
    input_ids: npt.NDArray[np.int64]
    embeds: Floats
    tokens: npt.NDArray[np.int64]
    logits: Floats
    token_embeds: Floats
    runs: list[GraphRun]
    pixel_values: Floats
    features: Floats
    positions: npt.NDArray[np.int32] | None = None
    margins: Floats = field(init=False)
    """(M,) difference of the best two logits."""

    def __post_init__(self) -> None:
        best = np.partition(self.logits, -2, axis=1)[:, -2:]
        self.margins = best[:, 1] - best[:, 0]

    def parts(self) -> list[Floats]:
        """Embeddings of the prompt, and of the answer's tokens but the last one, token by token."""
        return [self.embeds, *(row[None, None] for row in self.token_embeds[:-1])]

    def part_positions(self) -> list[npt.NDArray[np.int32]] | None:
        """Positions of `parts`."""
        if self.positions is None:
            return None
        count = self.embeds.shape[1]
        steps = range(count, count + len(self.tokens) - 1)
        cut = [self.positions[:, :count], *(self.positions[:, i : i + 1] for i in steps)]
        return [np.ascontiguousarray(p) for p in cut]


class VlmFamily(Protocol):
    """One loaded checkpoint, with everything that depends on its family.

    Attributes:
        family: Name in the manifest.
        source: Goes into the manifest.
        licence: Goes into the manifest.
        notes: Remarks for the user.
        constants: Go into the manifest.
        preprocess: Goes into the manifest.
        files: More files of the bundle by path: tokeniser and chat template.
        decoder: Constants of the language model.
        weights: Of the language model.
        specs: Vision graphs of the contract by name; `embed_tokens` and the decoder come on top.
        reference: What answers, for the parity report.
    """

    family: str
    source: Source
    licence: Licence
    notes: list[str]
    constants: dict[str, Any]
    preprocess: Preprocess
    files: Mapping[str, bytes]
    decoder: DecoderConstants
    weights: DecoderWeights
    specs: Mapping[str, GraphSpec]
    reference: str

    def modules(self) -> Mapping[str, nn.Module]:
        """Vision modules to export, by graph."""

    def example(self, graph: str) -> tuple[Tensor, ...]:
        """Inputs to trace a vision graph with."""

    def keep(self, graph: str, model: onnx.ModelProto) -> dict[str, str]:
        """Nodes that stay in fp32 in a vision graph's fp16 variants, and the key of the reason."""

    def feeds(self, spec: GraphSpec, sizes: Mapping[str, int], seed: int) -> Arrays:
        """Random inputs of a vision graph that mean something."""

    def ask(self, photo: Photo, question: str, tokens: int) -> Answer:
        """PyTorch's greedy answer of so many tokens; raises ExportError where the prompt does not fit.

        Also compares what the engine makes of photo and question, tokens and pixels, with what the original processor
        makes of them.
        """
