"""What the output of each benchmark means: figures, accuracy checks with their limits, bars, contenders left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .results import OURS, Bar, Check, Figure, judge

REFERENCE = "PyTorch fp32"

FP32_ERROR = 1e-4
"""Largest relative error of an fp32 answer, as export asks of every graph."""
FP32_TRACKED = 1e-3
"""The same for tracked logits: rounding errors pass through the memories."""
FP32_IOU = 0.999
REDUCED_IOU = 0.99
"""Least IoU of masks with PyTorch fp32, for fp32 and for reduced precision."""
BOX_PIXELS = {True: 0.5, False: 2.0}
SCORE = {True: 1e-3, False: 2e-2}
"""Largest distance of a box's corner and of its score, in fp32 and in reduced precision."""


@dataclass(frozen=True)
class Read:
    """Of one part."""

    title: str
    figures: list[Figure]
    checks: list[Check] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)


Reader = Callable[[Mapping[str, Any]], Read]


def is_full(contender: str) -> bool:
    """Whether a contender says that it computes in fp32."""
    return "fp32" in contender


def _timed(case: str, row: Mapping[str, Any], seconds: str = "seconds") -> Figure:
    s, ratio = row[seconds], row.get("ratio")
    return Figure(
        case, row["contender"], s["p50"], p90=s["p90"], p99=s["p99"], count=s["count"], ratio=ratio,
        baseline="" if ratio is None else REFERENCE,
    )  # fmt: skip


def _masks(rows: list[Mapping[str, Any]], case: Callable[[Mapping[str, Any]], str], error: float) -> list[Check]:
    """Relative error (fp32 alone) and IoU of the project's own contenders."""
    checks = []
    for row in rows:
        who = row["contender"]
        if not who.startswith(OURS):
            continue
        value, iou, full = row["relative_error"], row["mask_iou"], is_full(who)
        if value is None and iou is None:
            checks.append(judge(f"mask IoU, {case(row)}", who, None, ">=", FP32_IOU if full else REDUCED_IOU))
        if value is not None and full:
            checks.append(judge(f"relative error, {case(row)}", who, value, "<=", error))
        if iou is not None:
            checks.append(judge(f"mask IoU, {case(row)}", who, iou, ">=", FP32_IOU if full else REDUCED_IOU))
    return checks


def _no_torch(rows: list[Mapping[str, Any]]) -> dict[str, str]:
    """PyTorch, where no row has it."""
    if any(row["contender"].startswith("PyTorch") for row in rows):
        return {}
    return {"PyTorch": "not installed, or no checkpoint of this bundle is at hand: answers were compared with nothing"}


def read_segment(out: Mapping[str, Any]) -> Read:
    rows = out["rows"]
    return Read(
        f"{out['bundle']}: encoder, decoder, whole click",
        [_timed(row["case"], row) for row in rows],
        _masks(rows, lambda row: row["case"], FP32_ERROR),
        left_out={**_no_torch(rows), **out.get("left_out", {})},
    )


def read_track(out: Mapping[str, Any]) -> Read:
    def case(row: Mapping[str, Any]) -> str:
        return f"one frame, {row['objects']} object(s)"

    rows = out["rows"]
    return Read(
        f"{out['bundle']}: tracking, full memory bank",
        [_timed(case(row), row) for row in rows],
        _masks(rows, case, FP32_TRACKED),
        left_out={**_no_torch(rows), **out.get("left_out", {})},
    )


def read_detect(out: Mapping[str, Any]) -> Read:
    checks = []
    for found in out["accuracy"]:
        who = found["contender"]
        if who.startswith(OURS):
            full = is_full(who)
            checks += [
                judge("boxes without a partner", who, found["unmatched"], "<=", 0),
                judge("worst corner, pixels", who, found["worst_box"], "<=", BOX_PIXELS[full]),
                judge("worst score", who, found["worst_score"], "<=", SCORE[full]),
            ]
    ours = sorted({row["contender"] for row in out["rows"] if row["contender"].startswith(OURS)})
    checks += [judge("boxes", who, None, "<=", 0) for who in ours if not any(c.contender == who for c in checks)]
    return Read(
        f"{out['bundle']}: detection, {len(out['classes'])} classes",
        [_timed(row["case"], row) for row in out["rows"]],
        checks,
        left_out={**_no_torch(out["rows"]), **out.get("left_out", {})},
    )


def read_describe(out: Mapping[str, Any]) -> Read:
    figures = []
    for row in out["rows"]:
        has = row["ratio"] is not None
        first = next(
            (r["first"] for r in out["rows"] if r["case"] == row["case"] and r["contender"] == REFERENCE), None
        )
        figures += [
            Figure(f"first token, {row['case']}", row["contender"], row["first"], count=out["rounds"],
                   ratio=first / row["first"] if first else None, baseline=REFERENCE if first else ""),
            Figure(f"tokens per second, {row['case']}", row["contender"], row["rate"], "1/s", True,
                   count=out["rounds"], ratio=row["ratio"], baseline=REFERENCE if has else ""),
        ]  # fmt: skip
    checks = []
    for found in out["accuracy"]:
        who = found["contender"]
        if not who.startswith(OURS) or found["max_rel"] is None:
            continue
        if is_full(who):
            checks.append(judge("worst logits, relative", who, found["max_rel"], "<=", FP32_TRACKED))
            checks.append(judge("tokens that differ", who, found["tokens"] - found["equal"], "<=", 0))
        else:
            reason = "reduced precision changes answers; bench describe-quality judges them on a trained model"
            checks.append(Check("worst logits, relative", who, found["max_rel"], FP32_TRACKED, "<=", None, reason))
    return Read(
        f"{out['bundle']}: answers of {out['tokens']} tokens",
        figures,
        checks or [judge("worst logits, relative", f"{OURS} fp32", None, "<=", FP32_TRACKED)],
        left_out={**_no_torch(out["rows"]), **out.get("left_out", {})},
    )


