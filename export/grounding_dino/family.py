"""Grounding DINO in the common pipeline from checkpoint to bundle (`pixano_edge.export.detection`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from torch import Tensor, nn

from pixano_edge.engine.bundle.manifest import Preprocess
from pixano_edge.engine.contracts import grounding_dino as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import PromptError
from pixano_edge.engine.models.detection.base import check_request
from pixano_edge.engine.models.grounding_dino.detector import GroundingDinoDetector
from pixano_edge.engine.models.grounding_dino.text import Captioner
from pixano_edge.export.detection.family import Answer, GraphRun, open_sessions
from pixano_edge.export.differences import Arrays
from pixano_edge.export.grounding_dino import graphs, parity, precision, reference
from pixano_edge.export.grounding_dino.checkpoint import GroundingDinoCheckpoint
from pixano_edge.export.photos import Photo


class GroundingDinoFamily:
    """One loaded checkpoint; see `DetectorFamily`."""

    family = contract.FAMILY

    def __init__(self, loaded: GroundingDinoCheckpoint) -> None:
        self._loaded = loaded
        c = loaded.constants
        self.source, self.licence, self.notes = loaded.source, loaded.licence, loaded.notes
        self.constants = c.to_dict()
        self.preprocess = Preprocess(
            resize="shortest-edge", image_size=c.shortest_edge, longest_edge=c.longest_edge, mean=c.mean, std=c.std
        )
        self.files: Mapping[str, bytes] = {contract.TOKENIZER: loaded.tokenizer}
        self.specs: Mapping[str, GraphSpec] = contract.graphs(c)
        self.reference = (
            f"transformers {transformers.__version__} GroundingDinoForObjectDetection, torch {torch.__version__}, "
            "fp32, cpu"
        )

    def modules(self) -> Mapping[str, nn.Module]:
        return graphs.modules(self._loaded.model)

    def example(self, graph: str) -> tuple[Tensor, ...]:
        return graphs.example_inputs(graph, self._loaded.constants)

    def keep(self, graph: str, model: onnx.ModelProto) -> dict[str, str]:
        return precision.kept_in_fp32(graph, model)

    def feeds(self, spec: GraphSpec, sizes: Mapping[str, int], seed: int) -> Arrays:
        values = graphs.random_inputs(spec, dict(sizes), seed)
        return {t.name: v.numpy() for t, v in zip(spec.inputs, values)}

    def check_classes(self, classes: Sequence[str]) -> None:
        captions = Captioner(self._loaded.tokenizer, self._loaded.constants).captions(check_request(classes))
        if len(captions) > 1:
            raise PromptError(f"{len(classes)} classes do not fit one caption.", "Give fewer --classes.")
        reference.check_names(classes)

    def ask(self, photo: Photo, lists: Sequence[Sequence[str]]) -> list[Answer]:
        return [self._ask(photo, classes) for classes in lists]

    def _ask(self, photo: Photo, classes: Sequence[str]) -> Answer:
        found = reference.ask(self._loaded.model, self._loaded.processor, photo, classes)
        known = {**found.inputs, **found.outputs}
        runs = [
            GraphRun(name, {t.name: known[t.name] for t in spec.inputs}, {t.name: known[t.name] for t in spec.outputs})
            for name, spec in self.specs.items()
        ]
        trace = {**found.inputs, contract.TEXT_FEATURES: found.outputs[contract.TEXT_FEATURES]}
        return Answer(photo, found.classes, runs, trace, found.scores, found.detect)

    def settle(self, run: GraphRun, got: Arrays) -> Arrays:
        """Queries that changed ranks on a near tie, if they are few, count as equal; see `parity`."""
        if run.graph != contract.DETECTOR or any(got[name].shape != value.shape for name, value in run.want.items()):
            return got
        names = (contract.LOGITS, contract.BOXES, contract.SELECTION_SCORES)
        wanted = parity.Reference(*(run.want[name][0] for name in names))
        swapped = parity.swapped_queries(wanted, got[contract.LOGITS][0], got[contract.BOXES][0])
        if not 0 < swapped.sum() <= parity.allowed_swaps(len(swapped)):
            return got
        settled = dict(got)
        for name in (contract.LOGITS, contract.BOXES):
            settled[name] = np.where(swapped[None, :, None], run.want[name], got[name])
        return settled

    @contextmanager
    def open(self, files: Mapping[str, Path], threads: int | None, optimise: bool) -> Iterator[Any]:
        with open_sessions(files, self.specs, threads, optimise) as sessions:
            detector = GroundingDinoDetector(
                sessions[contract.TEXT_ENCODER],
                sessions[contract.DETECTOR],
                self._loaded.constants,
                self._loaded.tokenizer,
                bundle_hash="",
                variant="",
            )
            with detector:
                yield detector
