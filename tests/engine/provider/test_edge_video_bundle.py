"""Tracking through the provider on a real (tiny) bundle: answers equal to the tracker's own, memory, files."""

from __future__ import annotations

import asyncio
import io
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.bundle import Bundle, BundleStore, pack
from pixano_edge.engine.models.rle import decode_rle, encode_rle
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel
from pixano_edge.engine.provider import (
    EdgeProvider,
    EdgeVideoMaskGenerationInput,
    ImageMaskGenerationInput,
    InvalidRequestError,
    ModelConfig,
    TaskNotSupportedError,
)
from pixano_edge.engine.provider.families import VIDEOS
from pixano_edge.engine.provider.needs import declared_needs
from pixano_edge.engine.provider.settings import LoadOptions
from pixano_edge.engine.provider.video_needs import TRACKED_OBJECTS, map_bytes
from tests.support.tracking import moving_squares

from .fakes import until

COUNT = 12
HEIGHT, WIDTH = 96, 144  # not square
MASK = np.zeros((HEIGHT, WIDTH), np.bool_)
MASK[40:70, 90:115] = True


def _encoded(images: list[np.ndarray]) -> list[bytes]:
    found = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


@pytest.fixture(scope="module")
def clip() -> list[bytes]:
    return _encoded(moving_squares(COUNT))


