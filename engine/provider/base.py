"""The provider interface of the seed-era Pixano as an abstract class, re-declared from its table of members."""

from __future__ import annotations

import abc

from .errors import TaskNotSupportedError
from .types import (
    ImageMaskGenerationInput,
    ImageMaskGenerationResult,
    ImageZeroShotDetectionInput,
    ImageZeroShotDetectionResult,
    InferenceTask,
    ModelConfig,
    ModelInfo,
    ProviderCapabilities,
    ServerInfo,
    TextImageConditionalGenerationInput,
    TextImageConditionalGenerationResult,
    VideoMaskGenerationInput,
    VideoMaskGenerationResult,
)

_MANAGED = "Model deployment is managed by the server administrator"


class InferenceProvider(abc.ABC):
    """Answers inference requests. Every method but `name` is a coroutine; timeouts are seconds.

    All methods raise `InferenceError` or one of its subclasses, `InferenceTimeoutError` when the time is over.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name of this kind of provider."""

    @abc.abstractmethod
    async def get_capabilities(self) -> ProviderCapabilities:
        """Tasks and limits."""

    @abc.abstractmethod
    async def list_models(self, task: InferenceTask | None = None) -> list[ModelInfo]:
        """Models that requests may name, of one task when given."""

    @abc.abstractmethod
    async def get_server_info(self) -> ServerInfo:
        """State of the machine and its models."""

    async def instantiate_model(self, provider: str, config: ModelConfig, timeout: int = 60) -> None:
        """Loads a model; raises `TaskNotSupportedError` unless a provider overrides it."""
        raise TaskNotSupportedError(_MANAGED)

    async def delete_model(self, model_name: str) -> None:
        """Unloads a model; raises `TaskNotSupportedError` unless a provider overrides it."""
        raise TaskNotSupportedError(_MANAGED)

    @abc.abstractmethod
    async def image_mask_generation(
        self, input_data: ImageMaskGenerationInput, timeout: float = 60.0
    ) -> ImageMaskGenerationResult:
        """Masks from points, boxes or masks on one image."""

    @abc.abstractmethod
    async def video_mask_generation(
        self, input_data: VideoMaskGenerationInput, timeout: float = 120.0
    ) -> VideoMaskGenerationResult:
        """Masks of prompted objects through the frames of a video."""

    @abc.abstractmethod
    async def image_zero_shot_detection(
        self, input_data: ImageZeroShotDetectionInput, timeout: float = 60.0
    ) -> ImageZeroShotDetectionResult:
        """Boxes of the named classes on one image."""

    @abc.abstractmethod
    async def text_image_conditional_generation(
        self, input_data: TextImageConditionalGenerationInput, timeout: float = 60.0
    ) -> TextImageConditionalGenerationResult:
        """Text about images."""
