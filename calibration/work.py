"""What the steps of one calibration share: the request, the samples, the work folder, what is to be told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.manifest import GraphVariant
from pixano_edge.engine.bundle.store import default_root
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.engine.libraries import ORT_WHEELS, installed_version, module_version

from .data import Data, Picture, Sample
from .result import BlockResult, Budget, GraphSize, TensorRange
from .spool import Spool
from .tasks.base import Task, TaskOptions, key_of

RECIPE = 2
"""Raised when equal arguments would give another result, so that older work folders are not used."""
SPOOL_BYTES = 2 << 30
"""Most bytes of recorded calls of a graph."""
TIMED_SAMPLES, TIMED_CALLS = 2, 8
"""What is recorded for timing alone, where nothing else is: a call of a language model takes as much as its cache."""
FEW = 3
"""Fewer held-out samples than this say little."""
SEARCH_SAMPLES = 12
FEEDS = 48
"""Recorded calls of each graph."""

Step = Callable[[str, int, int], None]
"""Called with what is done, a count, and how many there will be (0: not known)."""


@dataclass(frozen=True)
class Request:
    """What to calibrate.

    Attributes:
        data: Checked calibration data.
        budget: What the variant must reach; its metric is the task's.
        options: Of the task.
        destination: Folder of the result; the bundle's own for a variant in place.
        held_out: Other data to judge on; None takes a share of `data`.
        graphs: That may change; empty for all that run in the task.
        precision: ``int8``, ``fp16``, ``bf16``, ``int4``, or ``auto``.
        name: Of the variant; None for its precision.
        method: How ranges are found, see `calibrators`.
        smooth: How channels are rescaled before: ``search``, one strength for all, or None for not at all.
        search_samples: Samples that blocks are chosen by.
        work: Folder for what a resumed run needs; None for the user's own.
        resume: Go on with what an earlier run left there.
        replace: Also replace a variant that was exported.
        dry_run: Do everything but publish.
        command: For the report.
    """

    data: Data
    budget: Budget
    options: TaskOptions
    destination: Path
    held_out: Data | None = None
    graphs: tuple[str, ...] = ()
    precision: str = "int8"
    name: str | None = None
    method: str = "auto"
    smooth: float | str | None = "search"
    search_samples: int = SEARCH_SAMPLES
    work: Path | None = None
    resume: bool = True
    replace: bool = False
    dry_run: bool = False
    command: str = ""


@dataclass(frozen=True, eq=False)
class NewGraph:
    """A graph of a variant that was made.

    Attributes:
        path: Its file in the work folder, complete: all weights inside, or in `beside`.
        beside: Files that must lie beside it under their names.
        entry: For the manifest; None: it is read off the file.
        judged: A graph to judge instead, which rounds as a GPU does and is run unoptimised; None: the file itself.
        tensorrt: The same in operators that TensorRT has, complete, where the file has others.
    """

    path: Path
    beside: tuple[Path, ...] = ()
    entry: GraphVariant | None = None
    judged: Path | None = None
    tensorrt: Path | None = None


@dataclass
class Made:
    """A variant before it is judged.

    Attributes:
        precision: As in the manifest.
        graphs: That it changes.
        sizes: Of these.
        blocks: For the report.
        ranges: For the report.
        problems: Why it must not be published, in words.
        notes: What a reader should know.
        method: In words, for the manifest.
    """

    precision: str
    graphs: dict[str, NewGraph]
    sizes: tuple[GraphSize, ...]
    blocks: tuple[BlockResult, ...] = ()
    ranges: tuple[TensorRange, ...] = ()
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    method: str = ""

    @property
    def files(self) -> dict[str, Path]:
        """The changed graphs' files."""
        return {name: graph.path for name, graph in self.graphs.items()}

    @property
    def judged(self) -> dict[str, Path]:
        """What is run to judge them."""
        return {name: graph.judged or graph.path for name, graph in self.graphs.items()}


