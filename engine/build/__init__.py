"""TensorRT engines from a bundle's graphs: keys, cache, builder, layer report, look-up and packing.

Needs numpy and a TensorRT only, so that a Jetson builds for itself: `tensorrt` 10.x or 11.x (a wheel, or JetPack's
own) where the GPU is, or TensorRT for RTX, which builds for listed GPUs on a machine without any. TensorRT is loaded
in child processes alone. The engine file's layout is described in `pixano_edge.engine.runtime.engine_file`.
"""

from __future__ import annotations

from .cache import EngineCache
from .key import Box, EngineKey
from .locate import find_engine

__all__ = ["Box", "EngineCache", "EngineKey", "find_engine"]
