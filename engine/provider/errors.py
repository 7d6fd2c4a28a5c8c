"""Errors of the provider interface. A caller that catches `InferenceError` has caught everything a provider raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CancelledError, ContractError, EdgeError, ImageError, PromptError


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


class JobNotFoundError(InferenceError):
    """No job goes by that id, or it was forgotten after its time; an addition of Pixano Edge to the interface."""


class JobStoreError(InferenceError):
    """Jobs cannot be kept: the disk is full, or the file of jobs is damaged, newer, or another program's.

    An addition of Pixano Edge to the interface. It fails the job, not the provider.
    """


class JobEndedError(InferenceError):
    """The job that somebody watches failed or was canceled; the message is its detail, which its status tells, too.

    An addition of Pixano Edge to the interface.
    """


class ModelBusyError(InferenceError):
    """Too many requests wait for this model already; an addition of Pixano Edge to the interface."""


class OutOfMemoryError(InferenceError):
    """A device has no memory left for a model or a request, in the budget or for real; the message has the numbers.

    An addition of Pixano Edge to the interface. Other models go on answering.
    """


class MissingPixanoError(EdgeError, ImportError):
    """Pixano, or its inference server, is not installed where a module of this project builds on it."""


@contextmanager
def provider_errors(invalid: tuple[type[EdgeError], ...] = ()) -> Iterator[None]:
    """Turns the engine's errors into the provider's.

    Args:
        invalid: More engine errors that are the request's fault here.
    """
    request_faults: tuple[type[EdgeError], ...] = (ImageError, PromptError, ContractError, *invalid)
    try:
        yield
    except InferenceError:
        raise
    except CancelledError as error:
        raise ModelNotFoundError(
            "The model was unloaded before it could answer.", "Load it again with instantiate_model."
        ) from error
    except request_faults as error:
        raise InvalidRequestError(error.message, error.action) from error
    except EdgeError as error:
        raise InferenceError(error.message, error.action) from error
    except MemoryError as error:
        raise OutOfMemoryError(
            "Not enough memory for this request.", "Use a smaller image or fewer prompts."
        ) from error
    except OSError as error:
        # A full temporary folder, a bundle that is replaced while it is looked up, too many open files.
        raise InferenceError(
            f"The system refused: {error}.",
            "Check free space in the temporary folder and the rights on the model store, then try again.",
        ) from error
