"""Prometheus metrics: the three of Pixano's own server, and what the models, queues, caches and devices do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..provider.states import ModelState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
"""Path of requests that no route took, and method of those with a name of their own: labels must stay few."""
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))

_REQUEST_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_STAGE_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_MEMORY_KEYS = ("budget", "reserved", "used", "total", "free", "over")


class Snapshot:
    """Gauges as they are at the moment of a scrape; a collector of `prometheus_client`."""

    def __init__(self) -> None:
        self.models: list[ModelState] = []
        self.memory: list[Mapping[str, Any]] = []
        self.jobs: Mapping[str, int] = {}

    def collect(self) -> Iterable[Metric]:
        """The metrics of the last values set."""
        waiting = GaugeMetricFamily("pixano_edge_queue_waiting", "Requests that run or wait.", labels=["model"])
        depth = GaugeMetricFamily("pixano_edge_queue_depth", "Requests that may run or wait.", labels=["model"])
        steps = GaugeMetricFamily("pixano_edge_tracking_clips", "Clips being tracked in.", labels=["model"])
        loaded = GaugeMetricFamily(
            "pixano_edge_model_loaded", "1 for a model in memory, 0 while it loads.", labels=["model", "device"]
        )
        for one in _merged(self.models):
            waiting.add_metric([one.name], one.waiting)
            depth.add_metric([one.name], one.depth)
            steps.add_metric([one.name], one.steps)
            loaded.add_metric([one.name, one.device], float(one.status == "RUNNING"))
        yield from (waiting, depth, steps, loaded)
        yield from self._caches()
        memory = GaugeMetricFamily(
            "pixano_edge_device_memory_bytes", "Memory of a device, as the books have it.", labels=["device", "kind"]
        )
        for account in self.memory:
            for key in _MEMORY_KEYS:
                if isinstance(account.get(key), int | float):
                    memory.add_metric([str(account["device"]), key], account[key])
        yield memory
        jobs = GaugeMetricFamily("pixano_edge_jobs", "Tracking jobs that are kept.", labels=["state"])
        for state, count in self.jobs.items():
            jobs.add_metric([state], count)
        yield jobs

    def _caches(self) -> Iterable[Metric]:
        counters = {
            key: CounterMetricFamily(f"pixano_edge_cache_{key}", f"Image embeddings: {what}.", labels=["model"])
            for key, what in (
                ("hits", "found in the cache"),
                ("misses", "computed"),
                ("evictions", "dropped for others"),
            )
        }
        size = GaugeMetricFamily("pixano_edge_cache_bytes", "Image embeddings in the cache.", labels=["model"])
        entries = GaugeMetricFamily("pixano_edge_cache_entries", "Image embeddings in the cache.", labels=["model"])
        for one in _merged(self.models):
            if one.cache is not None:
                for key, counter in counters.items():
                    counter.add_metric([one.name], getattr(one.cache, key))
                size.add_metric([one.name], one.cache.bytes)
                entries.add_metric([one.name], one.cache.entries)
        yield from (*counters.values(), size, entries)


def _merged(models: Iterable[ModelState]) -> list[ModelState]:
    """One state per name: while a model is loaded anew for tracking there are two, and the later one counts."""
    return list({one.name: one for one in models}.values())


class Metrics:
    """All metrics of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pixano_inference_requests", "HTTP requests.", ["method", "path", "status"], registry=self.registry
        )
        self.duration = Histogram(
            "pixano_inference_request_duration_seconds",
            "Time from the head of a request to the end of its answer.",
            ["method", "path"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "pixano_inference_requests_in_progress", "HTTP requests under way.", ["method"], registry=self.registry
        )
        self.inference = Histogram(
            "pixano_edge_inference_seconds",
            "Time of answers inside the engine, waiting included.",
            ["model", "capability"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.errors = Counter(
            "pixano_edge_inference_errors",
            "Inference requests without an answer; 499: the client left.",
            ["capability", "status"],
            registry=self.registry,
        )
        self.stages = Histogram(
            "pixano_edge_stage_seconds",
            "Time of each stage on a model's thread.",
            ["model", "stage"],
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        self.snapshot = Snapshot()
        self.registry.register(self.snapshot)
        ProcessCollector(registry=self.registry)

    def stage(self, model: str, stage: str, seconds: float) -> None:
        """An `Observer` of the provider."""
        self.stages.labels(model, stage).observe(seconds)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
