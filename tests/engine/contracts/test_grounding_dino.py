"""Constants and graphs of Grounding DINO's contract."""

from __future__ import annotations

import json

import pytest

from pixano_edge.engine.build.profiles import profiles
from pixano_edge.engine.contracts import grounding_dino as contract
from pixano_edge.engine.contracts.grounding_dino import GroundingDinoConstants
from pixano_edge.engine.errors import ContractError
from pixano_edge.export.differences import sizes_to_try

FULL = GroundingDinoConstants()


def test_constants_survive_the_manifest() -> None:
    assert GroundingDinoConstants.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"mean": None}, "'mean' must be three"),
        ({"std": [0.1, 0.2, 0.0]}, "'std' must be three finite numbers above 0"),
        ({"num_queries": 900.0}, "'num_queries' must be a whole number"),
        ({"more": 1}, "'more' is unknown"),
        ({"shortest_edge": 2000}, "do not fit together"),
        ({"shortest_edge": 100}, "900 queries need an image of more than 100"),
        ({"num_queries": 4000, "shortest_edge": 1333}, "not from 1 to 3839"),
        ({"max_text_len": 3}, "holds no class"),
    ],
)
def test_constants_that_cannot_be(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ContractError, match=problem):
        GroundingDinoConstants.from_dict({**FULL.to_dict(), **change})
    missing = FULL.to_dict()
    del missing["dot_token"]
    with pytest.raises(ContractError, match="'dot_token' is missing"):
        GroundingDinoConstants.from_dict(missing)


def test_places_are_those_of_the_feature_maps() -> None:
    assert FULL.places(800, 1333) == 100 * 167 + 50 * 84 + 25 * 42 + 13 * 21
    assert FULL.places(1, 1) == 4
    assert FULL.places(FULL.min_edge, 800) >= FULL.num_queries > FULL.places(FULL.min_edge - 8, 800)


def test_every_profile_has_a_place_for_every_query() -> None:
    spec = contract.detector(FULL)
    for profile in spec.profiles:
        assert FULL.places(profile["H"][0], profile["W"][0]) >= FULL.num_queries
        for name, (low, typical, high) in profile.items():
            assert spec.ranges[name][0] <= low <= typical <= high <= spec.ranges[name][2]
    assert len(profiles(spec)) == 2
    for sizes in sizes_to_try(spec):
        assert FULL.places(sizes["H"], sizes["W"]) >= FULL.num_queries
