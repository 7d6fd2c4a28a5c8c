"""Tasks that this version does not do: each method says what is missing. Default timeouts are Pixano's."""

from __future__ import annotations

from typing import Any, NoReturn

from .errors import TaskNotSupportedError


def _absent(task: str, missing: str) -> NoReturn:
    raise TaskNotSupportedError(
        f"{task} is not there yet: this version has no {missing}.", "get_capabilities lists what works."
    )


class AbsentTasks:
    """Mixin of `EdgeProvider`. The method has the name of Pixano 0.8's interface."""

    async def embedding(self, input_data: Any, timeout: float = 60.0) -> Any:
        """Raises `TaskNotSupportedError`."""
        _absent("Embedding images or text", "embedding model")
