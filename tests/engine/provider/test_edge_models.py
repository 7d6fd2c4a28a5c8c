"""Loading, listing and unloading with a fake opener."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.provider import (
    EdgeProvider,
    ImageMaskGenerationInput,
    InferenceError,
    InferenceTask,
    InferenceTimeoutError,
    InvalidRequestError,
    ModelConfig,
    ModelNotFoundError,
    ProviderNotFoundError,
    TaskNotSupportedError,
    edge,
)
from pixano_edge.engine.provider.hardware import Hardware
from pixano_edge.engine.runtime.base import DeviceInfo

from .fakes import FakeOpener, add_bundle, data_uri, make_provider, png, until

_TASK = "image_mask_generation"
_IMAGE = data_uri(png())


def _config(name: str = "alpha", path: Any = None, task: str = _TASK, **config: Any) -> ModelConfig:
    return ModelConfig(name, task, path, config)


def _request(model: str = "alpha") -> ImageMaskGenerationInput:
    return ImageMaskGenerationInput(image=_IMAGE, model=model, points=[[[3, 4]]])


async def _names(provider: EdgeProvider) -> list[str]:
    return [m.name for m in await provider.list_models()]


async def test_listing_loads_nothing(provider: EdgeProvider, opener: FakeOpener, root: Path) -> None:
    add_bundle(root, "later-family", family="owl")
    models = await provider.list_models()
    assert [(m.name, m.task, m.model_path, m.model_class, m.provider) for m in models] == [
        ("alpha", _TASK, "test/alpha", "Sam2ImagePredictor", "edge"),
        ("beta", _TASK, "test/beta", "Sam2ImagePredictor", "edge"),
    ]
    assert len(await provider.list_models(InferenceTask.MASK_GENERATION)) == 2
    assert await provider.list_models(InferenceTask.VIDEO_MASK_GENERATION) == []
    other = Enum("other", {"MASKS": _TASK})
    assert len(await provider.list_models(task=other.MASKS)) == 2  # type: ignore[attr-defined]
    assert opener.opened == []


async def test_first_request_loads_and_later_ones_share(provider: EdgeProvider, opener: FakeOpener) -> None:
    await asyncio.gather(*(provider.image_mask_generation(_request()) for _ in range(5)))
    assert len(opener.opened) == 1
    await provider.image_mask_generation(_request("beta"))
    assert len(opener.opened) == 2


async def test_without_autoload_only_loaded_models_count(root: Path, opener: FakeOpener) -> None:
    provider = make_provider(root, opener, autoload=False)
    assert await _names(provider) == []
    with pytest.raises(ModelNotFoundError, match="Known: none"):
        await provider.image_mask_generation(_request())
    await provider.instantiate_model("edge", _config())
    assert await _names(provider) == ["alpha"]
    await provider.image_mask_generation(_request())
    await provider.close()


@pytest.mark.parametrize("name", ["edge", "pixano-edge"])
async def test_accepted_provider_names(provider: EdgeProvider, name: str) -> None:
    await provider.instantiate_model(provider=name, config=_config(), timeout=20)
    assert (await provider.get_server_info()).models_loaded == 1


@pytest.mark.parametrize("name", ["transformers", "sam2", "", None])
async def test_other_provider_names(provider: EdgeProvider, name: Any) -> None:
    with pytest.raises(ProviderNotFoundError, match="Accepted: edge, pixano-edge"):
        await provider.instantiate_model(name, _config())


async def test_config_reaches_the_model(provider: EdgeProvider, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        "mine", _TASK, root / "beta",
        {"device": "cpu", "backend": "onnxruntime", "precision": "fp16", "threads": 1, "cache_mb": 8, "verify": False},
        {"max_image_pixels": 100, "max_image_bytes": 5000},
    )  # fmt: skip
    await provider.instantiate_model("edge", config)
    options = provider._table.get("mine").model.options  # type: ignore[union-attr]
    assert (options.device, options.backend, options.precision, options.threads) == ("cpu", "onnxruntime", "fp16", 1)
    assert (options.cache_mb, options.verify, options.max_image_pixels) == (8, False, 100)
    with pytest.raises(InvalidRequestError, match="100 pixels"):
        await provider.image_mask_generation(_request("mine"))
    assert await _names(provider) == ["alpha", "beta", "mine"]


async def test_loading_the_same_again_does_nothing_and_otherwise_is_refused(
    provider: EdgeProvider, opener: FakeOpener, root: Path
) -> None:
    await provider.image_mask_generation(_request())  # loaded on demand
    await provider.instantiate_model("edge", _config())
    await provider.instantiate_model("edge", _config(device="auto"))
    assert len(opener.opened) == 1
    for other in (_config(precision="fp32"), _config(path=root / "beta")):
        with pytest.raises(InvalidRequestError, match="loaded already"):
            await provider.instantiate_model("edge", other)
    (root / "alpha" / "manifest.json").touch()  # the bundle was replaced meanwhile
    with pytest.raises(InvalidRequestError, match="loaded already"):
        await provider.instantiate_model("edge", _config())
    await provider.image_mask_generation(_request())
    assert len(opener.opened) == 1


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (_config("gamma"), ModelNotFoundError, "Known: alpha, beta"),
        (_config("facebook/sam2.1-hiera-tiny"), InvalidRequestError, "export sam2 facebook/sam2.1-hiera-tiny"),
        (_config(beam=3), InvalidRequestError, "Accepted: device"),
        (_config(task="video_mask_generation"), TaskNotSupportedError, "does image_mask_generation"),
        (_config(task="image_zero_shot_detection"), TaskNotSupportedError, "does image_mask_generation"),
        (_config(task="segmentation"), InvalidRequestError, "Tasks: image_mask_generation"),
    ],
)
async def test_refused_configurations(
    provider: EdgeProvider, config: ModelConfig, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await provider.instantiate_model("edge", config)
    await provider.image_mask_generation(_request())


async def test_unknown_family(provider: EdgeProvider, root: Path) -> None:
    add_bundle(root, "later", family="later-family")
    for load in (
        provider.instantiate_model("edge", _config("later")),
        provider.image_mask_generation(_request("later")),
    ):
        with pytest.raises(TaskNotSupportedError, match="later-family"):
            await load


async def test_a_timeout_aborts_the_load_and_frees_it(provider: EdgeProvider, opener: FakeOpener) -> None:
    opener.gate.clear()
    with pytest.raises(InferenceTimeoutError, match="Loading model 'alpha'"):
        await provider.instantiate_model("edge", _config(), timeout=0.05)  # type: ignore[arg-type]
    assert provider._table.get("alpha") is None
    opener.gate.set()  # the back end returns only now
    await asyncio.to_thread(until, lambda: opener.opened and opener.opened[0].closed)
    assert (await provider.get_server_info()).models_loaded == 0
    await provider.instantiate_model("edge", _config(), timeout=20)
    assert [p.closed for p in opener.opened] == [True, False]


async def test_cancelling_aborts_the_load_too(provider: EdgeProvider, opener: FakeOpener) -> None:
    opener.gate.clear()
    task = asyncio.create_task(provider.instantiate_model("edge", _config()))
    await asyncio.to_thread(opener.entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    opener.gate.set()
    await asyncio.to_thread(until, lambda: opener.opened and opener.opened[0].closed)
    assert provider._table.get("alpha") is None


async def test_a_request_that_times_out_leaves_its_load_running(provider: EdgeProvider, opener: FakeOpener) -> None:
    opener.gate.clear()
    with pytest.raises(InferenceTimeoutError, match="Loading model 'alpha'"):
        await provider.image_mask_generation(_request(), timeout=0.05)
    joined = asyncio.create_task(provider.instantiate_model("edge", _config()))
    await asyncio.sleep(0.02)
    opener.gate.set()
    await joined
    await provider.image_mask_generation(_request())
    assert len(opener.opened) == 1


async def test_joining_a_load_and_leaving_does_not_abort_it(provider: EdgeProvider, opener: FakeOpener) -> None:
    opener.gate.clear()
    first = asyncio.create_task(provider.instantiate_model("edge", _config()))
    await asyncio.to_thread(opener.entered.wait, 10)
    with pytest.raises(InferenceTimeoutError):
        await provider.instantiate_model("edge", _config(), timeout=0.05)  # type: ignore[arg-type]
    opener.gate.set()
    await first
    assert [p.closed for p in opener.opened] == [False]


async def test_delete_during_a_request(provider: EdgeProvider, opener: FakeOpener) -> None:
    await provider.instantiate_model("edge", _config())
    predictor = opener.opened[0]
    predictor.gate.clear()
    running = asyncio.create_task(provider.image_mask_generation(_request()))
    await asyncio.to_thread(predictor.entered.wait, 10)
    queued = asyncio.create_task(provider.image_mask_generation(_request()))
    await asyncio.sleep(0.05)
    deleting = asyncio.create_task(provider.delete_model("alpha"))
    await asyncio.sleep(0.05)
    assert not deleting.done()
    assert not predictor.closed
    with pytest.raises(ModelNotFoundError):  # at once, although the store still has it
        await provider.image_mask_generation(_request())
    assert await _names(provider) == ["beta"]
    predictor.gate.set()
    assert (await running).status == (await queued).status == "SUCCESS"
    await deleting
    assert predictor.closed
    with pytest.raises(ModelNotFoundError):
        await provider.delete_model("alpha")
    # The administrator can bring it back.
    await provider.instantiate_model("edge", _config())
    await provider.image_mask_generation(_request())
    assert await _names(provider) == ["alpha", "beta"]


async def test_delete_goes_on_when_its_caller_leaves_and_close_waits(
    provider: EdgeProvider, opener: FakeOpener
) -> None:
    await provider.instantiate_model("edge", _config())
    predictor = opener.opened[0]
    predictor.gate.clear()
    running = asyncio.create_task(provider.image_mask_generation(_request()))
    await asyncio.to_thread(predictor.entered.wait, 10)
    deleting = asyncio.create_task(provider.delete_model("alpha"))
    await asyncio.sleep(0.02)
    deleting.cancel()
    closing = asyncio.create_task(provider.close())
    await asyncio.sleep(0.02)
    assert not closing.done()  # it waits for models that are on their way out, too
    predictor.gate.set()
    await running
    await closing
    assert predictor.closed


async def test_a_load_that_starts_while_a_request_reads_the_store_is_used(
    provider: EdgeProvider, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = provider._catalogue.scan

    def slow_scan() -> Any:
        monkeypatch.undo()
        options = provider._options.updated({"precision": "fp32"}, {})
        provider._table.start("alpha", provider._catalogue.locate(_config()), _TASK, options)
        return scan()

    monkeypatch.setattr(provider._catalogue, "scan", slow_scan)
    await provider.image_mask_generation(_request())
    assert len(opener.opened) == 1


async def test_delete_while_loading(provider: EdgeProvider, opener: FakeOpener) -> None:
    opener.gate.clear()
    loading = asyncio.create_task(provider.instantiate_model("edge", _config()))
    await asyncio.to_thread(opener.entered.wait, 10)
    deleting = asyncio.create_task(provider.delete_model("alpha"))
    await asyncio.sleep(0.02)
    opener.gate.set()
    await deleting
    with pytest.raises(ModelNotFoundError, match="unloaded"):
        await loading
    assert opener.opened[0].closed
    assert await _names(provider) == ["beta"]


async def test_delete_of_what_is_not_loaded(provider: EdgeProvider) -> None:
    for name in ("gamma", "", "../alpha", None):
        with pytest.raises(ModelNotFoundError, match="alpha, beta"):
            await provider.delete_model(name)  # type: ignore[arg-type]
    await provider.delete_model("beta")  # lies in the store: no longer offered
    assert await _names(provider) == ["alpha"]
    with pytest.raises(ModelNotFoundError):
        await provider.image_mask_generation(_request("beta"))


async def test_capabilities(provider: EdgeProvider, tmp_path: Path) -> None:
    found = await provider.get_capabilities()
    assert found.tasks == [InferenceTask.MASK_GENERATION]
    assert (found.supports_batching, found.supports_streaming, found.max_image_size) == (False, False, 10_000)
    empty = make_provider(tmp_path / "none", FakeOpener())
    assert (await empty.get_capabilities()).tasks == []
    await empty.close()


async def test_capabilities_follow_what_is_offered(provider: EdgeProvider, root: Path) -> None:
    for name in ("alpha", "beta"):
        await provider.delete_model(name)
    assert (await provider.get_capabilities()).tasks == []
    manual = make_provider(root, FakeOpener(), autoload=False)
    assert (await manual.get_capabilities()).tasks == []
    await manual.instantiate_model("edge", _config())
    assert (await manual.get_capabilities()).tasks == [InferenceTask.MASK_GENERATION]
    await manual.close()


async def test_server_info_without_gpu(provider: EdgeProvider, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "read_hardware", lambda: Hardware(2, 100, 50, (), "no driver answers"))
    add_bundle(root, "broken")
    (root / "broken" / "manifest.json").write_text("{")
    await provider.instantiate_model("edge", _config(precision="fp16"))
    info = await provider.get_server_info()
    assert (info.num_gpus, info.gpu_info["devices"], info.gpu_info["reason"]) == (0, [], "no driver answers")
    assert info.gpu_info["model_to_device"] == {"alpha": "cpu"}
    assert (info.gpus_used, info.gpu_to_model, info.num_nodes) == ([], {}, 1)
    assert (info.models, info.models_loaded) == (["alpha", "beta"], 1)
    assert info.models_to_task == {"alpha": _TASK, "beta": _TASK}
    assert info.ready
    assert info.num_cpus is not None
    assert info.num_cpus >= 1
    assert info.version == info.app_version == info.versions["pixano-edge"] != "unknown"
    assert info.versions["numpy"]
    assert any("broken" in w for w in info.warnings)
    assert any("fp32 runs" in w for w in info.warnings)


async def test_server_info_with_gpus(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(DeviceInfo(f"GPU {i}", "cuda", i, "8.7", "580.1", "CUDA 13.0", 8 << 30, 7 << 30) for i in range(2))
    monkeypatch.setattr(edge, "read_hardware", lambda: Hardware(2, 100, 50, gpus, None))
    on_gpu = make_provider(root, FakeOpener(device="cuda:1"))
    await on_gpu.instantiate_model("edge", _config())
    await on_gpu.instantiate_model("edge", _config("beta"))
    info = await on_gpu.get_server_info()
    assert (info.num_gpus, info.gpus_used, info.gpu_to_model) == (2, [1], {"1": "alpha, beta"})
    device = info.gpu_info["devices"][1]
    assert {k: device[k] for k in ("name", "compute_capability", "driver", "memory_total", "memory_free")} == {
        "name": "GPU 1", "compute_capability": "8.7", "driver": "580.1", "memory_total": 8 << 30,
        "memory_free": 7 << 30,
    }  # fmt: skip
    assert info.gpu_info["reason"] is None
    await on_gpu.close()

    on_cpu = make_provider(root, FakeOpener())
    await on_cpu.instantiate_model("edge", _config())
    assert any("runs on the CPU although 2" in w for w in (await on_cpu.get_server_info()).warnings)
    await on_cpu.close()


async def test_close_frees_everything_and_refuses_more(provider: EdgeProvider, opener: FakeOpener) -> None:
    await provider.image_mask_generation(_request())
    await provider.close()
    await provider.close()
    assert [p.closed for p in opener.opened] == [True]
    for call in (
        provider.image_mask_generation(_request()),
        provider.instantiate_model("edge", _config()),
        provider.list_models(),
        provider.get_server_info(),
    ):
        with pytest.raises(InferenceError, match="closed"):
            await call
    await asyncio.to_thread(
        until, lambda: not any(t.name.startswith("pixano-edge-alpha") for t in threading.enumerate())
    )


def test_one_provider_serves_several_event_loops(root: Path, opener: FakeOpener) -> None:
    provider = make_provider(root, opener)
    for _ in range(2):
        assert asyncio.run(provider.image_mask_generation(_request())).status == "SUCCESS"
    assert len(opener.opened) == 1
    asyncio.run(provider.close())


@dataclass
class _Foreign:
    """Another Pixano's request: only the attributes count."""

    model: str = "alpha"


async def test_absent_tasks_say_what_is_missing(provider: EdgeProvider) -> None:
    request: Any = _Foreign()
    calls = {
        "Embedding": [provider.embedding(request)],
    }
    for word, group in calls.items():
        for call in group:
            with pytest.raises(TaskNotSupportedError, match=f"{word}.*not there yet"):
                await call
