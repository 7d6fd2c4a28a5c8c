"""What is particular to `EdgeProvider` inside Pixano: types, registering with settings, freeing, the launcher."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pixano.inference as pixano
import pytest

from pixano_edge.engine.provider.pixano import PixanoEdgeProvider, register
from tests.clients.material import Clip, Photo, iou


async def test_answers_are_pixanos_own_types(photo: Photo, clip: Clip) -> None:
    provider = PixanoEdgeProvider("http://localhost:1", threads=1)
    request = pixano.ImageMaskGenerationInput(
        image=photo.png, model="sam2-demo", points=[[photo.click]], labels=[[1]], return_logits=True
    )
    result = await provider.image_mask_generation(request)
    assert type(result) is pixano.ImageMaskGenerationResult
    assert type(result.data) is pixano.ImageMaskGenerationOutput
    assert type(result.data.masks[0][0]) is pixano.CompressedRLEData
    assert type(result.data.mask_logits) is pixano.NDArrayData
    assert isinstance(result.data.mask_logits.values, list)
    assert max(iou(mask, photo.truth) for mask in result.data.masks[0]) > 0.7
    ask = {"video": clip.frames[:2], "model": "sam2-demo-video", "objects_ids": [0], "frame_indexes": [0]}
    tracked = await provider.video_mask_generation(pixano.VideoMaskGenerationInput(**ask, points=[[clip.click]]))
    assert type(tracked) is pixano.VideoMaskGenerationResult
    assert type(tracked.data) is pixano.VideoMaskGenerationOutput
    info = await provider.get_server_info()
    assert type(info) is pixano.ServerInfo
    await provider.close()


def test_register_with_settings(tmp_path: Any) -> None:
    register("edge-here", {"store": tmp_path, "autoload": False})
    provider = pixano.get_provider("edge-here", url="http://localhost:1")
    assert asyncio.run(provider.list_models()) == []


async def test_a_dropped_provider_frees_its_models(photo: Photo) -> None:
    """Pixano drops a provider that it connects anew without closing it."""

    def workers() -> int:
        return sum(not thread.daemon or "pixano-edge" in thread.name for thread in threading.enumerate())

    before = workers()
    provider = PixanoEdgeProvider(threads=1)
    await provider.image_mask_generation(pixano.ImageMaskGenerationInput(image=photo.png, model="sam2-demo"))
    assert workers() > before
    del provider
    for _ in range(100):
        gc.collect()
        if workers() <= before:
            return
        await asyncio.sleep(0.05)
    raise AssertionError([thread.name for thread in threading.enumerate()])


def test_the_launcher_hands_over_to_pixanos_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from pixano import cli

    from pixano_edge.engine.plugins import pixano_app

    called: list[bool] = []
    monkeypatch.setattr(cli, "main", lambda: called.append(pixano.is_provider_registered("edge")))
    pixano_app.main()
    assert called == [True]
