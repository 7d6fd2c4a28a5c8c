"""Loads that fail: what the caller gets, what stays behind, and what is tried again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.errors import BundleError, DeviceError, MissingDependencyError
from pixano_edge.engine.provider import (
    EdgeProvider,
    ImageMaskGenerationInput,
    InferenceError,
    InvalidRequestError,
    ModelConfig,
    OutOfMemoryError,
    catalogue,
)
from pixano_edge.engine.provider.worker import ModelWorker

from .fakes import FakeOpener, data_uri, png

_IMAGE = data_uri(png())


def _config() -> ModelConfig:
    return ModelConfig("alpha", "image_mask_generation")


def _request() -> ImageMaskGenerationInput:
    return ImageMaskGenerationInput(image=_IMAGE, model="alpha", points=[[[3, 4]]])


@pytest.mark.parametrize(
    ("raised", "when_asked", "on_demand"),
    [
        (BundleError("damaged", "copy again"), InvalidRequestError, InferenceError),
        (DeviceError("no cuda", "use cpu"), InvalidRequestError, InferenceError),
        (MissingDependencyError("onnxruntime", "cpu", "Running"), InferenceError, InferenceError),
        (MemoryError(), OutOfMemoryError, OutOfMemoryError),
    ],
)
async def test_failed_loads_register_nothing(
    provider: EdgeProvider, opener: FakeOpener, root: Path, raised: Exception, when_asked: type, on_demand: type
) -> None:
    opener.error = raised
    with pytest.raises(InferenceError) as caught:
        await provider.instantiate_model("edge", _config())
    assert type(caught.value) is when_asked
    with pytest.raises(InferenceError) as caught:
        await provider.image_mask_generation(_request())
    assert type(caught.value) is on_demand
    assert (await provider.get_server_info()).models_loaded == 0
    opener.error = None
    (root / "alpha" / "manifest.json").touch()  # as copying it again does
    await provider.image_mask_generation(_request())


async def test_a_broken_bundle_is_tried_once_until_its_files_change(
    provider: EdgeProvider, opener: FakeOpener, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []
    start = provider._table.start
    monkeypatch.setattr(provider._table, "start", lambda name, *a: tries.append(name) or start(name, *a))
    weights = root / "alpha" / "weights.onnx"
    weights.write_bytes(b"damaged")
    opener.error = BundleError("weights.onnx is damaged", "copy again")
    for _ in range(3):
        with pytest.raises(InferenceError, match="damaged"):
            await provider.image_mask_generation(_request())
    assert tries == ["alpha"]
    with pytest.raises(InvalidRequestError):  # an administrator's request always tries
        await provider.instantiate_model("edge", _config())
    opener.error = None
    weights.write_bytes(b"repaired, and the manifest was not touched")
    await provider.image_mask_generation(_request())
    assert tries == ["alpha", "alpha", "alpha"]


@pytest.mark.parametrize("error", [DeviceError("busy", "wait"), MemoryError(), OSError(24, "Too many open files")])
async def test_what_may_pass_is_tried_again(provider: EdgeProvider, opener: FakeOpener, error: Exception) -> None:
    opener.error = error
    with pytest.raises(InferenceError):
        await provider.image_mask_generation(_request())
    opener.error = None
    await provider.image_mask_generation(_request())


async def test_what_the_system_refuses_is_an_inference_error(
    provider: EdgeProvider, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener.error = OSError(28, "No space left on device")
    for call in (provider.image_mask_generation(_request()), provider.instantiate_model("edge", _config())):
        with pytest.raises(InferenceError, match="No space left on device") as caught:
            await call
        assert "free space" in caught.value.action
    monkeypatch.setattr(catalogue, "_stamp", lambda path: path.parent.joinpath("removed meanwhile").stat())
    with pytest.raises(InferenceError, match="removed meanwhile") as caught:
        await provider.instantiate_model("edge", _config())
    assert caught.value.action


async def test_a_load_that_gets_no_thread_leaves_nothing_behind(
    provider: EdgeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(ModelWorker, "submit", refuse)
        with pytest.raises(InferenceError, match="can't start new thread"):
            await provider.image_mask_generation(_request(), timeout=5)
    assert provider._table.get("alpha") is None
    await provider.image_mask_generation(_request())


async def test_nobody_finds_a_model_before_its_load_is_queued(
    provider: EdgeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    submit = ModelWorker.submit

    def slow_submit(self: ModelWorker, *args: Any) -> Any:
        looking = threading.Thread(target=lambda: found.append(provider._table.get("alpha")))
        looking.start()
        looking.join(0.2)  # with the slot out already, a deletion could come in here, before the load
        assert found == []
        result = submit(self, *args)
        monkeypatch.setattr(ModelWorker, "submit", submit)
        return result

    monkeypatch.setattr(ModelWorker, "submit", slow_submit)
    await provider.instantiate_model("edge", _config())


def test_bad_settings_are_refused_at_once() -> None:
    with pytest.raises(InvalidRequestError, match="precision"):
        EdgeProvider(precision="half")
