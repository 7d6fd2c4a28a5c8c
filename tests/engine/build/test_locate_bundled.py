"""Engines that came with the bundle are found without any cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.engine.build.cache import EngineCache
from pixano_edge.engine.build.locate import find_engine
from pixano_edge.engine.build.pack import pack_engines
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.runtime.base import DeviceInfo
from tests.engine.bundle.sample import make_bundle
from tests.engine.bundle.test_engines import make_engine

from .keys import make_box

ORIN = DeviceInfo("Orin", "cuda", compute_capability="8.7", extra={"multiprocessors": "16"})


def test_bundled_engines_are_found(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "sample"))
    engines = [make_engine(bundle, tmp_path), make_engine(bundle, tmp_path, device_name="Orin NX")]
    bundle = Bundle.open(pack_engines(bundle, engines, tmp_path / "copy"))
    cache = EngineCache(tmp_path / "cache")
    found = find_engine(bundle, "mask_decoder", "fp16", ORIN, cache=cache, boxes=[make_box()])
    assert found == bundle.root / "engines" / engines[0].name
    with pytest.raises(DeviceError, match=r"10\.3\.0, this box has 10\.4") as caught:
        find_engine(bundle, "mask_decoder", "fp16", ORIN, cache=cache, boxes=[make_box(version="10.4")])
    assert "pixano-edge build" in caught.value.action
