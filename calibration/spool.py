"""Inputs of graphs, recorded while the engine's own pipeline runs: a bounded number of calls, on disk."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixano_edge.engine.bundle.files import os_errors
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.engine.errors import BundleError
from pixano_edge.engine.runtime.base import Binding, Device
from pixano_edge.engine.runtime.ort import OrtSession

Feed = dict[str, npt.NDArray[Any]]

INDEX = "index.json"


class GraphSpool:
    """Recorded inputs of one graph. Of more calls than fit each is kept by chance, in proportion to its weight, so that
    a long clip is covered from end to end: a call's key is u^(1/weight) of a random u, and the largest keys stay
    (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir").

    Args:
        folder: Made when the first call is recorded.
        limit: Most calls kept.
        max_bytes: Most bytes kept; a graph with large inputs keeps fewer calls, one at least.
        seed: Of the choice.
    """

    def __init__(self, folder: Path, limit: int, max_bytes: int, seed: int = 0) -> None:
        self.folder, self.calls = folder, 0
        self._limit, self._max_bytes = limit, max_bytes
        self._random = np.random.default_rng([83, seed])
        self._kept: list[tuple[float, int]] = []
        """Key and bytes of each slot."""

    def add(self, feed: Feed, weight: float = 1.0) -> None:
        """Takes one call into account; the arrays are written, not kept.

        Args:
            feed: Inputs by name.
            weight: How much the call stands for, above 0.

        Raises:
            BundleError: The disk is full, or the folder cannot be written.
        """
        self.calls += 1
        key = (float(self._random.random()) ** (1 / weight), sum(array.nbytes for array in feed.values()))
        slot = len(self._kept)
        if slot >= self._limit:
            slot = self._lowest()
            if key <= self._kept[slot]:
                return
        with os_errors(f"writing '{self.folder}'"):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{slot:04d}.part"
            try:
                with partial.open("wb") as file:
                    np.savez(file, **feed)  # type: ignore[arg-type]  # a flag of the function comes before them
                partial.replace(self.path(slot))
            finally:
                partial.unlink(missing_ok=True)
            self._kept[slot : slot + 1] = [key]
            while len(self._kept) > 1 and sum(size for _, size in self._kept) > self._max_bytes:
                self._drop(self._lowest())
                self._limit = len(self._kept)  # or later calls would be likelier to stay than earlier ones

    def path(self, slot: int) -> Path:
        """File of one recorded call."""
        return self.folder / f"{slot:04d}.npz"

    def __len__(self) -> int:
        return len(self._kept)

    def _lowest(self) -> int:
        return min(range(len(self._kept)), key=lambda slot: self._kept[slot])

    def _drop(self, slot: int) -> None:
        """Forgets a call; the last one takes its place."""
        last = len(self._kept) - 1
        if slot < last:
            self.path(last).replace(self.path(slot))
            self._kept[slot] = self._kept[last]
        else:
            self.path(last).unlink()
        self._kept.pop()


class Spool:
    """Recorded inputs of all graphs of a bundle, whole or absent: `finish` says that recording came to its end.

    Args:
        folder: Of the recordings.
        key: What they depend on (bundle, data, settings); recordings under another key are dropped.
        limit: Most calls kept of a graph.
        max_bytes: Most bytes kept of a graph.
        seed: Of the choice among more calls.
    """

    def __init__(self, folder: Path, key: str, *, limit: int, max_bytes: int, seed: int = 0) -> None:
        self.folder, self._key = folder, key
        self._limit, self._max_bytes, self._seed = limit, max_bytes, seed
        self._graphs: dict[str, GraphSpool] = {}
        self._known: dict[str, int] | None = self._read_index()

    @property
    def complete(self) -> bool:
        """Whether recording came to its end, now or in an earlier run."""
        return self._known is not None

    def restart(self) -> None:
        """Forgets what an interrupted recording left."""
        self._known = None
        self._graphs.clear()
        with os_errors(f"clearing '{self.folder}'"):
            for path in self.folder.rglob("*.npz") if self.folder.is_dir() else ():
                path.unlink()
            (self.folder / INDEX).unlink(missing_ok=True)

    def graph(self, name: str) -> GraphSpool:
        """The recording of one graph."""
        if name not in self._graphs:
            self._graphs[name] = GraphSpool(self.folder / name, self._limit, self._max_bytes, self._seed)
        return self._graphs[name]

    def finish(self) -> None:
        """Says that everything was recorded."""
        self._known = {name: len(graph) for name, graph in self._graphs.items()}
        with os_errors(f"writing '{self.folder}'"):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{INDEX}.part"
            partial.write_text(json.dumps({"key": self._key, "graphs": self._known}))
            partial.replace(self.folder / INDEX)

    def feeds(self, graph: str) -> Feeds:
        """The recorded inputs of a graph, read again at every iteration; none for a graph that never ran."""
        count = (self._known or {}).get(graph, 0)
        return Feeds([self.folder / graph / f"{slot:04d}.npz" for slot in range(count)])

    def _read_index(self) -> dict[str, int] | None:
        try:
            content = json.loads((self.folder / INDEX).read_text())
            if content["key"] != self._key:
                return None
            known = {str(name): int(count) for name, count in content["graphs"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        present = all((self.folder / g / f"{slot:04d}.npz").is_file() for g, n in known.items() for slot in range(n))
        return known if present else None


class Feeds(Sequence[Feed]):
    """Recorded inputs, read when they are asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Feed]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Feeds(self.files[index])
        path = self.files[index]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
            raise BundleError(
                f"The recorded inputs '{path}' are damaged: {error}.", "Delete the work folder and calibrate again."
            ) from error


class RecordingSession(OrtSession):
    """A session that writes the inputs of each run down before it runs.

    Args:
        path: See `OrtSession`, as the next two.
        spec: Contract of the graph.
        device: A CPU.
        threads: Threads per run.
        to: Where the inputs go.
        weight: How much a run stands for, by its inputs.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        device: Device,
        *,
        threads: int | None,
        to: GraphSpool,
        weight: Callable[[Feed], float] = lambda feed: 1.0,
    ) -> None:
        super().__init__(path, spec, device, threads=threads)
        self._to, self._weight = to, weight

    def _run_impl(self, binding: Binding) -> None:
        feed = {name: buffer.host() for name, buffer in binding.inputs.items()}
        self._to.add(feed, self._weight(feed))
        super()._run_impl(binding)
