"""Errors of the provider interface. A caller that catches `InferenceError` has caught everything a provider raises."""

from __future__ import annotations

from ..errors import EdgeError


class InferenceError(EdgeError):
    """A provider could not answer: base of the errors below, raised itself for faults of the server."""


class ProviderNotFoundError(InferenceError):
    """No provider goes by that name."""


class ProviderConnectionError(InferenceError):
    """The provider's server cannot be reached."""


class InferenceTimeoutError(InferenceError):
    """The answer did not come in the time the caller gave."""


class ModelNotFoundError(InferenceError):
    """No model goes by that name, or it was unloaded."""


class TaskNotSupportedError(InferenceError):
    """The provider or the model does not do this task."""


class InvalidRequestError(InferenceError):
    """The request is malformed: an image, prompt, tensor or setting is missing, contradictory or out of range."""


class ModelBusyError(InferenceError):
    """Too many requests wait for this model already; an addition of Pixano Edge to the interface."""
