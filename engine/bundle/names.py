"""Names and limits that also those need who read no manifest: without pydantic, which takes long to import."""

from __future__ import annotations

from typing import Literal, get_args

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""Names of bundles, and of models in the provider; no path can be written with it."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""From full to reduced."""