@pytest.fixture(scope="module")
def store(tracking_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> BundleStore:
    store = BundleStore(tmp_path_factory.mktemp("tracking-store"))
    store.add(tracking_bundle, "tiny")
    return store


@pytest.fixture
async def provider(store: BundleStore) -> AsyncIterator[EdgeProvider]:
    edge = EdgeProvider(store=store, threads=1, device="cpu")
    yield edge
    await edge.close()


@pytest.fixture(scope="module")
def model(tracking_bundle: Path) -> Iterator[Sam2VideoModel]:
    with Sam2VideoModel.open(tracking_bundle, "cpu", threads=1) as opened:
        yield opened


def _request(clip: Any, *keyframes: dict[str, Any], ids: list[int], **fields: Any) -> EdgeVideoMaskGenerationInput:
    return EdgeVideoMaskGenerationInput(
        **{"video": clip, "model": "tiny-video", "objects_ids": ids, "frame_indexes": [], "keyframes": list(keyframes),
           **fields}
    )  # fmt: skip


def _three(clip: Any, **fields: Any) -> EdgeVideoMaskGenerationInput:
    """A click, a mask, and a box with a background click on a later frame."""
    rle, corner = encode_rle(MASK), {"x": 2, "y": 9}
    return _request(
        clip,
        {"frame_index": 2, "points": [{"x": 30, "y": 35, "label": 1}]},
        {"frame_index": 2, "points": [], "box": None, "mask": rle},
        {"frame_index": 5, "box": {"x": 10, "y": 5, "width": 60, "height": 50}, "points": [{**corner, "label": 0}]},
        {"frame_index": 7, "points": [{"x": 35, "y": 35}, {"x": 130, "y": 5, "label": 0}]},
        ids=[3, 1, 8, 3],
        **fields,
    )  # fmt: skip


def _expected(model: Sam2VideoModel, start: int | None, end: int | None) -> list[tuple[int, int, np.ndarray]]:
    with model.track(moving_squares(COUNT)) as tracker:
        tracker.add_prompt(3, 2, Prompt(points=[[30, 35]], labels=[1]))
        tracker.add_mask(1, 2, MASK)
        tracker.add_prompt(8, 5, Prompt(points=[[2, 9]], labels=[0], box=[10, 5, 70, 55]))
        tracker.add_prompt(3, 7, Prompt(points=[[35, 35], [130, 5]], labels=[1, 0]))
        return [(r.frame, o.object_id, o.mask) for r in tracker.propagate(start, end) for o in r.objects]


def _rows(data: Any) -> list[tuple[int, int, np.ndarray]]:
    masks = [decode_rle({"size": m.size, "counts": m.counts}) for m in data.masks]
    return list(zip(data.frame_indexes, data.objects_ids, masks))


def _assert_same(got: list[tuple[int, int, np.ndarray]], expected: list[tuple[int, int, np.ndarray]]) -> None:
    assert [row[:2] for row in got] == [row[:2] for row in expected]
    for (frame, number, mask), (_, _, other) in zip(got, expected):
        assert mask.shape == (HEIGHT, WIDTH)
        assert np.array_equal(mask, other), f"frame {frame}, object {number}: {np.sum(mask != other)} pixels differ"


@pytest.mark.parametrize("span", [None, (4, 9), (9, 1)])
async def test_answers_are_the_trackers(
    provider: EdgeProvider, model: Sam2VideoModel, clip: list[bytes], span: tuple[int, int] | None
) -> None:
    interval = None if span is None else dict(zip(("start_frame", "end_frame"), span))
    result = await provider.video_mask_generation(_three(clip, interval=interval))
    expected = _expected(model, *(span or (None, None)))
    rows = _rows(result.data)
    _assert_same(rows, expected)
    # Control: the masks are neither empty nor all alike, and the direction matters.
    assert any(mask.any() for _, _, mask in rows)
    assert len({mask.tobytes() for _, _, mask in rows}) > len(rows) // 2
    if span == (9, 1):
        turned = {row[:2]: row[2] for row in _expected(model, 1, 9)}
        assert any(not np.array_equal(mask, turned[frame, number]) for frame, number, mask in rows)


async def test_two_jobs_and_clicks_at_once_do_not_mix(
    provider: EdgeProvider, model: Sam2VideoModel, clip: list[bytes]
) -> None:
    backward = {"start_frame": 9, "end_frame": 1}
    jobs = [
        await provider.submit_video_mask_generation_job(_three(clip)),
        await provider.submit_video_mask_generation_job(_three(clip, interval=backward)),
    ]
    request = ImageMaskGenerationInput(clip[3], "tiny", points=[[[30, 35]]])  # type: ignore[arg-type]
    answers = [await provider.image_mask_generation(request) for _ in range(4)]
    for job, span in zip(jobs, ((None, None), (9, 1))):
        async for _ in provider.watch_job(job.job_id):
            pass
        status = await provider.get_video_mask_generation_job(job.job_id)
        assert status.status == "completed", status.detail
        _assert_same(_rows(status.data), _expected(model, *span))
    alone = model.predictor.predict(moving_squares(COUNT)[3], [Prompt(points=[[30, 35]])])
    for answer in answers:
        got = [decode_rle({"size": m.size, "counts": m.counts}) for m in answer.data.masks[0]]
        assert np.array_equal(np.array(got), alone.masks[0])
    assert [s.name for s in provider._table.slots()] == ["tiny-video"]


async def test_prompted_frames_only(provider: EdgeProvider, model: Sam2VideoModel, clip: list[bytes]) -> None:
    data = (await provider.video_mask_generation(_three(clip, propagate=False))).data
    rows = _rows(data)
    assert [row[:2] for row in rows] == [(2, 3), (2, 1), (5, 8), (7, 3)]
    assert np.array_equal(rows[1][2], MASK)  # a given mask is the answer
    with model.track(moving_squares(COUNT)) as tracker:
        first = tracker.add_prompt(3, 2, Prompt(points=[[30, 35]], labels=[1]))
    assert np.array_equal(rows[0][2], first.mask)


async def test_an_empty_mask_says_that_the_object_is_not_there(provider: EdgeProvider, clip: list[bytes]) -> None:
    empty = encode_rle(np.zeros((HEIGHT, WIDTH), np.bool_))
    request = _request(clip, {"frame_index": 0, "mask": empty}, ids=[1], interval={"start_frame": 0, "end_frame": 2})
    rows = _rows((await provider.video_mask_generation(request)).data)
    assert [row[:2] for row in rows] == [(0, 1), (1, 1), (2, 1)]
    assert not rows[0][2].any()


async def test_the_seeds_request_and_real_errors(provider: EdgeProvider, clip: list[bytes]) -> None:
    turned = {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}
    for keyframe, message in (
        ({"frame_index": 0, "mask": turned}, r"the mask is \[144, 96\], frames are \[96, 144\]"),
        ({"frame_index": COUNT, "points": [{"x": 1, "y": 1}]}, "Frame 12 is asked for"),
        ({"frame_index": 1, "points": [{"x": 9000, "y": 1}]}, "object 1 on frame 1: .*outside"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            await provider.video_mask_generation(_request(clip, keyframe, ids=[1]))
    broken = [*clip[:4], b"broken", *clip[5:]]
    job = await provider.submit_video_mask_generation_job(
        _request(broken, {"frame_index": 0, "points": [{"x": 30, "y": 35}]}, ids=[1])
    )
    await asyncio.to_thread(until, lambda: provider._video.status(job.job_id).status != "running", 60)
    status = await provider.get_video_mask_generation_job(job.job_id)
    assert status.status == "failed"
    assert str(status.detail).startswith("Frame 4: ")
    assert status.metadata["frames_done"] == 4
    request = EdgeVideoMaskGenerationInput(clip[:3], "tiny", [0, 1, 2], [0, 1, 2], boxes=[[10, 20, 40, 52]])
    assert (await provider.video_mask_generation(request)).data.frame_indexes == [0, 1, 2]


async def test_a_packed_bundle_and_an_image_bundle(
    tracking_bundle: Path, tiny_bundle: Path, clip: list[bytes], tmp_path: Path
) -> None:
    packed = pack(tracking_bundle, tmp_path / "tiny.pxe")
    provider = EdgeProvider(store=BundleStore(tmp_path / "empty"), threads=1, device="cpu")
    await provider.instantiate_model("edge", ModelConfig("packed", VIDEOS, packed))
    names = {m.name: m.task for m in await provider.list_models()}
    assert (names["packed"], names["packed-image"]) == (VIDEOS, "image_mask_generation")
    request = _request(clip[:2], {"frame_index": 0, "points": [{"x": 30, "y": 35}]}, ids=[1], model="packed")
    result = await provider.video_mask_generation(request)
    assert result.metadata["bundle"] == Bundle.open(tracking_bundle, verify=False).manifest.name
    with pytest.raises(TaskNotSupportedError, match="does image_mask_generation, not video") as caught:
        await provider.instantiate_model("edge", ModelConfig("images", VIDEOS, tiny_bundle))
    assert "export" in caught.value.action
    await provider.close()


async def test_memory_is_declared_seen_and_flat(
    provider: EdgeProvider, tracking_bundle: Path, clip: list[bytes]
) -> None:
    """Maps of a tracker stay within what one object declares, and a longer clip keeps run lengths alone."""
    long = [clip[i % COUNT] for i in range(120)]
    request = _request(long, {"frame_index": 30, "points": [{"x": 30, "y": 35}]}, ids=[1])
    request.interval = {"start_frame": 0, "end_frame": 119}
    await provider.video_mask_generation(
        _request(clip[:3], {"frame_index": 0, "points": [{"x": 30, "y": 35}]}, ids=[1])
    )
    slot = provider._table.get("tiny-video")
    assert slot is not None
    loaded = slot.model
    assert loaded is not None
    assert loaded.video is not None
    idle = loaded.use().caches  # type: ignore[misc]
    one = map_bytes(loaded.predictor.constants, loaded.video.video)  # type: ignore[attr-defined]
    declared = declared_needs(tracking_bundle, LoadOptions(cache_mb=0, device="cpu"), VIDEOS).caches
    maps, traced = [], []
    tracemalloc.start()
    try:
        async for frame in provider.stream_video_mask_generation(request):
            maps.append(sum(t.maps for t in loaded.trackers))
            lengths = sum(len(tracked.mask.counts) for tracked in frame.objects)
            traced.append((tracemalloc.get_traced_memory()[0], lengths))
    finally:
        tracemalloc.stop()
    assert max(maps) == (declared or 0) // one // TRACKED_OBJECTS
    assert maps[65] == maps[118]  # as many for every frame from there on
    # The least of ten frames: the others were looked at in the middle of the next frame's work.
    grown = min(size for size, _ in traced[110:]) - min(size for size, _ in traced[70:80])
    lengths = sum(length for _, length in traced[70:])
    # Neither decoded frames (41 kB) nor masks (14 kB) are kept.
    assert grown < lengths + 50 * 7000, f"{grown} bytes for {lengths} bytes of run lengths"
    assert not loaded.trackers
    # The maps are gone; what is left are features of the two prompted frames.
    assert loaded.use().caches == loaded.predictor.memory().caches == 2 * (idle or 0)  # type: ignore[misc, attr-defined]
    booking = slot.booking
    assert booking is not None
    assert booking.need.caches is not None
    assert booking.need.caches >= (declared or 0)
