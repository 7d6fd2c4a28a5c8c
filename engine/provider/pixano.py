"""`EdgeProvider` as a provider of the Pixano that is installed in this process.

Importing this module registers `PixanoEdgeProvider` as ``edge`` in Pixano's own registry. It is a subclass of Pixano's
abstract class, takes Pixano's requests, returns Pixano's dataclasses and raises Pixano's errors. Written for Pixano
0.8 and 0.7.2, which name the same things differently: every name is looked up in the installed package, in the order
of the candidates here. Pixano finds providers only in modules that were imported: `plugins/pixano_app.py` starts
Pixano with this one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from ..errors import EdgeError
from .edge import EdgeProvider
from .errors import MissingPixanoError
from .models import ModelTable
from .statuses import code_of, status_of
from .types import InferenceTask, ProviderCapabilities

try:
    from pixano import inference as installed
    from pixano.inference import types as kinds
except ImportError as error:
    raise MissingPixanoError(
        f"Pixano cannot be imported here: {error}.",
        "Use the environment that Pixano runs in, or install it there: pip install 'pixano>=0.8,<0.9'",
    ) from error

MAX_NEW_TOKENS = 512
"""What Pixano's own client sends where a request for text does not say how much."""

_TASKS = {
    InferenceTask.MASK_GENERATION.value: ("image_mask_generation", "segmentation"),
    InferenceTask.VIDEO_MASK_GENERATION.value: ("video_mask_generation", "tracking"),
    InferenceTask.OBJECT_DETECTION.value: ("detection",),
    InferenceTask.TEXT_GENERATION.value: ("vlm",),
}
"""Our task -> what Pixano calls it, 0.8 first."""


def _kind(*names: str) -> Any:
    """The first of some dataclasses that the installed Pixano has."""
    for name in names:
        if hasattr(kinds, name):
            return getattr(kinds, name)
    raise MissingPixanoError(
        f"The installed Pixano has no {' or '.join(names)}.",
        "Install one that this version knows: pip install 'pixano>=0.8,<0.9'",
    )


def _make(kind: Any, **values: Any) -> Any:
    """A dataclass from those values that it has fields for: versions differ in what they keep."""
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def _known_tasks() -> dict[str, str]:
    """Our task -> its value in the installed Pixano."""
    values = {task.value for task in kinds.InferenceTask}
    return {ours: theirs for ours, names in _TASKS.items() for theirs in names if theirs in values}


def _array(data: Any) -> Any:
    """An `NDArrayData` of ours as Pixano's."""
    if data is None:
        return None
    values = data.values if isinstance(data.values, list) else data.values.tolist()
    return kinds.NDArrayData(values=values, shape=list(data.shape))


def _mask(rle: Any) -> Any:
    return kinds.CompressedRLEData(size=list(rle.size), counts=rle.counts)


def _rows(data: Any) -> Any:
    return _make(
        _kind("VideoMaskGenerationOutput", "TrackingOutput"),
        objects_ids=list(data.objects_ids),
        frame_indexes=list(data.frame_indexes),
        masks=[_mask(mask) for mask in data.masks],
    )


def _result(kind: Any, data: Any, answer: Any) -> Any:
    """Pixano's envelope around `data`, with the facts of our `answer`."""
    return _make(
        kind,
        data=data,
        status=answer.status,
        timestamp=answer.timestamp,
        processing_time=answer.processing_time,
        metadata=dict(answer.metadata),
        id=answer.id,
    )


def _job(status: Any) -> Any:
    return _make(
        _kind("VideoMaskGenerationJobStatus", "TrackingJobStatus"),
        job_id=status.job_id,
        status=status.status,
        detail=status.detail,
        data=None if status.data is None else _rows(status.data),
        metadata=dict(status.metadata),
        timestamp=status.timestamp,
        processing_time=status.processing_time,
    )


@contextmanager
def _pixano_errors() -> Iterator[None]:
    """Turns our errors into Pixano's: the one that its routes answer with a status, or before 0.8 that of our name."""
    try:
        yield
    except EdgeError as error:
        with_status = getattr(installed, "InferenceRequestError", None)
        if with_status is not None:
            status = status_of(error)
            raise with_status(status, code_of(status), str(error)) from error
        raise getattr(installed, type(error).__name__, installed.InferenceError)(str(error)) from error


