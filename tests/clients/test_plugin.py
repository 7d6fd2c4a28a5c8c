"""The plug-in's classes without Ray: as a replica uses them, within one process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clients.material import Clip, Photo, iou
from tests.test_packaging import PROJECT

pytest.importorskip("pixano_inference", reason="needs pixano-edge[test]")

from pixano_inference import models as pixano
from pixano_inference.configs import DeploymentConfig, ModelConfig
from pixano_inference.schemas import TrackingInterval, TrackingKeyframe, TrackingPointPrompt
from pixano_inference.utils import media_security
from pixano_inference.utils.media_security import MediaPolicy, MediaSecurityError

from pixano_edge.engine.plugins import ray_models
from pixano_edge.engine.provider import EdgeProvider, TextImageConditionalGenerationInput
from pixano_edge.engine.provider import ModelConfig as Configured

PATHS = {"EdgeSegmentation": "sam2-demo", "EdgeTracking": "sam2-demo", "EdgeDetection": "owlv2-demo"}


@pytest.fixture(autouse=True)
def policy() -> Iterator[MediaPolicy]:
    """The server's policy of this process, as its replica sets it."""
    policy = MediaPolicy()
    media_security.set_media_policy(policy)
    yield policy
    media_security.set_media_policy(None)


def deployed(kind: str, **params: Any) -> Any:
    """An instance as a replica makes it, not loaded."""
    params = {"path": PATHS.get(kind, "nothing"), "threads": 1, **params}
    config = ModelConfig(name="one", model_class=kind, model_params=params).to_deployment_config()
    return getattr(ray_models, kind)(config)


@pytest.fixture
def replica(request: pytest.FixtureRequest) -> Iterator[Any]:
    model = deployed(request.param)
    model.load_model()
    yield model
    model.unload()


def test_entry_point_is_declared_and_loads() -> None:
    declared = PROJECT["project"]["entry-points"]["pixano_inference.models"]
    assert declared == {"pixano_edge": "pixano_edge.engine.plugins.ray_models"}
    found = {e.name: e.value for e in entry_points(group="pixano_inference.models")}
    assert not found or found["pixano_edge"] == declared["pixano_edge"]


@pytest.mark.parametrize("kind", ["EdgeSegmentation", "EdgeTracking", "EdgeDetection", "EdgeVLM"])
def test_registered_under_its_own_name_with_typed_parameters(kind: str) -> None:
    """Registered name and class name agree, or a type and a text in a configuration differ in their parameters."""
    assert pixano.ModelClassRegistry.get(kind).__name__ == kind
    by_name = ModelConfig(name="x", model_class=kind, model_params={"path": "p"})
    by_type = ModelConfig(name="x", model_class=getattr(ray_models, kind), model_params={"path": "p"})
    assert by_name.model_params == by_type.model_params
    assert by_name.model_params.device == "auto"
    with pytest.raises(ValueError, match="devise"):
        ModelConfig(name="x", model_class=kind, model_params={"path": "p", "devise": "cpu"})
    with pytest.raises(ValueError, match="path"):
        ModelConfig(name="x", model_class=kind)


@pytest.mark.parametrize("replica", ["EdgeSegmentation"], indirect=True)
def test_masks_from_a_thread_that_did_not_load(replica: Any, photo: Photo) -> None:
    ask = pixano.SegmentationInput(image=photo.png, points=[[photo.click]], labels=[[1]], return_image_embedding=True)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(replica.predict(ask)))
    thread.start()
    thread.join()
    (first,) = answers
    assert max(iou(mask, photo.truth) for mask in first.masks[0]) > 0.7
    assert first.mask_logits is None
    again = pixano.SegmentationInput(
        image=photo.uri,
        points=[[photo.click]],
        labels=[[1]],
        image_embedding=first.image_embedding,
        high_resolution_features=first.high_resolution_features,
    )
    assert replica.predict(again).masks == first.masks
    assert replica.interface.prompts == ["points", "box", "mask"]


async def test_loads_within_a_running_loop(photo: Photo) -> None:
    """Where Ray makes its replicas."""
    assert asyncio.get_running_loop()
    model = deployed("EdgeSegmentation")
    model.load_model()
    assert model.predict(pixano.SegmentationInput(image=photo.png)).masks
    model.unload()
    model.unload()


@pytest.mark.parametrize("replica", ["EdgeTracking"], indirect=True)
def test_tracking(replica: Any, clip: Clip) -> None:
    x, y = clip.click
    keyframe = TrackingKeyframe(frame_index=0, points=[TrackingPointPrompt(x=x, y=y, label=1)])
    ask = pixano.TrackingInput(
        video=clip.uris,
        objects_ids=[9],
        frame_indexes=[0],
        keyframes=[keyframe],
        interval=TrackingInterval(start_frame=0, end_frame=2),
    )
    output = replica.predict(ask)
    assert [frame.frame_index for frame in output.frames] == [0, 1, 2]
    assert np.mean([iou(f.objects[0].mask, t) for f, t in zip(output.frames, clip.truth)]) > 0.6
    legacy = pixano.TrackingInput(
        video=clip.frames, objects_ids=[9], frame_indexes=[0], points=[[clip.click]], labels=[[1]], propagate=False
    )
    assert replica.predict(legacy).frames == output.frames[:1]


