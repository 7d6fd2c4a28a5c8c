"""Everything at once, at random: whatever was asked for ends, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from pixano_edge.engine.errors import DeviceError
from pixano_edge.engine.provider import (
    EdgeProvider,
    EdgeVideoMaskGenerationInput,
    ImageMaskGenerationInput,
    InferenceError,
    ModelConfig,
)

from .fakes import FakeOpener, add_bundle, data_uri, make_provider, png, until

FRAME = data_uri(png(16, 12))
GIB = 1 << 30


def _clip(rng: random.Random) -> EdgeVideoMaskGenerationInput:
    video: list[Any] = [FRAME] * rng.randint(1, 12)
    if rng.random() < 0.15:
        video[rng.randrange(len(video))] = b"broken"
    name = rng.choice(["one", "one-video", "two", "two-video"])
    return EdgeVideoMaskGenerationInput(video, name, [1], [0], points=[[[3, 4]]])


async def _act(provider: EdgeProvider, opener: FakeOpener, rng: random.Random, jobs: list[str]) -> None:
    what = rng.random()
    try:
        if what < 0.3:
            name = rng.choice(["one", "two", "two-video"])
            await provider.image_mask_generation(ImageMaskGenerationInput(FRAME, name, points=[[[3, 4]]]), timeout=20)
        elif what < 0.45:
            await provider.video_mask_generation(_clip(rng), timeout=rng.choice([0.005, 0.02, 20.0]))
        elif what < 0.6:
            jobs.append((await provider.submit_video_mask_generation_job(_clip(rng))).job_id)
        elif what < 0.7:
            stream = provider.stream_video_mask_generation(_clip(rng))
            async for frame in stream:
                if rng.random() < 0.2 or frame.frame_index > 8:
                    break
            await stream.aclose()  # type: ignore[attr-defined]
        elif what < 0.8 and jobs:
            await provider.cancel_video_mask_generation_job(rng.choice(jobs))
        elif what < 0.9 and jobs:
            async for _ in provider.watch_job(rng.choice(jobs)):
                if rng.random() < 0.1:
                    break
        elif what < 0.93:
            name = rng.choice(["one", "two"])
            await provider.delete_model(rng.choice([name, f"{name}-video"]))
            await provider.instantiate_model("edge", ModelConfig(name, "image_mask_generation"), timeout=20)
        elif what < 0.98:
            task = rng.choice(["image_mask_generation", "video_mask_generation"])
            await provider.instantiate_model("edge", ModelConfig(rng.choice(["one", "two"]), task), timeout=20)
        else:
            opener.error = DeviceError("no luck", "try again")
            try:
                await provider.get_server_info()
            finally:
                opener.error = None
    except InferenceError:
        pass  # busy, deleted, out of memory, broken: all of that happens here


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_mixed_load(tmp_path: Path, seed: int) -> None:
    """Two bundles that do not fit at once, annotators who come and go, jobs that are cancelled or break."""
    for name in ("one", "two"):
        add_bundle(tmp_path, name, tracks=True, weights=GIB)
    opener = FakeOpener()
    provider = make_provider(tmp_path, opener, memory_limits=int(2.5 * GIB), cache_mb=0)
    rng = random.Random(seed)
    jobs: list[str] = []

    async def annotator() -> None:
        for _ in range(25):
            task = asyncio.create_task(_act(provider, opener, rng, jobs))
            if rng.random() < 0.15:
                await asyncio.sleep(rng.random() * 0.01)
                task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                assert task.cancelled()

    await asyncio.wait_for(asyncio.gather(*(annotator() for _ in range(6))), 60)
    await asyncio.to_thread(until, lambda: not provider._video._runs, 30)
    states = [provider._video.status(job).status for job in jobs]
    assert set(states) <= {"completed", "failed", "canceled"}
    assert states
    assert all(slot.users == 0 for slot in provider._table.slots())
    for name in ("one", "two"):  # and it still works
        await provider.instantiate_model("edge", ModelConfig(name, "image_mask_generation"), timeout=20)
        request = EdgeVideoMaskGenerationInput([FRAME] * 3, f"{name}-video", [1], [0], points=[[[3, 4]]])
        names = {m.name for m in await provider.list_models("video_mask_generation")}
        request.model = next(n for n in (f"{name}-video", name) if n in names)
        assert (await provider.video_mask_generation(request)).data.frame_indexes == [0, 1, 2]
    await provider.close()
    assert all(predictor.closed for predictor in opener.opened)
    assert all(tracker.closed for video in opener.videos for tracker in video.trackers)
    assert provider._table.budget.bookings() == []
