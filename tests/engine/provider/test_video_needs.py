"""What a bundle that tracks declares, for images and for videos."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.engine.provider.families import VIDEOS
from pixano_edge.engine.provider.needs import declared_needs
from pixano_edge.engine.provider.settings import LoadOptions
from pixano_edge.engine.provider.video_needs import TRACKED_OBJECTS

from .fakes import add_bundle

MIB = 1 << 20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty engine cache."""
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path / "home"))


def test_a_bundle_that_tracks_needs_what_it_is_loaded_for(tmp_path: Path) -> None:
    path = add_bundle(tmp_path, "tracks", weights=500, tracks=True)  # five graphs of 100 bytes
    plain = add_bundle(tmp_path, "plain", weights=200)
    options = LoadOptions(cache_mb=3)
    images, videos = declared_needs(path, options), declared_needs(path, options, VIDEOS)
    assert images == declared_needs(plain, options)  # two graphs, nothing of tracking
    assert images.weights == 200
    assert videos.weights == 500
    assert (videos.bindings or 0) > (images.bindings or 0)
    one = 4 * (16 * 8 * 8 + 32 + 32 * 32)  # map, pointer and mask logits of the fakes' constants
    assert videos.caches == 3 * MIB + TRACKED_OBJECTS * 48 * one
    weights = 4 * 64 * (7 * 64 + 16 * 2)  # of one object's attention: queries by keys
    assert videos.activations == max(images.activations or 0, 2 * TRACKED_OBJECTS * weights)


def test_an_image_bundle_asked_to_track_declares_its_images(tmp_path: Path) -> None:
    """Opening it, which comes next, raises the error."""
    bundle = add_bundle(tmp_path, "plain", weights=100)
    assert declared_needs(bundle, LoadOptions(), VIDEOS) == declared_needs(bundle, LoadOptions())
