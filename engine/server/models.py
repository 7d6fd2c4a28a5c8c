"""Models on the wire: the list, what each can be asked, loading one and unloading it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic.alias_generators import to_snake

from ..errors import EdgeError
from ..provider.errors import InvalidRequestError, ModelNotFoundError, OutOfMemoryError, TaskNotSupportedError
from ..provider.families import FAMILIES
from ..provider.settings import CONFIG_KEYS, PROCESSOR_KEYS
from ..provider.states import NOT_STARTED, RUNNING
from ..provider.types import ModelConfig, ModelInfo
from . import schemas
from .answers import CAPABILITIES
from .errors import ApiError
from .state import Server

LOAD_TIMEOUT_S = 600.0

CLASSES: Mapping[str, str] = {name: task for family in FAMILIES.values() for task, name in family.items()}
"""``modelClass`` -> task."""

_INTERFACES: Mapping[str, Mapping[str, Any]] = {
    "segmentation": {
        "prompts": ["points", "box", "mask"],
        "multimask": True,
        "embeddings": True,
        "outputs": ["mask", "score", "logits"],
    },
    "tracking": {
        "prompts": ["points", "box", "mask"],
        "promptFree": False,
        "classes": "none",
        "classNames": None,
        "thresholds": [],
        "interval": True,
        "outputs": ["mask", "box", "score"],
    },
    "vlm": {"prompt": ["text", "messages"], "images": {"min": 0, "max": None}},
}
_THRESHOLDS = {"GroundingDinoDetector": ["box", "text"]}


def interface(capability: str, model_class: str | None) -> dict[str, Any] | None:
    """How a model is called, in the words of Pixano's server and no others: its client refuses a whole list for one
    word that it does not know."""
    if capability == "detection":
        found: Mapping[str, Any] = {
            "classes": "open",
            "classNames": None,
            "thresholds": _THRESHOLDS.get(model_class or "", ["box"]),
            "outputs": ["box", "score", "class"],
        }
    elif capability in _INTERFACES:
        found = _INTERFACES[capability]
    else:
        return None
    return {"capability": capability, **found}


def entry(info: ModelInfo) -> dict[str, Any]:
    """One model. One that is offered and not loaded yet counts as running: it answers, only later."""
    capability = CAPABILITIES[info.task]
    return {
        "name": info.name,
        "capability": capability,
        "modelClass": info.model_class or "",
        "modelPath": info.model_path,
        "status": RUNNING if info.status in (None, NOT_STARTED) else info.status,
        "interface": interface(capability, info.model_class),
        "loaded": info.status == RUNNING,
    }


async def model_entries(server: Server) -> list[dict[str, Any]]:
    """Every model that requests may name; loads nothing, reads a manifest only when its file changed."""
    return [entry(info) for info in await server.provider.list_models() if info.task in CAPABILITIES]


def read_config(wire: schemas.DeployRequest, allowed: Callable[[str], str]) -> ModelConfig:
    """What a request to load a model asks for.

    Args:
        wire: The request.
        allowed: Turns a path into one that may be loaded; see `BundlePaths`.

    Raises:
        ApiError: 422.
    """
    task = CLASSES.get(wire.model_class)
    if task is None:
        raise _unfit(("modelClass",), f"there is no class '{wire.model_class[:60]}' here; known: {', '.join(CLASSES)}")
    params = {to_snake(key): value for key, value in wire.model_params.items()}
    path = params.pop("path", None)
    if path is not None and not isinstance(path, str):
        raise _unfit(("modelParams", "path"), "must be text: a bundle's name or path")
    name = wire.name or (Path(path).name.removesuffix(".pxe") if path else None)
    if not name:
        raise _unfit(("name",), "needed where modelParams has no path")
    unknown = [key for key in params if key not in CONFIG_KEYS and key not in PROCESSOR_KEYS]
    if unknown:
        known = ("path", *CONFIG_KEYS, *PROCESSOR_KEYS)
        raise _unfit(("modelParams", str(unknown[0])[:60]), f"unknown; accepted: {', '.join(known)}")
    deployment = {to_snake(key): value for key, value in wire.deployment.items()}
    gpus = deployment.get("num_gpus")
    if "device" not in params and isinstance(gpus, int | float) and gpus > 0:
        params["device"] = "cuda"
    return ModelConfig(
        name=name,
        task=task,
        path=None if path is None else allowed(path),
        config={key: value for key, value in params.items() if key in CONFIG_KEYS},
        processor_config={key: value for key, value in params.items() if key in PROCESSOR_KEYS},
    )


class BundlePaths:
    """Which bundles may be loaded by path: names of the store, and what lies below the store or the allowed folders.

    Args:
        roots: Folders.
        stored: Folder of a bundle of the store by name.
    """

    def __init__(self, roots: Iterable[Path], stored: Callable[[str], Path]) -> None:
        self._roots = [Path(os.path.realpath(root.expanduser())) for root in roots]
        self._stored = stored

    def __call__(self, path: str) -> str:
        """The bundle's real path, with links followed.

        Raises:
            ApiError: 422: not a path, or outside the folders.
            ModelNotFoundError: No bundle of that name.
        """
        if not path.startswith(("~", ".")) and os.sep not in path:
            return str(self._stored(path))
        try:
            real = Path(os.path.realpath(Path(path).expanduser(), strict=True))
        except (OSError, ValueError, RuntimeError):
            real = None
        if real is None or not any(real.is_relative_to(root) for root in self._roots):
            # One message for both, so that nobody learns which files exist.
            raise _unfit(("modelParams", "path"), "neither a bundle of the store nor below the server's bundle_roots")
        return str(real)


def _unfit(where: tuple[str, ...], message: str) -> ApiError:
    return ApiError(422, [{"type": "value_error", "loc": ["body", *where], "msg": message}])


async def deploy(server: Server, config: ModelConfig) -> dict[str, Any]:
    """Loads a model and waits for it.

    Returns:
        Its entry in the list.

    Raises:
        ApiError: 404 no such bundle, 409 it is there already or there is no room, 422 it cannot be loaded so.
        EdgeError: The server's own fault.
    """
    if any(state.name == config.name for state in server.provider.model_states()):
        raise ApiError(409, f"Model '{config.name}' is loaded already. Delete it first, or choose another name.")
    try:
        await server.provider.instantiate_model("edge", config, LOAD_TIMEOUT_S)
    except ModelNotFoundError as error:
        raise ApiError(404, str(error)) from error
    except OutOfMemoryError as error:
        raise ApiError(409, str(error)) from error
    except (InvalidRequestError, TaskNotSupportedError) as error:
        raise _unfit(("modelParams",), str(error)) from error
    task = CAPABILITIES[config.task]
    found = [one for one in await model_entries(server) if one["name"] == config.name]
    if not found:
        raise EdgeError(f"Model '{config.name}' was unloaded at once.", "Load it again.")
    return next((one for one in found if one["capability"] == task), found[0])
