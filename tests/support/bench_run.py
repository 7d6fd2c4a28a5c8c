"""Made-up output of the benchmarks, and a runner that answers with it instead of measuring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixano_edge.benchmarks.metrics import latency
from pixano_edge.benchmarks.plan import Wanted
from pixano_edge.benchmarks.results import Run
from pixano_edge.benchmarks.run_all import run_all
from pixano_edge.benchmarks.steps import Finished

TIMES = (1.0, 1.01, 1.02, 0.99, 0.98, 1.0, 1.01, 0.99, 1.0, 1.0)
"""Around one, with a percent of noise."""


def times(p50: float) -> dict[str, Any]:
    """Percentiles of ten measurements."""
    return vars(latency([p50 * t for t in TIMES]))


def segment_output(engine: float = 0.5, torch: float = 1.0, error: float = 1e-6, iou: float = 1.0) -> dict[str, Any]:
    """As `bench segment --json`, with an engine and PyTorch."""
    rows = [
        ("encoder", "pixano-edge fp32", engine, error, None),
        ("encoder", "PyTorch fp32", torch, 0.0, None),
        ("encoder", "PyTorch bf16", 0.8 * torch, 2e-2, None),
        ("whole click to 960x540", "pixano-edge fp32", engine / 10, None, iou),
        ("whole click to 960x540", "PyTorch fp32", torch / 10, None, 1.0),
    ]
    return {
        "benchmark": "segment", "bundle": "sam2-demo", "rounds": 10,
        "left_out": {"OpenVINO fp32": "not installed: pip install 'pixano-edge[openvino-runtime]'"},
        "rows": [
            {"case": case, "contender": who, "seconds": times(p50),
             "ratio": (torch if case == "encoder" else torch / 10) / p50, "relative_error": e, "mask_iou": i}
            for case, who, p50, e, i in rows
        ],
    }  # fmt: skip


MEMORY = {
    "benchmark": "memory", "bundle": "sam2-demo", "calls": 500, "rss_before": 10**8, "rss_after": 10**8 + 10**6,
    "rss_drift": 10**6, "traced_before": 10**6, "traced_peak": 3 * 10**6, "answer": 19 * 10**5, "traced_drift": 2_000,
}  # fmt: skip


class Answers:
    """In place of `steps.run_command`: prints what is given for a part, and remembers the commands.

    Args:
        outputs: Part to its output, or to a `Finished`.
    """

    def __init__(self, **outputs: Any) -> None:
        self.outputs = outputs
        self.commands: list[tuple[str, ...]] = []

    def __call__(self, command: Sequence[str], limit: float, folder: Path | None = None) -> Finished:
        self.commands.append(tuple(command))
        out = self.outputs[command[command.index("bench") + 1]]
        return out if isinstance(out, Finished) else Finished(0, json.dumps(out), "", 0.1)


def example_run(segment: dict[str, Any] | None = None, **settings: Any) -> Run:
    """A run of segment and memory with made-up figures, on a machine that nobody else used."""
    from dataclasses import replace

    runner = Answers(segment=segment or segment_output(), memory=MEMORY)
    run = run_all(Wanted(parts=("segment", "memory"), threads=1, **settings), "pixano-edge bench all", run=runner)
    return Run(run.settings, run.environment, tuple(replace(part, busy=0.0, seconds=1.0) for part in run.parts))
