"""The contract of OWLv2 and OWL-ViT."""

from __future__ import annotations

import json

import pytest

from pixano_edge.engine.contracts import owlv2
from pixano_edge.engine.contracts.owlv2 import OwlConstants
from pixano_edge.engine.errors import ContractError


@pytest.mark.parametrize(
    ("family", "size", "patch", "queries"),
    [("owlv2", 960, 16, 3600), ("owlv2", 1008, 14, 5184), ("owlvit", 768, 32, 576)],
)
def test_shapes_follow_the_constants(family: str, size: int, patch: int, queries: int) -> None:
    graphs = owlv2.graphs(OwlConstants(family=family, image_size=size, patch_size=patch, embed_dim=768))
    image, text = graphs[owlv2.IMAGE_ENCODER], graphs[owlv2.TEXT_ENCODER]
    assert image.inputs[0].dims == (1, 3, size, size)
    assert image.tensor(owlv2.BOXES).dims == (1, queries, 4)
    assert image.tensor(owlv2.CLASS_EMBEDS).dims == (1, queries, 768)
    assert (owlv2.OBJECTNESS in [t.name for t in image.outputs]) == (family == "owlv2")
    assert text.inputs[0].dims == ("C", 16)
    assert text.outputs[0].dims == ("C", 768)
    assert text.ranges["C"] == (1, 8, owlv2.CHUNK)


def test_round_trip_through_json() -> None:
    constants = OwlConstants(family="owlvit", image_size=64, patch_size=8, end_token=99)
    assert OwlConstants.from_dict(json.loads(json.dumps(constants.to_dict()))) == constants


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "sam2"}, "family"),
        ({"embed_dim": 0}, "embed_dim"),
        ({"image_size": -1}, "image_size"),
        ({"std": [1, 1, 0]}, "std"),
        ({"mean": [1, 1]}, "mean"),
        ({"end_token": 1.5}, "end_token"),
        ({"more": 1}, "'more' is unknown"),
        ({"patch_size": 2000}, "do not fit into"),
        ({"max_tokens": 2}, "hold no class name"),
    ],
)
def test_wrong_constants(change: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        OwlConstants.from_dict({**OwlConstants().to_dict(), **change})
    missing = OwlConstants().to_dict()
    del missing["family"]
    with pytest.raises(ContractError, match="'family' is missing"):
        OwlConstants.from_dict(missing)
