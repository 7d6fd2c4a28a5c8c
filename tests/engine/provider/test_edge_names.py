"""One bundle, two tasks: which names are offered, what each loads, and what happens when both are used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.provider import (
    EdgeProvider,
    EdgeVideoMaskGenerationInput,
    ImageMaskGenerationInput,
    InferenceError,
    InferenceTask,
    InvalidRequestError,
    ModelConfig,
    ModelNotFoundError,
    TaskNotSupportedError,
)

from .fakes import FakeOpener, add_bundle, data_uri, make_provider, png, until

IMAGES, VIDEOS = "image_mask_generation", "video_mask_generation"
FRAME = data_uri(png())
GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Bundles: ``both`` tracks, ``still`` does not."""
    add_bundle(tmp_path, "both", tracks=True)
    add_bundle(tmp_path, "still")
    return tmp_path


@pytest.fixture
async def provider(root: Path, opener: FakeOpener) -> AsyncIterator[EdgeProvider]:
    edge = make_provider(root, opener)
    yield edge
    for held in (*opener.opened, *opener.videos):
        held.gate.set()
    opener.gate.set()
    await edge.close()
    assert all(p.closed for p in opener.opened)


async def _click(provider: EdgeProvider, model: str = "both") -> Any:
    return await provider.image_mask_generation(ImageMaskGenerationInput(FRAME, model, points=[[[3, 4]]]))


def _clip(model: str = "both-video", count: int = 3) -> EdgeVideoMaskGenerationInput:
    return EdgeVideoMaskGenerationInput([FRAME] * count, model, [1], [0], points=[[[3, 4]]])


async def _track(provider: EdgeProvider, model: str = "both-video") -> Any:
    return await provider.video_mask_generation(_clip(model))


async def _listed(provider: EdgeProvider) -> dict[str, str]:
    models = await provider.list_models()
    assert len({m.name for m in models}) == len(models), "Pixano takes the first entry of a name"
    return {m.name: m.task for m in models}


async def _loaded(provider: EdgeProvider) -> list[str]:
    return [s.name for s in provider._table.slots()]


async def test_the_list_has_one_task_for_each_name(provider: EdgeProvider, opener: FakeOpener) -> None:
    assert await _listed(provider) == {"both": IMAGES, "both-video": VIDEOS, "still": IMAGES}
    videos = await provider.list_models(InferenceTask.VIDEO_MASK_GENERATION)
    assert [(m.name, m.model_class, m.model_path, m.provider) for m in videos] == [
        ("both-video", "Sam2VideoModel", "test/both", "edge")
    ]
    info = await provider.get_server_info()
    assert info.models == ["both", "both-video", "still"]
    assert info.models_to_task == await _listed(provider)
    assert (await provider.get_capabilities()).tasks == [
        InferenceTask.MASK_GENERATION,
        InferenceTask.VIDEO_MASK_GENERATION,
    ]
    assert opener.opened == []  # all of that loads nothing


async def test_without_a_bundle_that_tracks_nothing_is_said_of_videos(tmp_path: Path, opener: FakeOpener) -> None:
    add_bundle(tmp_path, "still")
    provider = make_provider(tmp_path, opener)
    assert (await provider.get_capabilities()).tasks == [InferenceTask.MASK_GENERATION]
    with pytest.raises(TaskNotSupportedError, match="'still' does image_mask_generation, not video") as caught:
        await _track(provider, "still")
    assert "export it again" in caught.value.action
    with pytest.raises(ModelNotFoundError, match="Known: still"):
        await _track(provider, "still-video")
    with pytest.raises(TaskNotSupportedError, match="does image_mask_generation, not video") as caught:
        await provider.instantiate_model("edge", ModelConfig("still", VIDEOS))
    assert "Export its checkpoint again" in caught.value.action
    assert opener.opened == []  # told from the manifest, by the opener before anything is opened
    await provider.close()


