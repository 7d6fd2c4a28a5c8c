"""The search over sets of blocks, on made-up metrics whose best answer is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pixano_edge.calibration.search import Scores, Unit, Units, search

UNITS = [Unit("encoder", f"block.{i}") for i in range(12)]
SIZES = {unit: float(1 + i % 4) for i, unit in enumerate(UNITS)}


def single(unit: Unit) -> str:
    return unit.name


def threes(unit: Unit) -> str:
    return f"group {UNITS.index(unit) // 3}"


def additive(losses: dict[Unit, float]) -> Callable[[Units], float]:
    return lambda units: 1 - sum(losses.get(u, 0.0) for u in units)


def test_everything_when_everything_fits() -> None:
    found = search(UNITS, single, SIZES.__getitem__, additive({}), 0.98)
    assert found.chosen == frozenset(UNITS)
    assert found.value == 1
    assert not found.why
    assert not found.without
    assert found.evaluations == len(UNITS) + 1


def test_one_culprit_is_left_out_and_told_why() -> None:
    culprit = UNITS[5]
    found = search(UNITS, single, SIZES.__getitem__, additive({culprit: 0.5}), 0.98, metric="mask_iou")
    assert found.chosen == frozenset(UNITS) - {culprit}
    assert found.value >= 0.98
    assert found.whole == pytest.approx(0.5)
    assert found.alone[culprit,] == pytest.approx(0.5)
    assert found.without[culprit,] == 1
    assert list(found.why) == [culprit]
    assert "mask_iou is 0.5000" in found.why[culprit]


@pytest.mark.parametrize("seed", range(8))
def test_the_set_fits_and_no_block_left_out_could_be_added(seed: int) -> None:
    losses = dict(zip(UNITS, np.random.default_rng(seed).exponential(0.004, len(UNITS)).tolist()))
    evaluate = additive(losses)
    found = search(UNITS, single, SIZES.__getitem__, evaluate, 0.98)
    assert evaluate(found.chosen) == pytest.approx(found.value)
    assert found.value >= 0.98
    left = frozenset(UNITS) - found.chosen
    assert set(found.why) == left
    assert all(evaluate(found.chosen | {unit}) < 0.98 for unit in left)
    saved = sum(SIZES[u] for u in found.chosen)
    fitting = (s for n in range(13) for s in itertools.combinations(UNITS, n) if evaluate(frozenset(s)) >= 0.98)
    assert saved >= 0.8 * max(sum(SIZES[u] for u in s) for s in fitting)


def test_losses_that_do_not_add_up_still_give_a_set_that_fits() -> None:
    """Two blocks that are harmless alone and not together: the first start of the ranking with both does not fit."""
    pair = {UNITS[0], UNITS[1]}

    def evaluate(units: Units) -> float:
        return 0.9 if pair <= units else 1 - 0.0001 * len(units)

    found = search(UNITS, single, SIZES.__getitem__, evaluate, 0.98)
    assert found.value >= 0.98
    assert len(found.chosen) == len(UNITS) - 1


def test_of_a_group_that_does_not_fit_the_harmless_blocks_are_taken() -> None:
    culprit = UNITS[4]
    found = search(UNITS, threes, SIZES.__getitem__, additive({culprit: 0.5}), 0.98)
    assert found.chosen == frozenset(UNITS) - {culprit}
    assert list(found.why) == [culprit]
    assert found.alone[tuple(UNITS[3:6])] == pytest.approx(0.5)
    assert {group for group in found.alone if len(group) == 1} == {(unit,) for unit in UNITS[3:6]}
    assert found.evaluations < 2 * len(UNITS)


def test_groups_cost_as_many_measurements_as_there_are_groups() -> None:
    found = search(UNITS, threes, SIZES.__getitem__, additive({}), 0.98)
    assert found.chosen == frozenset(UNITS)
    assert found.evaluations == 5
    assert list(found.alone) == [tuple(UNITS[i : i + 3]) for i in range(0, 12, 3)]


def test_nothing_fits() -> None:
    found = search(UNITS, single, SIZES.__getitem__, additive(dict.fromkeys(UNITS, 0.5)), 0.98)
    assert not found.chosen
    assert found.value == 1
    assert set(found.why) == set(UNITS)


def test_a_metric_that_is_no_number_does_not_fit() -> None:
    found = search(UNITS, single, SIZES.__getitem__, lambda units: float("nan") if UNITS[3] in units else 1.0, 0.98)
    assert found.chosen == frozenset(UNITS) - {UNITS[3]}


def test_refused_blocks_are_never_measured() -> None:
    seen: list[Units] = []

    def evaluate(units: Units) -> float:
        seen.append(units)
        return 1.0

    found = search(UNITS, single, SIZES.__getitem__, evaluate, 0.98, refused=UNITS[:2])
    assert found.chosen == frozenset(UNITS[2:])
    assert all(not units & set(UNITS[:2]) for units in seen)


def test_the_repair_stops_and_says_so() -> None:
    found = search(UNITS, single, SIZES.__getitem__, additive(dict.fromkeys(UNITS, 0.015)), 0.98, repairs=2)
    assert len(found.chosen) == 1
    assert sum("not tried" in why for why in found.why.values()) == 9


def test_scores_are_kept_and_belong_to_their_key(tmp_path: Path) -> None:
    path = tmp_path / "work" / "scores.json"
    calls: list[Units] = []

    def measure(units: Units) -> float:
        calls.append(units)
        return 0.5

    one = frozenset(UNITS[:2])
    assert Scores(path, "a").get(one, measure) == 0.5
    assert Scores(path, "a").get(one, measure) == 0.5
    assert len(calls) == 1
    Scores(path, "b").get(one, measure)
    assert len(calls) == 2
    path.write_text("{")
    Scores(path, "b").get(one, measure)
    assert len(calls) == 3


def test_an_interrupted_search_goes_on_with_an_equal_result(tmp_path: Path) -> None:
    losses = dict(zip(UNITS, np.random.default_rng(3).exponential(0.006, len(UNITS)).tolist()))
    calls = 0

    def measure(units: Units) -> float:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return additive(losses)(units)

    def run(scores: Scores) -> Units:
        return search(UNITS, single, SIZES.__getitem__, lambda units: scores.get(units, measure), 0.98).chosen

    with pytest.raises(KeyboardInterrupt):
        run(Scores(tmp_path / "scores.json", "a"))
    again = Scores(tmp_path / "scores.json", "a")
    assert run(again) == run(Scores(None, "a"))
    assert again.measured < calls
