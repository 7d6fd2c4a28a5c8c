"""The one error base class of Pixano Edge and its direct children.

Every message says what went wrong and what to do next; `action` holds the second half alone so that
a command or a server can show it apart.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Base of every error that Pixano Edge raises on purpose.

    Args:
        message: What went wrong, with the values that matter.
        action: What the user can do about it, in the imperative.
    """

    def __init__(self, message: str, action: str = "") -> None:
        self.message = message
        self.action = action
        super().__init__(f"{message} {action}".strip())


class MissingDependencyError(EdgeError):
    """A library of an optional extra is absent; `action` holds the install line."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        self.module = module
        self.extra = extra
        super().__init__(
            f"{purpose} needs the Python module '{module}', which is not installed.",
            f"Install it with: pip install 'pixano-edge[{extra}]'",
        )


class BundleError(EdgeError):
    """A bundle cannot be opened, read, written, packed or unpacked."""


class ContractError(EdgeError):
    """A tensor, graph or constant does not match the family's contract."""


class DeviceError(EdgeError):
    """A device, back end or execution provider is missing, did not load or failed."""


class DeviceMemoryError(DeviceError):
    """A device has not enough free memory for a buffer, a session or a run; what was loaded before still works."""


class ImageError(EdgeError):
    """An image cannot be decoded or is outside the limits."""


class PromptError(EdgeError):
    """A prompt (points, labels, boxes, masks, embeddings) is malformed."""


class ExportError(EdgeError):
    """A checkpoint cannot be loaded, exported, or misses the parity bar."""


class CalibrationError(EdgeError):
    """A graph cannot be quantised with the data at hand, or a variant misses its budget."""


class BuildError(EdgeError):
    """TensorRT does not take a graph, or building its engine crashed or ran out of time or memory."""


class CancelledError(EdgeError):
    """Work was stopped because its owner asked for it or hung up."""
