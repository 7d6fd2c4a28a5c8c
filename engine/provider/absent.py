"""Tasks that this version does not do: each method says what is missing. Default timeouts are Pixano's."""

from __future__ import annotations

from typing import Any, NoReturn

from .errors import TaskNotSupportedError
from .types import TextImageConditionalGenerationInput, TextImageConditionalGenerationResult


def _absent(task: str, missing: str) -> NoReturn:
    raise TaskNotSupportedError(
        f"{task} is not there yet: this version has no {missing}.", "get_capabilities lists what works."
    )


class AbsentTasks:
    """Mixin of `EdgeProvider`. The last two methods have the names of Pixano 0.8's interface."""

    async def text_image_conditional_generation(
        self, input_data: TextImageConditionalGenerationInput, timeout: float = 60.0
    ) -> TextImageConditionalGenerationResult:
        """Raises `TaskNotSupportedError`."""
        _absent("Text about images", "vision-language model (SmolVLM)")

    async def vlm(self, input_data: Any, timeout: float = 60.0) -> Any:
        """Raises `TaskNotSupportedError`."""
        _absent("Text about images", "vision-language model (SmolVLM)")

    async def embedding(self, input_data: Any, timeout: float = 60.0) -> Any:
        """Raises `TaskNotSupportedError`."""
        _absent("Embedding images or text", "embedding model")
