"""Which extras bring the libraries that exporting needs."""

from __future__ import annotations

from pixano_edge.engine.errors import MissingDependencyError

EXTRA = "export"
WITH_RUNTIME = "export,cpu"
"""`export` has no ONNX Runtime, since its wheels overwrite each other; `cpu` brings the one that fits everywhere."""


def missing(module: str, purpose: str) -> MissingDependencyError:
    """The error for an absent module; its action is the install line that brings it.

    Args:
        module: Name of the module that cannot be imported.
        purpose: What needs it, as the start of a sentence.
    """
    return MissingDependencyError(module, WITH_RUNTIME if module == "onnxruntime" else EXTRA, purpose)