class Work:
    """One calibration's state.

    Args:
        bundle: To calibrate.
        request: What is wanted.
        task: Of the bundle.
        step: Reports progress.

    Attributes:
        graphs: That may change.
        folder: For everything that takes long to make.
        calibration: Samples that ranges are taken from and blocks are chosen by.
        held_out: Samples that variants are judged on.
        notes: For the report.
        measured: Memory of the graphs of the variant that was judged last, as fields of `GraphMemory`.

    Raises:
        CalibrationError: The request names graphs that do not run, or held-out and calibration data share samples.
    """

    def __init__(self, bundle: Bundle, request: Request, task: Task[Any, Any, Any, Any], step: Step) -> None:
        self.bundle, self.request, self.task, self.step = bundle, request, task, step
        self.split = request.data.split(request.held_out)
        if unknown := [g for g in request.graphs if g not in task.graphs]:
            raise CalibrationError(
                f"Graphs {unknown} do not run in this task.", f"Those that do: {', '.join(task.graphs)}."
            )
        self.graphs = tuple(g for g in task.graphs if not request.graphs or g in request.graphs)
        self.summary = request.data.summary(self.split)
        judged = request.held_out.digest if request.held_out is not None else ""
        annotated = [getattr(s, "truths", ()) for s in (*self.split.calibration, *self.split.held_out)]
        self.key = key_of(
            RECIPE, bundle.hash, self.summary.digest, judged, self.summary.calibration, self.summary.held_out,
            annotated, task.options, self.graphs, request.method, request.smooth, request.search_samples, versions(),
        )  # fmt: skip
        self.folder = work_folder(request.work) / self.key
        self.notes: list[str] = []
        self.measured: dict[str, dict[str, Any]] = {}
        self.calibration: list[Sample] = []
        self.held_out: list[Sample] = []
        self._golden: list[Sample] | None = None

    def refer(self) -> None:
        """Takes fp32's answers."""
        total = len(self.split.calibration) + len(self.split.held_out)
        done = self.counter("fp32's answers", total)
        self.calibration = self.task.refer(self.split.calibration, done)
        self.held_out = self.task.refer(self.split.held_out, done)
        if silent := total - len(self.calibration) - len(self.held_out):
            self.notes.append(f"fp32 answers nothing on {silent} sample(s); they were left out.")
        if len(self.held_out) < FEW:
            self.notes.append(
                f"Judged on {len(self.held_out)} held-out sample(s) only, which says little: give more --data, or "
                "--held-out."
            )
        self.summary = replace(
            self.summary,
            calibration=tuple(s.name for s in self.calibration),
            held_out=tuple(s.name for s in self.held_out),
        )

    def base(self, variant: str) -> dict[str, Path]:
        """Files of the graphs that may not change, where the bundle has some under the variant's name: those will run
        beside the new ones, so all are judged together."""
        held = self.bundle.manifest.graphs
        return {
            g: self.bundle.root / held[g].variants[variant].file
            for g in self.task.graphs
            if g not in self.graphs and variant in held[g].variants
        }

    def spool(self, name: str, samples: Sequence[Sample], limit: int) -> Spool:
        """Inputs of all graphs while fp32 answers about samples, recorded now or in an earlier run."""
        spool = self._spool(name, limit)
        if not spool.complete:
            self.task.collect(samples, spool, self.counter(f"Recording inputs ({name})", len(samples)))
        return spool

    def timing(self) -> Spool:
        """Inputs to time graphs with: what ranges were taken from, or, where none were, those of a few samples."""
        held = self._spool("calibration", FEEDS)
        return held if held.complete else self.spool("timing", self.calibration[:TIMED_SAMPLES], TIMED_CALLS)

    def golden(self) -> list[Sample]:
        """The bundle's own pictures, with fp32's answers taken; none where fp32 finds nothing on them.

        Raises:
            EdgeError: One does not decode.
        """
        if self._golden is None:
            given = [Picture(f"golden {s.name}", self.bundle.file(s.image)) for s in self.bundle.golden()]
            self._golden = []
            if given and not self.task.clips:
                try:
                    self._golden = self.task.refer(given)
                except CalibrationError:  # what the user asks for is not on them
                    self.notes.append("fp32 finds nothing on the golden pictures; they were not compared.")
        return self._golden

    def counter(self, what: str, total: int) -> Callable[[], None]:
        """Reports a step's start now and one more done at each call."""
        count = 0

        def done() -> None:
            nonlocal count
            count += 1
            self.step(what, count, total)

        self.step(what, 0, total)
        return done

    def _spool(self, name: str, limit: int) -> Spool:
        seed = self.request.options.seed
        return Spool(self.folder / name, self.key, limit=limit, max_bytes=SPOOL_BYTES, seed=seed)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The work folder for this process alone; an earlier run's is emptied where it is not to be taken up again.

        Raises:
            CalibrationError: Another process works there, or nothing can be written there.
        """
        path = self.folder.with_suffix(".lock")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not path.exists() or os.fstat(lock).st_ino != path.stat().st_ino:
                    raise BlockingIOError  # whoever held it has just removed it
            except OSError:
                os.close(lock)
                raise
        except BlockingIOError as error:
            raise CalibrationError(
                f"Another calibration of this bundle with the same data is at work in '{self.folder}'.",
                "Wait for its end: this one then goes on with what it measured. Or give another --work folder.",
            ) from error
        except OSError as error:
            raise CalibrationError(
                f"The work folder '{self.folder.parent}' cannot be used: {error.strerror}.", "Give another one: --work."
            ) from error
        try:
            if not self.request.resume:
                self.clear()
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(lock)

    def clear(self) -> None:
        """Removes the work folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def work_folder(given: Path | None) -> Path:
    """Where the folders of interrupted runs are, by default the user's own place."""
    return (given or default_root().parent / "calibrations").expanduser()


def versions() -> dict[str, str]:
    """Of what shapes the result."""
    return {
        "pixano-edge": installed_version("pixano-edge") or "not installed as a package",
        "onnx": installed_version("onnx") or "unknown",
        "onnxruntime": module_version("onnxruntime", ORT_WHEELS) or "unknown",
    }
