"""What all tasks have in common: fp32's answers first, then those of other graph files, compared sample by sample.

A task runs the engine's own model classes on sessions that it opens itself, so what is judged is what users get:
pre-processing, graphs, post-processing. What is asked about a sample (`plan`) is chosen once with fp32 and stays.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.bundle.files import hash_file
from pixano_edge.engine.errors import CalibrationError
from pixano_edge.engine.runtime import open_device
from pixano_edge.engine.runtime.base import Session
from pixano_edge.engine.runtime.factory import open_session

from ..data import Sample, reading_order
from ..result import SampleValue, Score, TruthScore, WorstSample
from ..spool import RecordingSession, Spool

Files = Mapping[str, Path]
"""Graph files by graph; those left out are the bundle's own fp32."""

S = TypeVar("S", bound=Sample)
M = TypeVar("M")
P = TypeVar("P")
A = TypeVar("A")

WORST = 10


@dataclass(frozen=True)
class TaskOptions:
    """What a task may be told.

    Attributes:
        threads: Threads of a session; None for ONNX Runtime's default.
        seed: Of what is asked.
        video: Track clips (SAM 2).
        classes: What a detector is asked for; empty where the data name them.
        threshold: Score from which a detection counts.
        questions: What a language model is asked about each picture.
        max_new_tokens: Longest answer in tokens.
        pictures: Clips: their first frames are asked about as pictures too, since graphs of pictures may change.
    """

    threads: int | None = None
    seed: int = 0
    video: bool = False
    classes: tuple[str, ...] = ()
    threshold: float = 0.3
    questions: tuple[str, ...] = ()
    max_new_tokens: int = 48
    pictures: bool = False