@pytest.mark.parametrize("first", ["both", "both-video"])
async def test_either_name_does_both_and_one_load_serves(
    provider: EdgeProvider, opener: FakeOpener, first: str
) -> None:
    await _track(provider, first)
    for name in ("both", "both-video"):
        assert (await _click(provider, name)).metadata["model_name"] == name
        assert (await _track(provider, name)).metadata["model_name"] == name
    assert opener.tasks == [VIDEOS]
    assert await _listed(provider) == {"both": IMAGES, "both-video": VIDEOS, "still": IMAGES}


async def test_a_click_loads_the_image_graphs_and_tracking_takes_over(
    provider: EdgeProvider, opener: FakeOpener
) -> None:
    await _click(provider)
    await _click(provider)
    assert opener.tasks == [IMAGES]
    await _track(provider)
    assert opener.tasks == [IMAGES, VIDEOS]
    await asyncio.to_thread(until, lambda: opener.opened[0].closed)  # the smaller one is not needed any more
    await _click(provider)
    assert opener.tasks == [IMAGES, VIDEOS]
    assert await _loaded(provider) == ["both-video"]
    assert (await provider.get_server_info()).models_loaded == 1


async def test_requests_under_way_are_answered_while_tracking_takes_over(
    provider: EdgeProvider, opener: FakeOpener
) -> None:
    await _click(provider)
    small = opener.opened[0]
    small.gate.clear()
    small.entered.clear()
    running = asyncio.create_task(_click(provider))
    await asyncio.to_thread(small.entered.wait, 10)
    queued = asyncio.create_task(_click(provider))
    await asyncio.sleep(0.02)
    await _track(provider)
    later = await _click(provider)  # by the other one, without waiting for the first
    assert later.data.masks
    small.gate.set()
    for answer in await asyncio.gather(running, queued):
        assert answer.data.masks
    await asyncio.to_thread(until, lambda: small.closed)


