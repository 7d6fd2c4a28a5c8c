"""The two clients that Pixano's authors publish, under one set of names."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

MODULES = {
    "pixano-inference 0.7.1": ("pixano_inference.client", "pixano_inference.schemas", "pixano_inference.schemas.v1"),
    "pixano-inference-client 0.1.0": ("pixano_inference_client",),
}


class Kit:
    """Classes of one package: `Kit(name).SegmentationRequest`."""

    def __init__(self, name: str) -> None:
        self.name = name
        reason = "needs pixano-edge[test]"
        self._modules = [pytest.importorskip(module, reason=reason) for module in MODULES[name]]

    @property
    def flat(self) -> bool:
        """Whether its tracking answers are three parallel lists, not frames with objects."""
        return self.name.startswith("pixano-inference-client")

    def __getattr__(self, name: str) -> Any:
        for module in self._modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(name)

    def keyframe(self, frame: int, **prompts: Any) -> Any:
        return self.TrackingKeyframeV1(frame_index=frame, prompts=self.TrackingPrompts(**prompts))


def submodule(name: str) -> Any:
    return importlib.import_module(name)
