"""Versions of libraries that come as one of several wheels or from the system."""

from __future__ import annotations

import importlib.util

import pytest

from pixano_edge.engine import libraries
from pixano_edge.engine.libraries import SYSTEM, engine_versions, module_version


def test_versions_name_the_wheel_that_is_there() -> None:
    wheels = {"numpy": "2.0", "pillow": "12", "onnxruntime-gpu": "1.30", "opencv-python": "5.0"}
    found = engine_versions(wheels.get)
    assert {k: found[k] for k in wheels} == wheels
    assert found["pixano-edge"] == "unknown"
    assert found["python"]
    assert "onnxruntime" not in found
    assert "opencv-python-headless" not in found


def test_system_builds_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine_versions({"numpy": "2.0"}.get)  # both modules are importable here, no wheel is
    assert (found["onnxruntime"], found["opencv"]) == (SYSTEM, SYSTEM)
    assert module_version("cv2", libraries.OPENCV_WHEELS, {}.get) == SYSTEM
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = engine_versions({"numpy": "2.0"}.get)
    assert set(found) == {"pixano-edge", "python", "numpy"}
    assert module_version("cv2", libraries.OPENCV_WHEELS, {}.get) is None
