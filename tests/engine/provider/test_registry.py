"""The registry, the abstract class and the method table of the contract."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.provider import (
    EdgeProvider,
    InferenceError,
    InferenceProvider,
    ModelConfig,
    ProviderNotFoundError,
    TaskNotSupportedError,
    errors,
    get_provider,
    is_provider_registered,
    list_providers,
    register_provider,
    registry,
)

_ABSTRACT = {
    "name",
    "get_capabilities",
    "list_models",
    "get_server_info",
    "image_mask_generation",
    "video_mask_generation",
    "image_zero_shot_detection",
    "text_image_conditional_generation",
}
# method -> parameters with defaults, for the seed interface (contract section 1) and pixano 0.8 (section 2)
_SEED = {
    "get_capabilities": {},
    "list_models": {"task": None},
    "get_server_info": {},
    "instantiate_model": {"provider": "required", "config": "required", "timeout": 60},
    "delete_model": {"model_name": "required"},
    "image_mask_generation": {"input_data": "required", "timeout": 60.0},
    "video_mask_generation": {"input_data": "required", "timeout": 120.0},
    "image_zero_shot_detection": {"input_data": "required", "timeout": 60.0},
    "text_image_conditional_generation": {"input_data": "required", "timeout": 60.0},
}
_NEWER = {
    "list_models": {"task": None},
    "get_server_info": {},
    "image_mask_generation": {"input_data": "required", "timeout": 60.0},
    "video_mask_generation": {"input_data": "required", "timeout": 120.0},
    "submit_video_mask_generation_job": {"input_data": "required", "timeout": 30.0},
    "get_video_mask_generation_job": {"job_id": "required", "timeout": 30.0},
    "cancel_video_mask_generation_job": {"job_id": "required", "timeout": 30.0},
    "detection": {"input_data": "required", "timeout": 60.0},
    "vlm": {"input_data": "required", "timeout": 60.0},
    "embedding": {"input_data": "required", "timeout": 60.0},
    "close": {},
}


class Minimal(InferenceProvider):
    """Only what is abstract."""

    name = "minimal"

    async def _absent(self, *_: object, **__: object) -> None: ...

    get_capabilities = list_models = get_server_info = _absent  # type: ignore[assignment]
    image_mask_generation = video_mask_generation = _absent  # type: ignore[assignment]
    image_zero_shot_detection = text_image_conditional_generation = _absent  # type: ignore[assignment]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PROVIDERS", dict(registry._PROVIDERS))


def _parameters(cls: type, method: str) -> dict[str, object]:
    parameters = list(inspect.signature(getattr(cls, method)).parameters.values())[1:]
    return {p.name: "required" if p.default is p.empty else p.default for p in parameters}


def test_abstract_members() -> None:
    assert InferenceProvider.__abstractmethods__ == _ABSTRACT
    with pytest.raises(TypeError):
        InferenceProvider()  # type: ignore[abstract]


@pytest.mark.parametrize("method", list(_SEED))
def test_seed_signatures(method: str) -> None:
    for cls in (InferenceProvider, EdgeProvider):
        assert _parameters(cls, method) == _SEED[method]
        assert inspect.iscoroutinefunction(getattr(cls, method))


@pytest.mark.parametrize("method", list(_NEWER))
def test_signatures_of_pixano_08(method: str) -> None:
    assert _parameters(EdgeProvider, method) == _NEWER[method]
    assert inspect.iscoroutinefunction(getattr(EdgeProvider, method))


async def test_deployment_defaults() -> None:
    text = "Model deployment is managed by the server administrator"
    with pytest.raises(TaskNotSupportedError, match=text):
        await Minimal().instantiate_model("x", ModelConfig("a", "b"))
    with pytest.raises(TaskNotSupportedError, match=text):
        await Minimal().delete_model("a")


def test_errors() -> None:
    named = (
        "ProviderNotFoundError",
        "ProviderConnectionError",
        "InferenceTimeoutError",
        "ModelNotFoundError",
        "TaskNotSupportedError",
        "InvalidRequestError",
    )
    for name in named:
        assert issubclass(getattr(errors, name), InferenceError)
    assert issubclass(InferenceError, EdgeError)
    assert str(InferenceError("no", "do it")) == "no do it"


def test_edge_is_registered_and_takes_what_pixano_passes() -> None:
    assert "edge" in list_providers()
    made = get_provider("edge", url="http://localhost:1", api_key="k")
    assert isinstance(made, EdgeProvider)
    assert made.name == "edge"


@pytest.mark.usefixtures("clean")
def test_register_get_replace() -> None:
    assert not is_provider_registered("mini")
    assert register_provider("mini")(Minimal) is Minimal
    assert is_provider_registered("mini")
    assert type(get_provider("mini")) is Minimal
    other = type("Other", (Minimal,), {})
    register_provider("mini")(other)
    assert type(get_provider("mini")) is other
    assert list_providers() == sorted(list_providers())


def test_registry_refusals() -> None:
    with pytest.raises(TypeError, match="InferenceProvider"):
        register_provider("bad")(dict)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="InferenceProvider"):
        register_provider("bad")(lambda: None)  # type: ignore[type-var]
    assert not is_provider_registered("bad")
    with pytest.raises(ProviderNotFoundError, match=r"'nope'.*edge"):
        get_provider("nope")


def test_importing_the_provider_loads_no_decoder_of_videos() -> None:
    """`doctor` must run where OpenCV does not load."""
    code = "import sys, pixano_edge.engine.provider; sys.exit('cv2' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