class Task(abc.ABC, Generic[S, M, P, A]):
    """A family's pipeline as a yardstick: sample type S, engine model M, what is asked P, answers A.

    Args:
        bundle: With fp32 graphs.
        options: See `TaskOptions`.

    Attributes:
        metric: Name of the agreement with fp32, 1 is perfect.
        about: What it means, in a sentence.
        usual: Budget where the user gives none.
        clips: Whether samples are clips.
        graphs: That run in this task, in pipeline order.
        unoptimised: Files that ONNX Runtime must run as they are: they round every value, which it would leave out.

    Raises:
        CalibrationError: The bundle has no fp32 graphs, or the options lack something.
    """

    metric: ClassVar[str]
    about: ClassVar[str]
    usual: ClassVar[float]
    clips: ClassVar[bool] = False

    def __init__(self, bundle: Bundle, options: TaskOptions) -> None:
        if "fp32" not in bundle.variants():
            raise CalibrationError(
                f"Bundle '{bundle.manifest.name}' has no fp32 graphs to calibrate from.",
                "Export it again with --variants fp32.",
            )
        self.bundle = bundle
        self.options = options
        self.device = open_device("cpu")
        self.unoptimised: set[Path] = set()
        # By the sample itself: another folder may have samples of the same names.
        self._plans: dict[S, P] = {}
        self._references: dict[S, A] = {}
        self._digests: dict[tuple[Path, int], str] = {}

    @property
    @abc.abstractmethod
    def graphs(self) -> tuple[str, ...]: ...

    @abc.abstractmethod
    def make(self, sessions: Mapping[str, Session], digests: Mapping[str, str]) -> M:
        """The engine's model on open sessions; closing it must not close them. `digests` tell files apart."""

    @abc.abstractmethod
    def close(self, model: M) -> None:
        """Frees what `make` made."""

    @abc.abstractmethod
    def plan(self, model: M, sample: S) -> P | None:
        """What to ask about a sample, chosen with fp32; None where there is nothing to ask."""

    @abc.abstractmethod
    def answer(self, model: M, sample: S, plan: P) -> A:
        """A model's answer; owns its memory."""

    @abc.abstractmethod
    def compare(self, want: A, got: A, plan: P) -> float:
        """Agreement of an answer with fp32's, 0 to 1."""

    def draw(self, sample: S, plan: P, want: A, got: A, value: float) -> WorstSample:
        """A sample of the report's worst ones; overridden by tasks with pictures."""
        return WorstSample(sample.name, value)

    def truth(self, files: Files, samples: Sequence[S]) -> TruthScore | None:
        """Accuracy against annotations; None where the data have none, or the task knows no measure."""
        return None

    def refer(self, samples: Sequence[S], on_sample: Callable[[], None] = lambda: None) -> list[S]:
        """Takes fp32's answers to samples, once; the samples about which there is something to ask.

        Raises:
            CalibrationError: There is nothing to ask about any of them.
        """
        todo = [s for s in samples if s not in self._references]
        if todo:
            with self.open({}) as model:
                for sample in reading_order(todo):
                    plan = self.plan(model, sample)
                    if plan is not None:
                        self._plans[sample] = plan
                        self._references[sample] = self.answer(model, sample, plan)
                    on_sample()
        asked = [s for s in samples if s in self._references]
        if not asked:
            raise CalibrationError(
                f"fp32 itself answers nothing on {len(samples)} sample(s): there is no agreement to measure.",
                self.hint,
            )
        return asked

    def plan_of(self, sample: S) -> P:
        """What is asked about a sample that `refer` took."""
        return self._plans[sample]

    def reference(self, sample: S) -> A:
        """fp32's answer about a sample that `refer` took."""
        return self._references[sample]

    def grain(self, sample: S) -> float:
        """What one answer more or less changes in the value of a sample that `refer` took; 0 for what is continuous."""
        return 0.0

    hint: ClassVar[str] = "Give pictures of what the model knows."

    def score(self, files: Files, samples: Sequence[S], on_sample: Callable[[], None] = lambda: None) -> Score:
        """Agreement of some graph files with fp32 on samples that `refer` took.

        Raises:
            EdgeError: A file does not load, or fails.
        """
        values: dict[S, float] = {}
        with self.open(files) as model:
            for sample in reading_order(samples):
                plan = self._plans[sample]
                got = self.answer(model, sample, plan)
                values[sample] = float(self.compare(self._references[sample], got, plan))
                on_sample()
        return Score.of(tuple(SampleValue(sample.name, values[sample]) for sample in samples))

    def worst(self, files: Files, score: Score, samples: Sequence[S], count: int = WORST) -> tuple[WorstSample, ...]:
        """The lowest samples of their score, drawn beside fp32; a value that is no number is the lowest."""
        values = {sample: told.value for sample, told in zip(samples, score.samples, strict=True)}
        lowest = sorted(values, key=lambda s: values[s] if values[s] == values[s] else -1.0)[:count]
        drawn: dict[S, WorstSample] = {}
        with self.open(files) as model:
            for sample in reading_order(lowest):
                plan = self._plans[sample]
                got = self.answer(model, sample, plan)
                drawn[sample] = self.draw(sample, plan, self._references[sample], got, values[sample])
        return tuple(drawn[sample] for sample in lowest)

    def collect(self, samples: Sequence[S], spool: Spool, on_sample: Callable[[], None] = lambda: None) -> None:
        """Records every graph's inputs while fp32 answers; samples as `refer` returned them."""
        if spool.complete:
            return
        spool.restart()
        with self._sessions({}, spool) as (sessions, _), contextlib.ExitStack() as opened:
            model = self.make(sessions, dict.fromkeys(sessions, "recorded"))
            opened.callback(self.close, model)
            for sample in reading_order(samples):
                self.record(model, sample, self._plans[sample])
                on_sample()
        spool.finish()

    def record(self, model: M, sample: S, plan: P) -> None:
        """What runs while inputs are recorded: a user's request."""
        self.answer(model, sample, plan)

    def weight(self, graph: str, inputs: Mapping[str, Any]) -> float:
        """How much a run stands for where only some are recorded, by the arrays that it is given."""
        return 1.0

    @contextlib.contextmanager
    def open(self, files: Files) -> Iterator[M]:
        """The engine's model on some graph files."""
        with self._sessions(files, None) as (sessions, digests), contextlib.ExitStack() as opened:
            model = self.make(sessions, digests)
            opened.callback(self.close, model)
            yield model

    def file(self, graph: str, files: Files) -> Path:
        """The file that a graph runs."""
        return files.get(graph) or self.bundle.graph_path(graph, "fp32")

    def spec(self, graph: str) -> Any:
        """Contract of a graph."""
        return self.bundle.spec(graph, "fp32")

    @contextlib.contextmanager
    def _sessions(self, files: Files, spool: Spool | None) -> Iterator[tuple[dict[str, Session], dict[str, str]]]:
        sessions: dict[str, Session] = {}
        digests: dict[str, str] = {}
        with contextlib.ExitStack() as opened:
            for graph in self.graphs:
                path, spec = self.file(graph, files), self.spec(graph)
                threads = self.options.threads
                if spool is None:
                    options = {"optimization": "none"} if path in self.unoptimised else None
                    sessions[graph] = open_session(
                        path, spec, self.device, backend="onnxruntime", threads=threads, options=options
                    )
                    digests[graph] = self._digest(path)
                else:
                    weight = functools.partial(self.weight, graph)
                    sessions[graph] = RecordingSession(
                        path, spec, self.device, threads=threads, to=spool.graph(graph), weight=weight
                    )
                opened.callback(sessions[graph].close)
            yield sessions, digests

    def _digest(self, path: Path) -> str:
        """SHA-256 of a file, which is asked for often and changes with its time of change."""
        key = (path, path.stat().st_mtime_ns)
        if key not in self._digests:
            self._digests[key] = hash_file(path)
        return self._digests[key]


def key_of(*parts: object) -> str:
    """A short name for anything that `repr` tells apart."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