def read_serve(out: Mapping[str, Any]) -> Read:
    figures = []
    for row in out["rows"]:
        for name, label in (("http", f"{OURS} over HTTP"), ("engine", f"{OURS} in process")):
            figures.append(_timed(row["case"], {"contender": label, name: row[name]}, name))
        figures.append(_timed(f"{row['case']}: overhead", {"contender": f"{OURS}: HTTP", "o": row["overhead"]}, "o"))
    for row in out["load"]:
        case = f"{row['clients']} client(s) at once"
        figures.append(_timed(case, {"contender": OURS, **row}))
        figures.append(Figure(f"{case}: answers", OURS, row["per_second"], "1/s", True, count=row["requests"]))
    wait = out["while_tracking"]
    if wait is not None:
        figures.append(_timed("click while a clip is tracked", {"contender": OURS, "c": wait["click"]}, "c"))
    errors = sum(row["errors"] for row in out["load"])
    return Read(
        f"{out['bundle']}: over HTTP, photo of 2 megapixels", figures, [judge("failed requests", OURS, errors, "<=", 0)]
    )


def read_startup(out: Mapping[str, Any]) -> Read:
    cold, memory = out["cold_start"], out["memory"]
    figures = [
        _timed("import of engine.provider", {"contender": f"{OURS}: wall clock", "t": out["import"]["wall"]}, "t"),
        _timed("import of engine.provider", {"contender": f"{OURS}: CPU time", "t": out["import"]["cpu"]}, "t"),
        _timed("serve until ready", {"contender": OURS, "t": cold["ready"]}, "t"),
        _timed("serve until it answers at all", {"contender": OURS, "t": cold["healthy"]}, "t"),
    ]
    for request in out["requests"]:
        kinds = {"first": "first", "steady": "later ones", "known_words": "later ones with known words"}
        figures += [
            _timed(f"request: {request['task']}", {"contender": f"{OURS}: {text}", **request}, name)
            for name, text in kinds.items()
            if name in request
        ]
    if memory["peak"] is not None:
        figures += [Figure("memory of the server", f"{OURS}: {name}", memory[name], "B") for name in ("peak", "idle")]
    checks = [
        judge(f"answers that differ from the first one, {r['task']}", OURS, r["different"], "<=", 0)
        for r in out["requests"]
    ]
    bars = [Bar(**{k: v for k, v in bar.items() if k != "met"}) for bar in out["bars"]]
    return Read(f"start-up with {', '.join(out['models'])}", figures, checks, bars)


def read_memory(out: Mapping[str, Any]) -> Read:
    per = 500 / out["calls"]
    work = out["traced_peak"] - out["traced_before"] - out["answer"]
    return Read(
        f"{out['bundle']}: memory over {out['calls']} clicks",
        [
            Figure("resident set after the clicks", OURS, out["rss_after"], "B"),
            Figure("work memory of a click", OURS, work, "B"),
        ],
        bars=[
            Bar("resident set gained in 500 clicks", out["rss_drift"] * per, 5e6, "<=", "B"),
            Bar("Python memory gained in 500 clicks", out["traced_drift"] * per, 1e5, "<=", "B"),
        ],
    )


def read_graphs(out: Mapping[str, Any]) -> Read:
    baseline = out["baseline"]
    figures, checks = [], []
    for row in out["rows"]:
        s, who = row["seconds"], row["contender"]
        figures.append(
            Figure(row["graph"], who, s["p50"], p90=s["p90"], p99=s["p99"], count=s["count"], ratio=row["ratio"],
                   baseline=baseline)
        )  # fmt: skip
        if who.startswith(OURS):
            checks.append(judge(f"relative error, {row['graph']}", who, row["relative_error"], "<=", FP32_ERROR))
    return Read(f"{out['bundle']}: each graph by itself", figures, checks, left_out=dict(out["left_out"]))


def read_scaling(out: Mapping[str, Any]) -> Read:
    figures = [
        Figure(f"{c['case']}, {c['axis']} {p['x']:g}", OURS, p["seconds"]["p50"], p90=p["seconds"]["p90"],
               p99=p["seconds"]["p99"], count=p["seconds"]["count"])
        for c in out["curves"] for p in c["points"]
    ]  # fmt: skip
    return Read(f"{out['bundle']}: how times grow", figures, left_out=dict(out["left_out"]), curves=out["curves"])


READERS: dict[str, Reader] = {
    "segment": read_segment,
    "track": read_track,
    "detect": read_detect,
    "detect-dino": read_detect,
    "describe": read_describe,
    "serve": read_serve,
    "startup": read_startup,
    "memory": read_memory,
    "graphs": read_graphs,
    "graphs-detect": read_graphs,
    "scaling": read_scaling,
}
"""By part."""
