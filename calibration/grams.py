"""Activations of a decoder's matrices as Gram matrices, collected in bounded memory.

The fp32 graph runs over recorded turns (`turns.py`) in ONNX Runtime, a prompt at once and then its answer's tokens one
by one, as it does for a user: from the last layer's attention on, only a run's last token is computed, and so those
matrices see prompts' ends and answers alone. The tensors that enter matrices are added to the graph's outputs. They are
taken in groups whose Gram matrices fit into `group_bytes`, one pass over the turns each; results lie on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from pixano_edge.calibration.turns import Turn, Turns
from pixano_edge.calibration.weight_only import Doubles, Gram
from pixano_edge.engine.bundle.files import hash_file, os_errors
from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.engine.errors import EdgeError, MissingDependencyError

GROUP_BYTES = 1 << 30
CHECK_EVERY = 4
"""One turn of so many is kept for judging; nothing is fitted to it."""
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where ONNX Runtime looks for the weights of a graph that it is given as bytes."""


@dataclass(frozen=True)
class Pair:
    """Activations that enter one tensor: those to fit to, and those to judge by."""

    fit: Gram
    check: Gram


class Grams(Mapping[str, Pair]):
    """Gram matrices on disk, read when they are asked for; by the name of the tensor.

    Args:
        folder: As `collect` wrote it.
        places: Number of each tensor's file.
    """

    def __init__(self, folder: Path, places: Mapping[str, int]) -> None:
        self._folder, self._places = folder, dict(places)

    def __getitem__(self, name: str) -> Pair:
        with np.load(_file(self._folder, self._places[name]), allow_pickle=False) as held:
            return Pair(
                Gram(held["fit"], int(held["fit_rows"])),
                Gram(held["check"], int(held["check_rows"])),
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def collect(
    file: Path,
    constants: DecoderConstants,
    turns: Turns,
    tensors: Mapping[str, int],
    folder: Path,
    *,
    group_bytes: int = GROUP_BYTES,
    threads: int | None = None,
    on_turn: Callable[[], None] = lambda: None,
) -> Grams:
    """Runs the decoder over turns and adds up Gram matrices.

    Args:
        file: The fp32 graph for ONNX Runtime; its weights lie beside it.
        constants: Of the decoder.
        turns: At least two: one of `CHECK_EVERY` is judged by.
        tensors: Channels by the name of the tensor.
        folder: Where results go; what is there of the same graph, turns and tensors is not collected again.
        group_bytes: Most bytes of Gram matrices in memory at once; one tensor may take more.
        threads: Threads within an operator; ONNX Runtime's choice if None.
        on_turn: Called after each turn, ``groups(...) * len(turns)`` times if nothing is there yet.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        EdgeError: Too few turns, activations that are not finite, or a full disk.
    """
    if len(turns) < 2:
        raise EdgeError(f"{len(turns)} turn(s) cannot be fitted to and judged by.", "Collect two at least, better 32.")
    with os_errors(f"making '{folder.name}'"):
        folder.mkdir(parents=True, exist_ok=True)
    _keep_if_same(folder, file, turns, tensors)
    places = {name: index for index, name in enumerate(tensors)}
    for group in groups(tensors, group_bytes):
        if all(_file(folder, places[name]).exists() for name in group):
            continue
        sums = {name: [np.zeros((tensors[name],) * 2) for _ in range(2)] for name in group}
        rows = {name: [0, 0] for name in group}
        decoder = TappedDecoder(file, constants, group, threads)
        for index, turn in enumerate(turns):
            judged = int(index % CHECK_EVERY == CHECK_EVERY - 1 or (len(turns) < CHECK_EVERY and index == 1))
            for values in decoder.run(turn):
                for name, value in zip(group, values):
                    flat = value.reshape(-1, tensors[name]).astype(np.float32, copy=False)
                    sums[name][judged] += flat.T @ flat
                    rows[name][judged] += len(flat)
            on_turn()
        for name in group:
            if not all(np.isfinite(matrix).all() for matrix in sums[name]):
                raise EdgeError(
                    f"The activations of '{name}' are not finite in fp32.",
                    "Check the bundle with 'pixano-edge verify'.",
                )
            with os_errors(f"writing the activations of '{name}'"):
                _save(_file(folder, places[name]), sums[name], rows[name])
    return Grams(folder, places)


def groups(tensors: Mapping[str, int], group_bytes: int = GROUP_BYTES) -> list[list[str]]:
    """Tensors whose Gram matrices are in memory together."""
    found: list[list[str]] = []
    held = group_bytes + 1
    for name, channels in tensors.items():
        size = 2 * 8 * channels * channels  # fit and check, float64
        if held + size > group_bytes:
            found.append([])
            held = 0
        found[-1].append(name)
        held += size
    return found


class TappedDecoder:
    """The fp32 decoder with some of its inner tensors as outputs.

    Args:
        file: The graph.
        constants: Of the decoder.
        tensors: Names of the inner tensors; the logits may be among them.
        threads: Threads within an operator.
    """

    def __init__(self, file: Path, constants: DecoderConstants, tensors: Sequence[str], threads: int | None) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingDependencyError("onnxruntime", "cpu", "Collecting activations") from error
        model = onnx.load(str(file), load_external_data=False)
        known = {output.name for output in model.graph.output}
        for name in (t for t in tensors if t not in known):
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(EXTERNAL_FOLDER, str(file.parent.resolve()))
        if threads:
            options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._constants, self._tensors = constants, list(tensors)

    def run(self, turn: Turn) -> Iterator[list[Any]]:
        """Values of the tensors for each run: the prompt, then each token of the answer."""
        names = self._constants.cache_names
        slots = turn.prompt.shape[1] + turn.answer.shape[1]
        caches = {past: np.zeros(self._constants.cache_shape(slots), np.float32) for past, _ in names}
        parts = [turn.prompt, *(turn.answer[:, at : at + 1] for at in range(turn.answer.shape[1]))]
        filled = 0
        for part in parts:
            start, filled = filled, filled + part.shape[1]
            feeds: dict[str, Any] = {
                contract.INPUTS_EMBEDS: np.ascontiguousarray(part),
                contract.SEQLENS_K: np.array([filled - 1], np.int32),
                **caches,
            }
            if turn.positions is not None:
                feeds[contract.POSITION_IDS] = np.ascontiguousarray(turn.positions[:, start:filled])
            found = self._session.run([*self._tensors, *(present for _, present in names)], feeds)
            caches = {past: value for (past, _), value in zip(names, found[len(self._tensors) :])}
            yield found[: len(self._tensors)]


def _file(folder: Path, place: int) -> Path:
    return folder / f"gram-{place:04d}.npz"


def _keep_if_same(folder: Path, file: Path, turns: Turns, tensors: Mapping[str, int]) -> None:
    """Removes what was collected from another graph, other turns or of other tensors."""
    # The graph's file holds the hash of its weights' file.
    key = json.dumps(
        {"graph": hash_file(file), "turns": [hash_file(turn) for turn in turns.files], "tensors": dict(tensors)}
    )
    told = folder / "key.json"
    with os_errors(f"writing '{told.name}'"):
        if told.exists() and told.read_text() == key:
            return
        for old in folder.glob("gram-*.npz"):
            old.unlink()
        told.write_text(key)


def _save(file: Path, sums: Sequence[Doubles], rows: Sequence[int]) -> None:
    """Writes one tensor's matrices in one step."""
    partial = file.with_name(f".{file.name}.part")
    try:
        with partial.open("wb") as out:
            np.savez(
                out,
                fit=sums[0].astype(np.float32),
                fit_rows=np.int64(rows[0]),
                check=sums[1].astype(np.float32),
                check_rows=np.int64(rows[1]),
            )
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
