"""Bundles as models of Pixano's inference server on Ray (``pixano-inference``), found by its entry points.

Each replica holds an `EdgeProvider` with one model. The server calls `predict` on a thread of its own, another one than
`load_model` ran on: the model works on the provider's thread in both cases, so no context of CUDA or TensorRT ever
changes threads.

A configuration names the classes here by their names, see docs/pixano.md::

    ModelConfig(name="sam2", model_class="EdgeSegmentation", model_params={"path": "/models/sam2.1-tiny"})
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

from ..errors import EdgeError
from ..provider import EdgeProvider, InferenceTask, ModelConfig, ModelInfo
from ..provider.errors import MissingPixanoError
from ..provider.settings import DEFAULT_CACHE_MB
from ..provider.types import ArrayData, NDArrayData
from . import ray_media

try:
    from pixano_inference import models as pixano
    from pixano_inference.configs import BaseModelParams, register_model_params
    from pixano_inference.models.capabilities import get_capability
    from pixano_inference.schemas import CompressedRLE, NDArrayFloat
except ImportError as error:
    raise MissingPixanoError(
        f"The server of Pixano Inference cannot be imported here: {error}.",
        "Install it with: pip install 'pixano-inference[server]>=0.7.1,<0.8'",
    ) from error

T = TypeVar("T")

LOAD_TIMEOUT_S = 600.0
"""As long as the server waits for a deployment."""


@register_model_params("EdgeSegmentation")
@register_model_params("EdgeTracking")
@register_model_params("EdgeDetection")
@register_model_params("EdgeVLM")
class EdgeModelParams(BaseModelParams):  # type: ignore[misc]
    """Parameters of a model; ``path`` is a bundle's folder, a ``.pxe`` file, or a bundle's name in the store.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``auto`` is the CPU unless the deployment has GPUs.
        backend: ``auto``, ``onnxruntime`` or ``tensorrt``.
        precision: ``auto``, ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``int4``.
        threads: Threads of one inference; None lets the back end choose.
        cache_mb: Budget of the model's cache in MiB.
        verify: Check the hashes of the bundle's files at loading.
    """

    device: str = "auto"
    backend: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    cache_mb: float = DEFAULT_CACHE_MB
    verify: bool = True


class _Loop:
    """An event loop on a thread of its own: coroutines from any thread, also from one that runs a loop itself."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pixano-edge-plugin", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _EdgeModel:
    """What all capabilities share; mixed into the server's base classes."""

    task: ClassVar[InferenceTask]
    config: Any
    _provider: EdgeProvider | None = None
    _loop: _Loop | None = None
    _info: ModelInfo | None = None

    def load_model(self) -> None:
        """Loads the bundle; called once per replica.

        Raises:
            ValueError: The bundle is not there, damaged, or of another task.
        """
        params = EdgeModelParams.model_validate(self.config.model_params)
        settings = params.model_dump(exclude={"path"}, exclude_none=True)
        if params.device == "auto" and not self.config.resources.num_gpus:
            settings["device"] = "cpu"
        self._loop = _Loop()
        self._provider = EdgeProvider(autoload=False, **ray_media.limits())
        model = ModelConfig(self.config.name, self.task.value, params.path, settings)
        self._wait(self._provider.instantiate_model("edge", model, LOAD_TIMEOUT_S))
        (self._info,) = [m for m in self._wait(self._provider.list_models()) if m.name == self.config.name]

    def unload(self) -> None:
        """Frees the model."""
        if self._loop is not None and self._provider is not None:
            self._wait(self._provider.close())
            self._loop.close()
        self._loop = self._provider = None

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        try:
            return self._loop.wait(work)
        except EdgeError as error:
            # A plain error: it crosses processes whatever its class needs.
            raise ValueError(str(error)) from None

    def _loaded(self) -> EdgeProvider:
        assert self._provider is not None, "load_model comes first"
        return self._provider

    def _timeout(self) -> float:
        """Seconds after which the server has given up on a request, so that its work stops here, too."""
        return float(self.config.timeout_s or get_capability(self.config.capability).default_timeout_s)

    def _request(self, given: Any, **values: Any) -> Any:
        """A request for the provider: the fields of `given` and of `values`, which win."""
        fields = {name: getattr(given, name) for name in type(given).model_fields}
        return SimpleNamespace(**{**fields, "model": self.config.name, **values})


def _array(data: NDArrayData | None) -> Any:
    return None if data is None else NDArrayFloat.from_numpy(data.to_array())


def _given(array: Any) -> ArrayData | None:
    return None if array is None else ArrayData.from_array(array.to_numpy())