async def test_a_request_that_comes_between_finding_and_sending_looks_again(
    provider: EdgeProvider, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _click(provider)
    table = provider._table
    hold, found = table.hold, []

    def late(slot: Any, **how: Any) -> bool:
        held = hold(slot, **how)
        if slot.name == "both" and not found:
            found.append(slot)
            table.start("both-video", slot.source, VIDEOS, slot.options, "both")[0].ready.result(10)
        return held

    monkeypatch.setattr(table, "hold", late)
    assert (await _click(provider)).data.masks
    assert found[0].replaced
    assert opener.tasks == [IMAGES, VIDEOS]


async def test_tracking_that_does_not_load_leaves_the_images_alone(provider: EdgeProvider, opener: FakeOpener) -> None:
    await _click(provider)
    opener.error = DeviceError("no room for five graphs", "unload something")
    with pytest.raises(InferenceError, match="no room for five graphs"):
        await _track(provider)
    opener.error = None
    await _click(provider)
    assert opener.tasks == [IMAGES]
    await _track(provider)


async def test_a_click_that_waits_for_tracking_that_does_not_load_gets_the_images_alone(
    provider: EdgeProvider, opener: FakeOpener
) -> None:
    opener.gate.clear()
    opener.error, opener.error_task = DeviceError("no room for five graphs", "unload something"), VIDEOS
    tracking = asyncio.create_task(_track(provider))
    await asyncio.to_thread(opener.entered.wait, 10)
    click = asyncio.create_task(_click(provider))
    await asyncio.to_thread(until, lambda: provider._table.slots()[0].users == 2)
    opener.gate.set()
    with pytest.raises(InferenceError, match="no room for five graphs"):
        await tracking
    assert (await click).data.masks
    assert await _loaded(provider) == ["both"]


async def test_a_model_loaded_to_track(provider: EdgeProvider, opener: FakeOpener, root: Path) -> None:
    """`ModelConfig.task` decides what the name is listed for; its images go by a second name."""
    await provider.instantiate_model("edge", ModelConfig("mine", VIDEOS, root / "both"))
    listed = await _listed(provider)
    assert (listed["mine"], listed["mine-image"]) == (VIDEOS, IMAGES)
    for name in ("mine", "mine-image"):
        await _click(provider, name)
        await _track(provider, name)
    await provider.instantiate_model("edge", ModelConfig("mine", VIDEOS, root / "both"))
    await provider.instantiate_model("edge", ModelConfig("mine", IMAGES, root / "both"))  # it does that already
    assert opener.tasks == [VIDEOS]
    await provider.delete_model("mine-image")
    listed = await _listed(provider)
    assert "mine" not in listed
    assert "mine-image" not in listed
    assert await _loaded(provider) == []


async def test_a_model_loaded_for_images_gets_the_rest_when_it_is_asked_to_track(
    provider: EdgeProvider, opener: FakeOpener, root: Path
) -> None:
    await provider.instantiate_model("edge", ModelConfig("mine", IMAGES, root / "both", {"threads": 1}))
    listed = await _listed(provider)
    assert (listed["mine"], listed["mine-video"]) == (IMAGES, VIDEOS)
    await _track(provider, "mine-video")
    assert opener.tasks == [IMAGES, VIDEOS]
    slot = provider._table.get("mine-video")
    assert slot is not None
    assert slot.options.threads == 1  # as its administrator wanted it
    assert await _listed(provider) == listed  # `mine` is still there, though its slot is gone
    await _click(provider, "mine")
    await provider.instantiate_model("edge", ModelConfig("mine", IMAGES, root / "both", {"threads": 1}))
    assert opener.tasks == [IMAGES, VIDEOS]
    await provider.delete_model("mine")
    assert await _loaded(provider) == []
    assert "mine-video" not in await _listed(provider)


async def test_asking_again_for_the_other_task_by_the_same_name(
    provider: EdgeProvider, opener: FakeOpener, root: Path
) -> None:
    await provider.instantiate_model("edge", ModelConfig("both", IMAGES))
    await provider.instantiate_model("edge", ModelConfig("both", VIDEOS))
    assert opener.tasks == [IMAGES, VIDEOS]
    listed = await _listed(provider)
    assert (listed["both"], listed["both-image"]) == (VIDEOS, IMAGES)
    assert "both-video" not in listed
    with pytest.raises(InvalidRequestError, match="loaded already"):
        await provider.instantiate_model("edge", ModelConfig("both", VIDEOS, None, {"threads": 1}))


@pytest.mark.parametrize("name", ["both", "both-video"])
@pytest.mark.parametrize("used", [[], ["both"], ["both-video"], ["both", "both-video"]])
async def test_deleting_takes_both_names(
    provider: EdgeProvider, opener: FakeOpener, name: str, used: list[str]
) -> None:
    for one in used:
        await (_track if one == "both-video" else _click)(provider, one)
    await provider.delete_model(name)
    assert await _listed(provider) == {"still": IMAGES}
    assert await _loaded(provider) == []
    assert all(p.closed for p in opener.opened)
    for one in ("both", "both-video"):
        with pytest.raises(ModelNotFoundError, match="Known: still"):
            await _click(provider, one)
        with pytest.raises(ModelNotFoundError):
            await _track(provider, one)
        with pytest.raises(ModelNotFoundError):
            await provider.delete_model(one)
    await provider.instantiate_model("edge", ModelConfig("both", IMAGES))  # the administrator brings both back
    assert await _listed(provider) == {"both": IMAGES, "both-video": VIDEOS, "still": IMAGES}


async def test_a_name_of_the_store_stays_its_own(provider: EdgeProvider, opener: FakeOpener, root: Path) -> None:
    add_bundle(root, "both-video")  # a bundle for images of that name
    assert await _listed(provider) == {"both": IMAGES, "both-video": IMAGES, "still": IMAGES}
    await _click(provider, "both-video")
    for name in ("both", "both-video"):
        with pytest.raises(TaskNotSupportedError) as caught:
            await _track(provider, name)
    with pytest.raises(TaskNotSupportedError, match="name 'both-video' of its tracking is another model's") as caught:
        await _track(provider, "both")
    assert "instantiate_model" in caught.value.action
    await provider.instantiate_model("edge", ModelConfig("own", VIDEOS, root / "both"))
    await _track(provider, "own")


async def test_without_autoload_only_what_was_loaded_counts(root: Path, opener: FakeOpener) -> None:
    provider = make_provider(root, opener, autoload=False)
    assert await _listed(provider) == {}
    with pytest.raises(ModelNotFoundError):
        await _track(provider)
    await provider.instantiate_model("edge", ModelConfig("both", IMAGES))
    assert await _listed(provider) == {"both": IMAGES, "both-video": VIDEOS}
    await _track(provider)
    assert await _listed(provider) == {"both": IMAGES, "both-video": VIDEOS}
    await _click(provider, "both")
    await provider.close()


async def test_while_it_loads_the_list_knows_both_names(provider: EdgeProvider, opener: FakeOpener, root: Path) -> None:
    opener.gate.clear()
    config = ModelConfig("mine", IMAGES, root / "both")
    loading = asyncio.create_task(provider.instantiate_model("edge", config))
    await asyncio.to_thread(opener.entered.wait, 10)
    listed = await _listed(provider)
    assert (listed["mine"], listed["mine-video"]) == (IMAGES, VIDEOS)
    opener.gate.set()
    await loading


async def test_a_tracking_model_that_made_room_comes_back(tmp_path: Path, opener: FakeOpener) -> None:
    """Evicted models keep their names, and load again for what they were loaded for."""
    add_bundle(tmp_path, "both", tracks=True, weights=GIB)
    add_bundle(tmp_path, "still", weights=GIB)
    provider = make_provider(tmp_path, opener, memory_limits=2 * GIB, cache_mb=0)
    await _track(provider)
    names = await _listed(provider)
    await _click(provider, "still")
    assert opener.opened[0].closed
    assert await _loaded(provider) == ["still"]
    assert await _listed(provider) == names
    assert [u["model"] for u in (await provider.get_server_info()).gpu_info["unloaded"]] == ["both-video"]
    await _track(provider)
    assert opener.tasks == [VIDEOS, IMAGES, VIDEOS]
    await provider.delete_model("both")
    assert "both-video" not in await _listed(provider)
    await provider.close()


async def test_images_that_made_room_for_their_own_tracking(tmp_path: Path, opener: FakeOpener) -> None:
    """Where both do not fit at once, the smaller one goes first, and nothing says that it waits to come back."""
    add_bundle(tmp_path, "both", tracks=True, weights=5 * GIB)
    provider = make_provider(tmp_path, opener, memory_limits=6 * GIB, cache_mb=0, autoload=False)
    await provider.instantiate_model("edge", ModelConfig("mine", IMAGES, tmp_path / "both"))
    await _click(provider, "mine")
    await _track(provider, "mine-video")
    assert opener.opened[0].closed
    assert (await provider.get_server_info()).gpu_info["unloaded"] == []
    assert await _listed(provider) == {"mine": IMAGES, "mine-video": VIDEOS}
    await _click(provider, "mine")
    assert opener.tasks == [IMAGES, VIDEOS]
    await provider.close()


async def test_a_job_keeps_its_model_from_making_room(tmp_path: Path, opener: FakeOpener) -> None:
    add_bundle(tmp_path, "both", tracks=True, weights=GIB)
    add_bundle(tmp_path, "still", weights=GIB)
    provider = make_provider(tmp_path, opener, memory_limits=2 * GIB, cache_mb=0)
    await _track(provider)
    opener.videos[0].gate.clear()
    job = await provider.submit_video_mask_generation_job(_clip())
    with pytest.raises(InferenceError, match="never unloaded"):
        await _click(provider, "still")
    opener.videos[0].gate.set()
    await asyncio.to_thread(until, lambda: provider._video.status(job.job_id).status == "completed")
    await asyncio.to_thread(until, lambda: not provider._video._runs)
    await _click(provider, "still")
    await provider.close()
