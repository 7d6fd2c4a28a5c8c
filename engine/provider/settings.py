"""How a model is loaded: the accepted keys of `ModelConfig.config` and `processor_config`, checked."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..bundle.names import PRECISIONS
from ..runtime.factory import BACKENDS
from .errors import InvalidRequestError

_PRECISIONS = ("auto", *PRECISIONS)

DEFAULT_CACHE_MB = 256.0
DEFAULT_MAX_PIXELS = 100_000_000
DEFAULT_MAX_BYTES = 50 * 1024 * 1024
DEFAULT_MAX_VIDEO_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class LoadOptions:
    """Settings of one model; two loads are the same when these and the bundle are.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` (the GPU with the most free memory) or ``cuda:N``.
        backend: ``auto``, ``onnxruntime`` or ``tensorrt``.
        precision: ``auto`` or one of the manifest's `PRECISIONS`.
        threads: Threads of one inference; None lets the back end choose.
        cache_mb: Budget of the model's cache in MiB, of embeddings or of a detector's features of text and images; 0
            turns it off.
        verify: Check every file of the bundle against its SHA-256 at opening.
        max_image_pixels: Images with more pixels are refused before they are decoded.
        max_image_bytes: Larger encoded images are refused.
        max_video_bytes: Larger video files are refused.
        context: Tokens of prompt and answer together that a model for text has room for; None: 4096, or what it has.
        warm_up: Run it once after a load that no request waits for, see `warmup`; off, it is ready sooner and its first
            request is slower.
    """

    device: str = "auto"
    backend: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    cache_mb: float = DEFAULT_CACHE_MB
    verify: bool = True
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    max_image_bytes: int = DEFAULT_MAX_BYTES
    max_video_bytes: int = DEFAULT_MAX_VIDEO_BYTES
    context: int | None = None
    warm_up: bool = True

    def updated(self, config: Mapping[str, Any], processor_config: Mapping[str, Any]) -> LoadOptions:
        """These settings with a request's own on top.

        Args:
            config: Keys `CONFIG_KEYS`; None keeps a setting.
            processor_config: Keys `PROCESSOR_KEYS`; None keeps a setting. Limits can be lowered, not raised.

        Raises:
            InvalidRequestError: Unknown key (with the accepted ones) or a value out of range.
        """
        changes = _checked("config", CONFIG_KEYS, config)
        limits = _checked("processor_config", PROCESSOR_KEYS, processor_config)
        for key, value in limits.items():
            if value > getattr(self, key):
                raise InvalidRequestError(
                    f"processor_config['{key}'] is {value}, above this server's {getattr(self, key)}.",
                    "Lower it, or start the provider with a higher limit.",
                )
        return replace(self, **changes, **limits)

    def check(self) -> LoadOptions:
        """Checks every setting, for values that did not come through `updated`; returns itself."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        _checked("EdgeProvider", {**CONFIG_KEYS, **PROCESSOR_KEYS}, values)
        return self


def _device(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value) is not None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


_Rule = tuple[Callable[[Any], bool], str]

CONFIG_KEYS: Mapping[str, _Rule] = {
    "device": (_device, "'auto', 'cpu', 'cuda' or 'cuda:N'"),
    "backend": (lambda v: v in BACKENDS, f"one of {', '.join(BACKENDS)}"),
    "precision": (lambda v: v in _PRECISIONS, f"one of {', '.join(_PRECISIONS)}"),
    "threads": (_whole, "a whole number above 0"),
    "cache_mb": (_size, "MiB, 0 or more"),
    "verify": (lambda v: isinstance(v, bool), "true or false"),
    "context": (_whole, "a whole number of tokens above 0"),
    "warm_up": (lambda v: isinstance(v, bool), "true or false"),
}
PROCESSOR_KEYS: Mapping[str, _Rule] = {
    "max_image_pixels": (_whole, "a whole number above 0"),
    "max_image_bytes": (_whole, "a whole number above 0"),
    "max_video_bytes": (_whole, "a whole number above 0"),
}


def _checked(where: str, rules: Mapping[str, _Rule], values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise InvalidRequestError(f"{where} must be a mapping, got {type(values).__name__}.", "Pass {} for defaults.")
    unknown = sorted(str(k) for k in values if k not in rules)
    if unknown:
        raise InvalidRequestError(f"{where} has unknown keys: {', '.join(unknown)}.", f"Accepted: {', '.join(rules)}.")
    for key, value in values.items():
        fits, meaning = rules[key]
        if value is not None and not fits(value):
            raise InvalidRequestError(f"{where}['{key}'] must be {meaning}, got {value!r}.", "Correct the value.")
    return {k: v for k, v in values.items() if v is not None}


Limit = int | float
"""An ``int`` is bytes, a ``float`` a share (above 0, at most 1) of the device's whole memory."""
Limits = Mapping[str, Limit]
"""Limit by device: ``cpu``, ``cuda:N``, ``cuda`` (GPUs without one of their own) or ``*`` (all without one)."""

MEMORY_VARIABLE = "PIXANO_EDGE_MEMORY"

_LIMIT_FORMS = "bytes, '6GiB', '500MB', '80%', a share such as 0.8, or one of them per device: 'cpu=4GiB,cuda:0=90%'"
_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def read_limits(value: Any, environ: Mapping[str, str] | None = None) -> dict[str, Limit]:
    """How much memory the models may take per device.

    Args:
        value: One limit for every device, a mapping from device to limit, or text as in ``PIXANO_EDGE_MEMORY``;
            None takes that variable. Limits are bytes (int), shares of the device's memory (float) or text such as
            ``6GiB``, ``500MB`` or ``80%``.
        environ: Environment; the process's own when None.

    Raises:
        InvalidRequestError: Not of that form, a share outside 0 to 1, or an unknown device.
    """
    where = "memory_limits"
    if value is None:
        where, value = MEMORY_VARIABLE, (os.environ if environ is None else environ).get(MEMORY_VARIABLE, "").strip()
        if not value:
            return {}
    if isinstance(value, str) and "=" in value:
        pairs = [part.partition("=") for part in value.split(",")]
        value = {name.strip(): limit for name, _, limit in pairs}
    given = value if isinstance(value, Mapping) else {"*": value}
    for name in given:
        if not isinstance(name, str) or not re.fullmatch(r"\*|cpu|cuda(:\d{1,3})?", name):
            raise InvalidRequestError(f"{where} names no device: {name!r}.", "Use cpu, cuda:N, cuda or *.")
    return {name: _limit(where, limit) for name, limit in given.items()}


def _limit(where: str, value: Any) -> Limit:
    if _whole(value):
        return int(value)
    share: float | None = value if isinstance(value, float) else None
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[a-z]*)", value.strip().lower())
        number, unit = (float(match[1]), match[2]) if match else (0.0, "?")
        if unit in _UNITS and (unit or number > 1):
            size = int(number * _UNITS[unit])
            if size > 0:
                return size
        elif unit == "%":
            share = number / 100
        elif not unit:
            share = number
    if share is None or not 0 < share <= 1:
        raise InvalidRequestError(f"{where} has {value!r}, which is no amount of memory.", f"Use {_LIMIT_FORMS}.")
    return share