def _mask(rle: Any) -> Any:
    return CompressedRLE(size=list(rle.size), counts=rle.counts)


@pixano.register_model("EdgeSegmentation")
class EdgeSegmentation(_EdgeModel, pixano.SegmentationModel):  # type: ignore[misc]
    """Masks on images."""

    task = InferenceTask.MASK_GENERATION

    @property
    def interface(self) -> Any:
        """What SAM 2 reads and answers."""
        return pixano.SegmentationInterface(
            prompts=["points", "box", "mask"], multimask=True, embeddings=True, outputs=["mask", "score", "logits"]
        )

    def predict(self, input: Any) -> Any:
        """Masks for P prompts; a `SegmentationInput` to a `SegmentationOutput`."""
        finer = input.high_resolution_features
        request = self._request(
            input,
            image=ray_media.image(input.image),
            image_embedding=_given(input.image_embedding),
            high_resolution_features=None if finer is None else [_given(one) for one in finer],
            mask_input=_given(input.mask_input),
            answer_arrays=True,
        )
        data: Any = self._wait(self._loaded().image_mask_generation(request, self._timeout())).data
        finer = data.high_resolution_features
        return pixano.SegmentationOutput(
            masks=[[_mask(mask) for mask in masks] for masks in data.masks],
            scores=_array(data.scores),
            image_embedding=_array(data.image_embedding),
            high_resolution_features=None if finer is None else [_array(one) for one in finer],
            mask_logits=_array(data.mask_logits),
        )


@pixano.register_model("EdgeTracking")
class EdgeTracking(_EdgeModel, pixano.TrackingModel):  # type: ignore[misc]
    """Marked objects through a clip."""

    task = InferenceTask.VIDEO_MASK_GENERATION

    @property
    def interface(self) -> Any:
        """What SAM 2 reads and answers."""
        return pixano.TrackingInterface(
            prompts=["points", "box", "mask"], interval=True, outputs=["mask", "box", "score"]
        )

    def predict(self, input: Any) -> Any:
        """A `TrackingInput` to a `TrackingOutput`: every object on every frame."""
        interval, keyframes = input.interval, input.keyframes
        request = self._request(
            input,
            video=ray_media.video(input.video),
            interval=None if interval is None else interval.model_dump(),
            keyframes=None if keyframes is None else [keyframe.model_dump() for keyframe in keyframes],
        )
        data: Any = self._wait(self._loaded().video_mask_generation(request, self._timeout())).data
        return pixano.TrackingOutput(
            frames=[
                pixano.TrackedFrame(
                    frame_index=frame.frame_index,
                    objects=[
                        pixano.TrackedObject(
                            track_id=found.track_id, box=found.box, score=found.score, mask=_mask(found.mask)
                        )
                        for found in frame.objects
                    ],
                )
                for frame in data.frames
            ]
        )


@pixano.register_model("EdgeDetection")
class EdgeDetection(_EdgeModel, pixano.DetectionModel):  # type: ignore[misc]
    """Boxes of named classes on images."""

    task = InferenceTask.OBJECT_DETECTION

    @property
    def interface(self) -> Any:
        """What zero-shot detectors read and answer; only some look at the threshold for text."""
        phrases = self._info is not None and self._info.model_class == "GroundingDinoDetector"
        thresholds = ["box", "text"] if phrases else ["box"]
        return pixano.DetectionInterface(classes="open", thresholds=thresholds, outputs=["box", "score", "class"])

    def predict(self, input: Any) -> Any:
        """A `DetectionInput` to a `DetectionOutput`."""
        request = self._request(input, image=ray_media.image(input.image))
        data = self._wait(self._loaded().image_zero_shot_detection(request, self._timeout())).data
        return pixano.DetectionOutput(boxes=data.boxes, scores=data.scores, classes=data.classes)


@pixano.register_model("EdgeVLM")
class EdgeVLM(_EdgeModel, pixano.VLMModel):  # type: ignore[misc]
    """Text about images."""

    task = InferenceTask.TEXT_GENERATION

    @property
    def interface(self) -> Any:
        """What chat models for images read."""
        return pixano.VLMInterface(prompt=["text", "messages"], images=pixano.ImageRange(min=0))

    def predict(self, input: Any) -> Any:
        """A `VLMInput` to a `VLMOutput`."""
        request = self._request(input, images=ray_media.images(input.images))
        data = self._wait(self._loaded().text_image_conditional_generation(request, self._timeout())).data
        usage = data.usage
        return pixano.VLMOutput(
            generated_text=data.generated_text,
            usage=pixano.UsageInfo(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
            ),
            generation_config=dict(data.generation_config),
        )
