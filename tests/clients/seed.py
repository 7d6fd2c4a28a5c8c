"""A stand-in for the HTTP provider of the seed-era Pixano, which no release contains.

Written from the table of its calls: paths, what it sends and what it reads. It follows no redirect, as its client
does, and reads every field that the seed's dataclasses require with ``[]``, so that a missing one fails.
"""

from __future__ import annotations

from datetime import datetime
from types import SimpleNamespace
from typing import Any

import httpx


class SeedError(Exception):
    """What it raises for every failure; carries status and detail."""

    def __init__(self, status: int, detail: Any) -> None:
        super().__init__(f"HTTP {status}: {detail}")
        self.status = status
        self.detail = detail


class SeedProvider:
    """The calls of the seed's provider."""

    def __init__(self, url: str) -> None:
        self.client = httpx.AsyncClient(base_url=url, timeout=60)

    async def close(self) -> None:
        await self.client.aclose()

    async def _json(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self.client.request(method, path, json=body)
        if not answer.is_success:
            raise SeedError(answer.status_code, answer.json()["detail"])
        return answer.json()

    async def connect(self, first: str = "/health") -> None:
        """`first` is ``/health`` in the earlier and ``/ready`` in the later revision."""
        try:
            await self._json("GET", first)
        except SeedError:
            await self._json("GET", "/app/settings/")

    async def list_models(self, task: str | None = None) -> list[Any]:
        models = [SimpleNamespace(name=m["name"], task=m["task"]) for m in await self._json("GET", "/app/models/")]
        return [m for m in models if task in (None, m.task)]

    async def get_server_info(self) -> Any:
        """Fields of both revisions of `ServerInfo`."""
        data = await self._json("GET", "/app/settings/")
        earlier = ("version", "models_loaded", "num_gpus", "gpu_info", "models", "models_to_task", "ready")
        later = ("app_name", "app_version", "app_description", "num_cpus", "num_nodes", "gpus_used", "gpu_to_model")
        return SimpleNamespace(**{key: data[key] for key in (*earlier, *later)})

    async def image_mask_generation(self, **request: Any) -> Any:
        defaults: dict[str, Any] = {
            "image_embedding": None,
            "high_resolution_features": None,
            "reset_predictor": True,
            "points": None,
            "labels": None,
            "boxes": None,
            "num_multimask_outputs": 3,
            "multimask_output": True,
            "return_image_embedding": False,
        }
        return self._result(await self._json("POST", "/tasks/image/mask_generation/", {**defaults, **request}))

    async def video_mask_generation(self, **request: Any) -> Any:
        defaults = {"points": None, "labels": None, "boxes": None}
        return self._result(await self._json("POST", "/tasks/video/mask_generation/", {**defaults, **request}))

    async def image_zero_shot_detection(self, **request: Any) -> Any:
        defaults = {"box_threshold": 0.5, "text_threshold": 0.5}
        return self._result(await self._json("POST", "/tasks/image/zero_shot_detection/", {**defaults, **request}))

    async def text_image_conditional_generation(self, **request: Any) -> Any:
        defaults = {"images": None, "max_new_tokens": 100, "temperature": 1.0}
        path = "/tasks/multimodal/text-image/conditional_generation/"
        return self._result(await self._json("POST", path, {**defaults, **request}))

    @staticmethod
    def _result(answer: Any) -> Any:
        timestamp = datetime.fromisoformat(answer["timestamp"])
        assert timestamp.tzinfo is None
        return SimpleNamespace(
            data=answer["data"],
            id=answer["id"],
            status=answer["status"],
            timestamp=timestamp,
            processing_time=float(answer["processing_time"]),
            metadata=answer["metadata"],
        )
