"""The plug-in for Pixano's inference server: the real one, on Ray, on this machine. Run with `pytest -m ray`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pixano_edge.engine.provider import (
    EdgeMaskGenerationInput,
    EdgeProvider,
    EdgeVideoMaskGenerationInput,
    ImageZeroShotDetectionInput,
    TextImageConditionalGenerationInput,
)
from tests.clients.kits import Kit
from tests.clients.material import Clip, Photo, iou
from tests.support import environments

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(environments.python("ray") is None, reason=environments.missing("ray")),
]

CONFIG = """
from pixano_inference.configs import DeploymentConfig, ModelConfig

small = DeploymentConfig(num_cpus=0.3, max_replicas=1)
models = [
    ModelConfig(name=name, model_class=kind, model_params={{"path": path, "threads": 1}}, deployment=small)
    for name, kind, path in (
        ("masks", "EdgeSegmentation", "sam2-demo"),
        ("clips", "EdgeTracking", "sam2-demo"),
        ("boxes", "EdgeDetection", "owlv2-demo"),
        ("words", "EdgeVLM", "{words}"),
    )
]
"""
START_S = 300
ATTEMPTS = 3
"""Ray starts half a dozen processes and gives up after 30 s, which is short on two cores that do other things."""


@pytest.fixture(scope="module")
def ray_url(tiny_vlm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``pixano-inference --config`` on a free port; Ray is stopped afterwards, whatever happened."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "models.py").write_text(CONFIG.format(words=tiny_vlm_bundle))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = environments.folder("ray") / "bin"
    command = [home / "pixano-inference", "--port", port, "--num-gpus", 0, "--config", folder / "models.py"]
    log = folder / "log.txt"
    variables = {**environments.variables("ray"), "PIXANO_EDGE_HOME": str(folder / "store")}
    for _ in range(ATTEMPTS):
        with log.open("w") as out:
            server = subprocess.Popen(
                [*map(str, command)], env=variables, stdout=out, stderr=out, start_new_session=True
            )
        try:
            if _ready(f"http://127.0.0.1:{port}", server):
                yield f"http://127.0.0.1:{port}"
                return
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
            subprocess.run([str(home / "ray"), "stop", "--force"], capture_output=True, timeout=120, check=False)
    raise AssertionError(f"the server did not start in {ATTEMPTS} attempts: {log.read_text()[-4000:]}")


def _ready(url: str, server: subprocess.Popen[Any]) -> bool:
    """Waits until the server has loaded its models; False when it ended or takes too long."""
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/v1/ready", timeout=5).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    return False


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit("pixano-inference 0.7.1")


@pytest.fixture
async def client(kit: Kit, ray_url: str) -> AsyncIterator[Any]:
    async with kit.PixanoInferenceClient(ray_url) as client:
        yield client


@pytest.fixture
async def own() -> AsyncIterator[EdgeProvider]:
    provider = EdgeProvider(threads=1)
    yield provider
    await provider.close()


async def test_models_and_interfaces(client: Any) -> None:
    found = {m.name: m for m in await client.list_models()}
    assert {name: (m.capability, m.model_class, m.status) for name, m in found.items()} == {
        "masks": ("segmentation", "EdgeSegmentation", "RUNNING"),
        "clips": ("tracking", "EdgeTracking", "RUNNING"),
        "boxes": ("detection", "EdgeDetection", "RUNNING"),
        "words": ("vlm", "EdgeVLM", "RUNNING"),
    }
    assert found["masks"].interface.embeddings
    assert found["clips"].interface.interval
    assert found["boxes"].interface.thresholds == ["box"]  # this family looks at no other


async def test_masks_are_edge_providers(kit: Kit, client: Any, own: EdgeProvider, photo: Photo) -> None:
    ask = {"image": photo.uri, "points": [[photo.click]], "labels": [[1]]}
    request = kit.SegmentationRequest(model="masks", **ask, return_image_embedding=True, return_logits=True)
    data = (await client.segmentation(request)).data
    reference = EdgeMaskGenerationInput(model="sam2-demo", **ask, return_image_embedding=True, return_logits=True)
    expected: Any = (await own.image_mask_generation(reference)).data
    assert [m.counts for m in data.masks[0]] == [m.counts for m in expected.masks[0]]
    assert np.array_equal(data.scores.to_numpy(), expected.scores.to_array())
    assert np.array_equal(data.image_embedding.to_numpy(), expected.image_embedding.to_array())
    assert np.array_equal(data.mask_logits.to_numpy(), expected.mask_logits.to_array())
    assert max(iou(mask, photo.truth) for mask in data.masks[0]) > 0.7
    features = {
        "image_embedding": data.image_embedding,
        "high_resolution_features": data.high_resolution_features,
        "mask_input": data.mask_logits,
    }
    again = (await client.segmentation(kit.SegmentationRequest(model="masks", **ask, **features))).data
    back: Any = {
        "image_embedding": expected.image_embedding,
        "high_resolution_features": expected.high_resolution_features,
        "mask_input": expected.mask_logits,
    }
    expected = (await own.image_mask_generation(EdgeMaskGenerationInput(model="sam2-demo", **ask, **back))).data
    assert [m.counts for m in again.masks[0]] == [m.counts for m in expected.masks[0]]


async def test_tracking_sync_and_as_job(kit: Kit, client: Any, own: EdgeProvider, clip: Clip) -> None:
    point = kit.TrackingPointPrompt(x=clip.click[0], y=clip.click[1], label=1)
    request = kit.TrackingRequestV1(
        model="clips",
        video=clip.uris,
        objects_ids=[4],
        frame_indexes=[0],
        interval=kit.TrackingInterval(start_frame=0, end_frame=3),
        keyframes=[kit.keyframe(0, points=[point])],
    )
    frames = (await client.tracking(request)).data.frames
    reference = EdgeVideoMaskGenerationInput(
        video=clip.frames,  # type: ignore[arg-type]
        model="sam2-demo-video",
        objects_ids=[4],
        frame_indexes=[0],
        points=[[clip.click]],
        interval={"start_frame": 0, "end_frame": 3},
    )
    expected = (await own.video_mask_generation(reference)).data
    assert [frame.frame_index for frame in frames] == expected.frame_indexes == [0, 1, 2, 3]
    assert [frame.objects[0].mask.counts for frame in frames] == [mask.counts for mask in expected.masks]
    assert {frame.objects[0].track_id for frame in frames} == {4}
    job = await client.submit_tracking_job(request)
    done = await client.wait_for_job(job.job_id, poll_interval=0.2, timeout=60)
    assert done.status == "completed"
    assert done.data.frames == frames


async def test_detection(kit: Kit, client: Any, own: EdgeProvider, photo: Photo) -> None:
    ask = {"image": photo.uri, "classes": [photo.words], "box_threshold": 0.1}
    data = (await client.detection(kit.DetectionRequest(model="boxes", **ask))).data
    expected = (await own.image_zero_shot_detection(ImageZeroShotDetectionInput(model="owlv2-demo", **ask))).data
    assert (data.boxes, data.scores, data.classes) == (expected.boxes, expected.scores, expected.classes)
    assert data.boxes


async def test_text(kit: Kit, client: Any, tiny_vlm_bundle: Path, tmp_path: Path, photo: Photo) -> None:
    """A small model that knows nothing, so greedy answers of the same tokens are the proof."""
    ask = {"prompt": "What is this?", "images": [photo.uri], "max_new_tokens": 6, "temperature": 0.0}
    shutil.copytree(tiny_vlm_bundle, tmp_path / "words")
    own = EdgeProvider(store=tmp_path, threads=1)
    try:
        reference = TextImageConditionalGenerationInput("words", **ask)
        expected = (await own.text_image_conditional_generation(reference)).data
    finally:
        await own.close()
    data = (await client.vlm(kit.VLMRequest(model="words", **ask))).data
    assert data.generated_text == expected.generated_text
    assert data.usage.prompt_tokens == expected.usage.prompt_tokens > 6
    assert data.usage.completion_tokens == expected.usage.completion_tokens == 6
    parts = [{"type": "image_url", "image_url": {"url": photo.uri}}, {"type": "text", "text": "What is this?"}]
    messages = {**ask, "prompt": [{"role": "user", "content": parts}], "images": None}
    assert (await client.vlm(kit.VLMRequest(model="words", **messages))).data.generated_text == data.generated_text
    other = {**ask, "prompt": "Where is it?"}
    assert (await client.vlm(kit.VLMRequest(model="words", **other))).data.generated_text != data.generated_text


async def test_its_media_policy_holds(kit: Kit, client: Any, tmp_path: Path, photo: Photo) -> None:
    """A path outside its roots and an address within this machine are refused: the plug-in reads by its policy."""
    (tmp_path / "photo.png").write_bytes(photo.png)
    for image in (str(tmp_path / "photo.png"), "http://127.0.0.1:1/photo.png", "data:image/png;base64,AAAA"):
        with pytest.raises(kit.PixanoInferenceError) as refused:
            await client.segmentation(kit.SegmentationRequest(model="masks", image=image))
        assert refused.value.status_code == 500  # what that server answers to any fault of a model
    answer = await client.segmentation(kit.SegmentationRequest(model="masks", image=photo.uri, boxes=[photo.box]))
    assert answer.data.masks  # and goes on
