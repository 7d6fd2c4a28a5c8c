"""Tasks that this version does not do: each method says what is missing. Default timeouts are Pixano's."""

from __future__ import annotations

from typing import Any, NoReturn

from .errors import TaskNotSupportedError
from .types import (
    ImageZeroShotDetectionInput,
    ImageZeroShotDetectionResult,
    TextImageConditionalGenerationInput,
    TextImageConditionalGenerationResult,
    VideoMaskGenerationInput,
    VideoMaskGenerationResult,
)

_ACTION = "get_capabilities lists what works; annotate frames one by one with image_mask_generation meanwhile."


def _tracking() -> NoReturn:
    raise TaskNotSupportedError(
        "Tracking through a video is not there yet: this version has no run time for SAM 2's memory graphs.", _ACTION
    )


def _absent(task: str, missing: str) -> NoReturn:
    raise TaskNotSupportedError(
        f"{task} is not there yet: this version has no {missing}.", "get_capabilities lists what works."
    )


class AbsentTasks:
    """Mixin of `EdgeProvider`. The last seven methods have the names of Pixano 0.8's interface."""

    async def video_mask_generation(
        self, input_data: VideoMaskGenerationInput, timeout: float = 120.0
    ) -> VideoMaskGenerationResult:
        """Raises `TaskNotSupportedError`."""
        _tracking()

    async def image_zero_shot_detection(
        self, input_data: ImageZeroShotDetectionInput, timeout: float = 60.0
    ) -> ImageZeroShotDetectionResult:
        """Raises `TaskNotSupportedError`."""
        _absent("Detection from class names", "detector (Grounding DINO, OWLv2)")

    async def text_image_conditional_generation(
        self, input_data: TextImageConditionalGenerationInput, timeout: float = 60.0
    ) -> TextImageConditionalGenerationResult:
        """Raises `TaskNotSupportedError`."""
        _absent("Text about images", "vision-language model (SmolVLM)")

    async def submit_video_mask_generation_job(self, input_data: Any, timeout: float = 30.0) -> Any:
        """Raises `TaskNotSupportedError`."""
        _tracking()

    async def get_video_mask_generation_job(self, job_id: str, timeout: float = 30.0) -> Any:
        """Raises `TaskNotSupportedError`."""
        _tracking()

    async def cancel_video_mask_generation_job(self, job_id: str, timeout: float = 30.0) -> Any:
        """Raises `TaskNotSupportedError`."""
        _tracking()

    async def detection(self, input_data: Any, timeout: float = 60.0) -> Any:
        """Raises `TaskNotSupportedError`."""
        _absent("Detection", "detector (Grounding DINO, OWLv2)")

    async def vlm(self, input_data: Any, timeout: float = 60.0) -> Any:
        """Raises `TaskNotSupportedError`."""
        _absent("Text about images", "vision-language model (SmolVLM)")

    async def embedding(self, input_data: Any, timeout: float = 60.0) -> Any:
        """Raises `TaskNotSupportedError`."""
        _absent("Embedding images or text", "embedding model")