@pytest.mark.parametrize("replica", ["EdgeDetection"], indirect=True)
def test_detection(replica: Any, photo: Photo) -> None:
    output = replica.predict(pixano.DetectionInput(image=photo.png, classes=[photo.words], box_threshold=0.1))
    assert np.abs(np.array(output.boxes[0]) - photo.box).max() < 40
    assert replica.interface.thresholds == ["box"]
    with pytest.raises(ValueError, match="classes"):
        replica.predict(pixano.DetectionInput(image=photo.png))


def test_text_is_the_providers(tiny_vlm_bundle: Path, photo: Photo) -> None:
    """Greedy answers of a small model that knows nothing: the same tokens, from a text and from messages."""
    ask: dict[str, Any] = {"prompt": "What is this?", "max_new_tokens": 6, "temperature": 0.0}
    model = deployed("EdgeVLM", path=str(tiny_vlm_bundle))
    model.load_model()
    try:
        output = model.predict(pixano.VLMInput(**ask, images=[photo.uri]))
        parts = [{"type": "image_url", "image_url": {"url": photo.uri}}, {"type": "text", "text": ask["prompt"]}]
        messages = {**ask, "prompt": [{"role": "user", "content": parts}]}
        assert model.predict(pixano.VLMInput(**messages)).generated_text == output.generated_text
        assert model.interface.images.min == 0
        with pytest.raises(MediaSecurityError):
            model.predict(pixano.VLMInput(**ask, images=["http://127.0.0.1:1/photo.png"]))
    finally:
        model.unload()

    async def directly() -> Any:
        provider = EdgeProvider(threads=1)
        try:
            settings = {"device": "cpu", "threads": 1}
            config = Configured("one", "text_image_conditional_generation", str(tiny_vlm_bundle), settings)
            await provider.instantiate_model("edge", config)
            request = TextImageConditionalGenerationInput("one", **ask, images=[photo.uri])
            return (await provider.text_image_conditional_generation(request)).data
        finally:
            await provider.close()

    expected = asyncio.run(directly())
    assert output.generated_text == expected.generated_text
    assert output.usage.prompt_tokens == expected.usage.prompt_tokens > 6
    assert output.usage.completion_tokens == expected.usage.completion_tokens == 6
    assert output.usage.total_tokens == expected.usage.prompt_tokens + 6


def test_cpu_unless_the_deployment_has_gpus() -> None:
    given: list[str] = []

    class Recording(ray_models.EdgeSegmentation):
        def _wait(self, work: Any) -> Any:
            work.close()
            raise RuntimeError

    for gpus, device in ((0.0, "cpu"), (0.5, "auto")):
        config = ModelConfig(
            name="one",
            model_class="EdgeSegmentation",
            model_params={"path": "sam2-demo"},
            deployment=DeploymentConfig(num_gpus=gpus),
        ).to_deployment_config()
        model = Recording(config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                ray_models, "ModelConfig", lambda name, task, path, settings: given.append(settings["device"])
            )
            with pytest.raises(RuntimeError):
                model.load_model()
        assert given.pop() == device


def test_faults_are_plain_errors_with_what_to_do(photo: Photo) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        deployed("EdgeSegmentation", path="nowhere").load_model()
    with pytest.raises(ValueError, match="video_mask_generation"):
        deployed("EdgeTracking", path="owlv2-demo").load_model()
    with pytest.raises(ValueError, match="text_image"):
        deployed("EdgeVLM", path="sam2-demo").load_model()


@pytest.mark.parametrize("replica", ["EdgeSegmentation"], indirect=True)
def test_the_servers_media_policy_holds(replica: Any, photo: Photo, policy: MediaPolicy, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(photo.png)
    for refused in (str(path), path, "http://127.0.0.1:1/photo.png", "ftp://host/photo.png"):
        with pytest.raises(MediaSecurityError):
            replica.predict(pixano.SegmentationInput(image=refused))
    policy.media_roots = (tmp_path,)
    assert replica.predict(pixano.SegmentationInput(image=str(path))).masks
    policy.allowed_image_formats = frozenset({"JPEG"})
    for source in (photo.png, photo.uri, str(path)):
        with pytest.raises(ValueError, match="JPEG"):
            replica.predict(pixano.SegmentationInput(image=source))
    policy.allowed_image_formats = frozenset({"PNG"})
    assert replica.predict(pixano.SegmentationInput(image=photo.png)).masks