def _free(table: ModelTable) -> None:
    table.close()


@installed.register_provider("edge")
class PixanoEdgeProvider(EdgeProvider, installed.InferenceProvider):  # type: ignore[misc]
    """Local inference inside Pixano's process.

    Pixano makes a new one for every "connect" and drops the last one without closing it: what that loaded is freed
    when it is collected.

    Args:
        url: Only shown: Pixano asks for one. Nothing is sent there.
        api_key: Ignored.
        settings: Keywords of `EdgeProvider`; see `register` for how to set them where Pixano makes the provider.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, **settings: Any) -> None:
        super().__init__(url, api_key, **settings)
        self.url = url
        weakref.finalize(self, _free, self._table).atexit = False

    async def list_models(self, task: Any = None) -> list[Any]:
        """Models with Pixano's task names; those of a task that Pixano does not have are left out.

        Args:
            task: Pixano's `InferenceTask` or its value, or None.
        """
        wanted = None if task is None else str(getattr(task, "value", task))
        names = _known_tasks()
        with _pixano_errors():
            infos = await super().list_models()
        return [
            _make(
                kinds.ModelInfo,
                name=info.name,
                task=names[info.task],
                capability=names[info.task],
                model_path=info.model_path,
                model_class=info.model_class,
                status="RUNNING",
            )
            for info in infos
            if info.task in names and wanted in (None, names[info.task])
        ]

    async def get_server_info(self) -> Any:
        """State of this process, as far as the installed Pixano has fields for it."""
        with _pixano_errors():
            info = await super().get_server_info()
        names = _known_tasks()
        tasks = {name: names[task] for name, task in info.models_to_task.items() if task in names}
        return _make(
            kinds.ServerInfo,
            **{
                **{field.name: getattr(info, field.name) for field in fields(info)},
                "models": list(tasks),
                "models_to_task": tasks,
                "models_to_capability": tasks,
                "gpus_used": float(len(info.gpus_used)),
            },
        )

    async def get_capabilities(self) -> Any:
        """Tasks of the models that are offered; asked for by Pixano before 0.8."""
        names = _known_tasks()
        with _pixano_errors():
            found = {names.get(info.task) for info in await super().list_models()}
        tasks = [task for task in kinds.InferenceTask if task.value in found]
        kind = getattr(kinds, "ProviderCapabilities", ProviderCapabilities)
        return kind(tasks=tasks, max_image_size=self.max_image_side)

    async def image_mask_generation(self, input_data: Any, timeout: float = 60.0) -> Any:
        """As `EdgeProvider.image_mask_generation`, with Pixano's types."""
        with _pixano_errors():
            answer = await super().image_mask_generation(input_data, timeout)
        data: Any = answer.data
        finer = data.high_resolution_features
        output = _make(
            _kind("ImageMaskGenerationOutput", "SegmentationOutput"),
            masks=[[_mask(mask) for mask in masks] for masks in data.masks],
            scores=_array(data.scores),
            image_embedding=_array(data.image_embedding),
            high_resolution_features=None if finer is None else [_array(one) for one in finer],
            mask_logits=_array(data.mask_logits),
        )
        return _result(_kind("ImageMaskGenerationResult", "SegmentationResult"), output, answer)

    async def segmentation(self, input_data: Any, timeout: float = 60.0) -> Any:
        """`image_mask_generation` by the name of Pixano 0.7."""
        return await self.image_mask_generation(input_data, timeout)

    async def video_mask_generation(self, input_data: Any, timeout: float = 120.0) -> Any:
        """As `EdgeProvider.video_mask_generation`, with Pixano's types."""
        with _pixano_errors():
            answer = await super().video_mask_generation(input_data, timeout)
        return _result(_kind("VideoMaskGenerationResult", "TrackingResult"), _rows(answer.data), answer)

    async def tracking(self, input_data: Any, timeout: float = 120.0) -> Any:
        """`video_mask_generation` by the name of Pixano 0.7."""
        return await self.video_mask_generation(input_data, timeout)

    async def submit_video_mask_generation_job(self, input_data: Any, timeout: float = 30.0) -> Any:
        """As `EdgeProvider.submit_video_mask_generation_job`, with Pixano's types."""
        with _pixano_errors():
            return _job(await super().submit_video_mask_generation_job(input_data, timeout))

    async def get_video_mask_generation_job(self, job_id: str, timeout: float = 30.0) -> Any:
        """As `EdgeProvider.get_video_mask_generation_job`, with Pixano's types."""
        with _pixano_errors():
            return _job(await super().get_video_mask_generation_job(job_id, timeout))

    async def cancel_video_mask_generation_job(self, job_id: str, timeout: float = 30.0) -> Any:
        """As `EdgeProvider.cancel_video_mask_generation_job`, with Pixano's types."""
        with _pixano_errors():
            return _job(await super().cancel_video_mask_generation_job(job_id, timeout))

    async def submit_tracking_job(self, input_data: Any, timeout: float = 30.0) -> Any:
        """`submit_video_mask_generation_job` by the name of Pixano 0.7."""
        return await self.submit_video_mask_generation_job(input_data, timeout)

    async def get_tracking_job(self, job_id: str, timeout: float = 30.0) -> Any:
        """`get_video_mask_generation_job` by the name of Pixano 0.7."""
        return await self.get_video_mask_generation_job(job_id, timeout)

    async def cancel_tracking_job(self, job_id: str, timeout: float = 30.0) -> Any:
        """`cancel_video_mask_generation_job` by the name of Pixano 0.7."""
        return await self.cancel_video_mask_generation_job(job_id, timeout)

    async def detection(self, input_data: Any, timeout: float = 60.0) -> Any:
        """As `EdgeProvider.image_zero_shot_detection`, with Pixano's types."""
        with _pixano_errors():
            answer = await super().image_zero_shot_detection(input_data, timeout)
        data = answer.data
        output = _make(kinds.DetectionOutput, boxes=data.boxes, scores=data.scores, classes=data.classes)
        return _result(kinds.DetectionResult, output, answer)

    async def vlm(self, input_data: Any, timeout: float = 60.0) -> Any:
        """As `EdgeProvider.text_image_conditional_generation`, with Pixano's types."""
        tokens = input_data.max_new_tokens
        request: Any = SimpleNamespace(
            model=input_data.model,
            prompt=input_data.prompt,
            images=input_data.images,
            max_new_tokens=MAX_NEW_TOKENS if tokens is None else tokens,
            temperature=input_data.temperature,
        )
        with _pixano_errors():
            answer = await super().text_image_conditional_generation(request, timeout)
        data, usage = answer.data, answer.data.usage
        output = _make(
            kinds.VLMOutput,
            generated_text=data.generated_text,
            usage=_make(
                kinds.UsageInfo,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
            ),
            generation_config=dict(data.generation_config),
        )
        return _result(kinds.VLMResult, output, answer)

    async def embedding(self, input_data: Any, timeout: float = 60.0) -> Any:
        """Raises that there is no embedding model, as an error that Pixano answers with a status."""
        with _pixano_errors():
            return await super().embedding(input_data, timeout)


def register(name: str = "edge", settings: Mapping[str, Any] | None = None) -> type[PixanoEdgeProvider]:
    """Registers it under `name` with other defaults: Pixano itself passes ``url`` and ``api_key`` only.

    Args:
        name: What Pixano's ``provider_type`` is then; ``edge`` is replaced.
        settings: Keywords of `EdgeProvider`.

    Returns:
        The class that was registered.
    """
    defaults = dict(settings or {})

    class Configured(PixanoEdgeProvider):
        def __init__(self, url: str | None = None, api_key: str | None = None, **more: Any) -> None:
            super().__init__(url, api_key, **{**defaults, **more})

    Configured.__name__ = Configured.__qualname__ = PixanoEdgeProvider.__name__
    installed.register_provider(name)(Configured)
    return Configured
