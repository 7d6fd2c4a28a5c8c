"""The bundle that ships with the package."""

from __future__ import annotations

from pathlib import Path

from pixano_edge.engine.bundle import Bundle

MAX_BYTES = 15_000_000


def test_the_demo_bundle_is_small_and_whole(demo_bundle: Path) -> None:
    size = sum(p.stat().st_size for p in demo_bundle.rglob("*") if p.is_file())
    assert size < MAX_BYTES, f"{size / 1e6:.1f} MB"
    bundle = Bundle.open(demo_bundle)  # verifies every hash, and refuses files that the manifest does not list
    assert "fp32" in bundle.variants()
    assert bundle.golden(), "without golden samples nobody can check it on their machine"
