"""What a monitor may read of the models without waiting: queues, caches, and the time of each stage as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models.sam2.cache import CacheStats

Observer = Callable[[str, str, float], None]
"""Gets model name, stage and seconds, on the model's thread, after each request or step; must return at once."""

NOT_STARTED = "NOT_STARTED"
DEPLOYING = "DEPLOYING"
RUNNING = "RUNNING"
DEPLOY_FAILED = "DEPLOY_FAILED"
"""States of a model, in the words of Pixano's own server: offered and not loaded, loading, loaded, or it did not load
by itself the last time."""


@dataclass(frozen=True)
class ModelState:
    """One model in memory or on its way there.

    Attributes:
        name: What requests call it.
        task: What it was loaded for.
        status: `DEPLOYING` or `RUNNING`.
        device: Where it is; empty until it is loaded.
        waiting: Requests that run or wait.
        steps: Background steps that run or wait, one for each clip that it tracks in.
        depth: Requests that may run or wait.
        cache: Counters of its cache of embeddings; None where it has none.
    """

    name: str
    task: str
    status: str
    device: str
    waiting: int
    steps: int
    depth: int
    cache: CacheStats | None
