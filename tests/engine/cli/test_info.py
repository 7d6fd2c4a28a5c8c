"""`pixano-edge info BUNDLE`: what a bundle can do, and all of its graphs opened."""

from __future__ import annotations

from pathlib import Path

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.info import bundle_facts
from pixano_edge.engine.models.sam2_video.model import VIDEO_GRAPHS


def test_a_bundle_that_tracks(tracking_bundle: Path) -> None:
    facts = bundle_facts(Bundle.open(tracking_bundle), "cpu", "auto", "auto")
    assert facts["tasks"] == ["image_mask_generation", "video_mask_generation"]
    assert facts["engine_error"] is None
    assert set(VIDEO_GRAPHS) <= set(facts["engine"])


def test_a_bundle_for_images(tiny_bundle: Path) -> None:
    facts = bundle_facts(Bundle.open(tiny_bundle), "cpu", "auto", "auto")
    assert facts["tasks"] == ["image_mask_generation"]
    assert facts["engine"]["image_encoder"]
