"""What a family of detectors brings to the common pipeline from checkpoint to bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from torch import Tensor, nn

from pixano_edge.engine.bundle.manifest import Licence, Preprocess, Source
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.models.detection.base import Detections
from pixano_edge.engine.models.detection.verify import Traceable
from pixano_edge.engine.runtime import open_device, open_session
from pixano_edge.engine.runtime.base import Session
from pixano_edge.export.differences import Arrays
from pixano_edge.export.photos import Photo


@dataclass(frozen=True, eq=False)
class GraphRun:
    """One call of a graph with the inputs that PyTorch's own model gave it, and what came out there.

    Attributes:
        graph: Name in the contract.
        feeds: Inputs by name.
        want: Outputs by name.
        context: Whatever the family's `settle` needs.
    """

    graph: str
    feeds: Arrays
    want: Arrays
    context: Any = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What PyTorch's model and processor say of one photo and one list of classes.

    Attributes:
        photo: Asked about.
        classes: Asked for.
        runs: Of every graph; a run that several answers share is one object and is compared once.
        trace: Tensors by name, as the engine's `trace` gives them; names that are left out are not checked on the box.
        scores: Of every box, in any order, to choose thresholds from.
        detect: Final detections for a box threshold, clipped to the photo, without boxes wholly outside it.
    """

    photo: Photo
    classes: tuple[str, ...]
    runs: list[GraphRun]
    trace: Arrays
    scores: npt.NDArray[np.float32]
    detect: Callable[[float], Detections]


class DetectorFamily(Protocol):
    """One loaded checkpoint, with everything that depends on its family.

    Attributes:
        family: Name in the manifest.
        source: Goes into the manifest.
        licence: Goes into the manifest.
        notes: Remarks for the user.
        constants: Go into the manifest.
        preprocess: Goes into the manifest.
        files: More files of the bundle by path, such as the tokeniser.
        specs: Graphs of the contract by name.
        reference: What answers, for the parity report.
    """

    family: str
    source: Source
    licence: Licence
    notes: list[str]
    constants: dict[str, Any]
    preprocess: Preprocess
    files: Mapping[str, bytes]
    specs: Mapping[str, GraphSpec]
    reference: str

    def modules(self) -> Mapping[str, nn.Module]:
        """Modules to export, by graph."""

    def example(self, graph: str) -> tuple[Tensor, ...]:
        """Inputs to trace a graph with."""

    def keep(self, graph: str, model: onnx.ModelProto) -> dict[str, str]:
        """Nodes that stay in fp32 in fp16 graphs, and the key of the reason."""

    def feeds(self, spec: GraphSpec, sizes: Mapping[str, int], seed: int) -> Arrays:
        """Random inputs of a graph that mean something."""

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raises PromptError where the engine's detector or its tokeniser cannot ask for a list of classes, ExportError
        where PyTorch's side could not answer: before the graphs are made."""

    def ask(self, photo: Photo, lists: Sequence[Sequence[str]]) -> list[Answer]:
        """Asks PyTorch's model and processor about one photo, once per list of classes."""

    def settle(self, run: GraphRun, got: Arrays) -> Arrays:
        """What of a graph's outputs is compared: `got`, unless the family knows differences that mean nothing, such
        as two queries that changed ranks on a tie; these are replaced by the reference's values."""

    def open(self, files: Mapping[str, Path], threads: int | None, optimise: bool) -> AbstractContextManager[Traceable]:
        """The engine's detector on exported files, on the CPU; see `open_sessions`."""


@contextmanager
def open_sessions(
    files: Mapping[str, Path], specs: Mapping[str, GraphSpec], threads: int | None = None, optimise: bool = True
) -> Iterator[dict[str, Session]]:
    """The engine's sessions of exported files on the CPU.

    Args:
        files: ONNX file of every graph.
        specs: Contracts by graph.
        threads: Threads of a call; None for ONNX Runtime's choice.
        optimise: Whether ONNX Runtime may rewrite the graphs.
    """
    with ExitStack() as opened:
        device = open_device("cpu")
        opened.callback(device.close)
        options = None if optimise else {"optimization": "none"}
        sessions = {}
        for name, spec in specs.items():
            sessions[name] = open_session(files[name], spec, device, threads=threads, options=options)
            opened.callback(sessions[name].close)
        yield sessions
