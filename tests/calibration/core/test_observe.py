"""Observing: the values are those of the graph, memory groups and interruptions change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from pixano_edge.calibration import qdq
from pixano_edge.calibration.observe import Observations, observe
from pixano_edge.engine.errors import CalibrationError
from tests.calibration.core.graphs import TOKENS, WIDTH, convolutions, pictures, run, transformer

SHAPE = (1, TOKENS, WIDTH)


def _same(one: Observations, other: Observations) -> None:
    assert one.histograms.keys() == other.histograms.keys()
    assert one.feeds == other.feeds
    for name, histogram in one.histograms.items():
        for key, value in histogram.arrays().items():
            assert np.array_equal(value, other[name].arrays()[key]), (name, key)
    assert one.rows.keys() == other.rows.keys()
    for name, rows in one.rows.items():
        assert np.array_equal(rows.values, other.rows[name].values)


def test_ranges_are_those_of_the_graph() -> None:
    model, feeds = transformer(), pictures(SHAPE)
    names = qdq.tensors(model)
    found = observe(model, feeds, names, threads=1)
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names)
    values = [run(shown, feed)[1:] for feed in feeds]
    for index, name in enumerate(names):
        every = np.stack([value[index] for value in values])
        assert found[name].maximum == pytest.approx(every.max(), rel=1e-5)
        assert found[name].minimum == pytest.approx(every.min(), rel=1e-5)
        assert found[name].count == every.size
        channels = found[name].channels
        assert channels is not None
        assert channels == pytest.approx(np.abs(every).max(axis=(0, 1, 2)), rel=1e-5)
        assert found.rows[name].values.shape == (4 * TOKENS, every.shape[-1])


def test_groups_change_nothing_but_roundings() -> None:
    model, feeds = transformer(), pictures(SHAPE, 2)
    names = qdq.tensors(model)
    whole = observe(model, feeds, names, threads=1)
    small = observe(model, feeds, names, threads=1, group_bytes=30_000)
    for name, histogram in whole.histograms.items():
        assert small[name].count == histogram.count
        assert small[name].channels == pytest.approx(histogram.channels, rel=1e-5)
        assert np.abs(small[name].counts - histogram.counts).sum() < 0.01 * histogram.count
        assert np.allclose(small.rows[name].values, whole.rows[name].values, atol=1e-4)


def test_an_interrupted_run_goes_on_with_the_same_result(tmp_path: Path) -> None:
    model, feeds = convolutions(), pictures((1, 3, 16, 16), 5)
    names = qdq.tensors(model)
    store = tmp_path / "observed.npz"
    whole = observe(model, feeds, names, threads=1)

    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        observe(model, feeds, names, store, threads=1, on_feed=stop)
    assert len(Observations.load(store).feeds) == 2
    done: list[int] = []
    resumed = observe(model, feeds, names, store, threads=1, on_feed=done.append)
    assert done == [3, 4, 5]
    _same(whole, resumed)
    _same(whole, Observations.load(store))
    assert [p.name for p in tmp_path.iterdir()] == ["observed.npz"]


def test_a_store_of_something_else_is_refused(tmp_path: Path) -> None:
    feeds = pictures((1, 3, 16, 16), 3)
    model, store = convolutions(), tmp_path / "observed.npz"
    names = qdq.tensors(model)
    observe(model, feeds, names, store, threads=1)
    with pytest.raises(CalibrationError, match="another graph"):
        observe(convolutions(seed=1), feeds, names, store, threads=1)
    with pytest.raises(CalibrationError, match="Input 0 is not the one"):
        observe(model, feeds[::-1], names, store, threads=1)
    with pytest.raises(CalibrationError, match="with 3 inputs, now there are 2"):
        observe(model, feeds[:2], names, store, threads=1)
    store.write_bytes(store.read_bytes()[:-400])
    with pytest.raises(CalibrationError, match="no observations"):
        observe(model, feeds, names, store, threads=1)


def test_bad_input_is_refused() -> None:
    model = convolutions()
    names = qdq.tensors(model)
    with pytest.raises(CalibrationError, match="no input to calibrate"):
        observe(model, [], names)
    with pytest.raises(CalibrationError, match=r"has no tensors \['absent'\]"):
        observe(model, pictures((1, 3, 16, 16)), ["absent"], threads=1)
    broken = pictures((1, 3, 16, 16), 1)
    broken[0]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(CalibrationError, match=r"'x', input 0: .* not finite"):
        observe(model, broken, names, threads=1)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, feeds = convolutions(), pictures((1, 3, 16, 16), 2)
    names, store = qdq.tensors(model), tmp_path / "observed.npz"
    observe(model, feeds[:1], names, store, threads=1)
    before = store.read_bytes()

    def full(file: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(CalibrationError, match="No space left"):
        observe(model, feeds, names, store, threads=1)
    assert store.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["observed.npz"]
