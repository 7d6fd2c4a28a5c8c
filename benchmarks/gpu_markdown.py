"""A GPU report as Markdown: what ran on which device, what did not and why, and the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .report import environment_lines, markdown

_MARKS = {"passed": "passed", "failed": "**failed**", "timed out": "**timed out**", "skipped": "skipped"}
_SHOWN = 20
"""Lines of one list that are shown; the JSON has all."""


def to_markdown(content: dict[str, Any]) -> str:
    """The report.

    Args:
        content: What `gpu_report` writes as JSON.
    """
    steps = content["steps"]
    lines = ["# Pixano Edge on a GPU", "", _headline(content), "", *(f"- {f}" for f in _facts(content)), ""]
    rows = [(s["name"], _MARKS[s["status"]], f"{s['seconds']:.1f}", _cell(s["reason"])) for s in steps]
    lines += ["## Steps", "", markdown(("step", "result", "seconds", "why"), rows), ""]
    for step in steps:
        section = _SECTIONS.get(step["name"].split(" ")[0])
        body = section(step["details"]) if section is not None and step["details"] else []
        if body:
            lines += [f"## {step['name']}", "", f"`{step['command']}`", "", *body, ""]
    return "\n".join(lines).rstrip() + "\n"


def answers_text(details: dict[str, Any]) -> str:
    """How far whole answers are from PyTorch's, from what `verify --json` prints for any family."""
    if "tokens" in details:
        return f"{details['equal']} of {details['tokens']} tokens are PyTorch's, {details['ties']} more are ties"
    if "boxes" in details:
        return (
            f"{details['boxes']} boxes, {details['unmatched']} without a partner among PyTorch's, corners within "
            f"{details['max_box']:.2f} px, scores within {details['max_score']:.1e}"
        )
    return f"mask IoU with PyTorch mean {details['mean_iou']:.4f}, lowest {details['min_iou']:.4f}"


def _headline(content: dict[str, Any]) -> str:
    gpus = content["environment"]["gpus"]
    counts = {s: sum(step["status"] == s for step in content["steps"]) for s in _MARKS}
    text = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    if not gpus:
        return f"**Nothing was run on a GPU.** {content['gpu_reason']} Steps: {text}."
    names = ", ".join(dict.fromkeys(g["name"] for g in gpus))
    ran = any(s["status"] != "skipped" and s["name"] != "doctor" for s in content["steps"])
    return f"{'Run' if ran else '**Nothing was run**'} on {names} ({content['device']}). Steps: {text}."


def _facts(content: dict[str, Any]) -> list[str]:
    facts = []
    for gpu in content["environment"]["gpus"]:
        total = gpu.get("memory_total")
        facts.append(
            f"cuda:{gpu['index']}: {gpu['name']}, compute capability {gpu['compute_capability']}, driver "
            f"{gpu['driver']}, {gpu['runtime']}, {f'{total / 1e9:.1f} GB' if total else 'memory unknown'}"
        )
    return facts + environment_lines(content["environment"])


def _doctor(details: dict[str, Any]) -> list[str]:
    rows = [(p["name"], "loads" if p["loads"] else "does not load", _cell(p["reason"])) for p in details["providers"]]
    tried = {True: ", loads", False: ", does not work", None: ""}
    rows += [
        (p["name"], f"{p['version']}{tried[p['works']]}" if p["version"] else "absent", _cell(p["reason"]))
        for p in details["gpu_parts"]
    ]
    found = [
        f"- {f['level']}: {f['message']}" + (f" Fix: `{f['action']}`" if f["action"] else "")
        for f in details["findings"]
    ]
    return [markdown(("back end", "state", "why"), rows), "", *found]


def _tests(details: dict[str, Any]) -> list[str]:
    lines = [f"- {text}" for text in details["failures"][:_SHOWN]]
    return lines + [f"- skipped {count}x: {reason}" for reason, count in details["skip_reasons"].items()]


def _verify(details: dict[str, Any]) -> list[str]:
    rows = [
        (t["name"], t["graph"], _number(t["max_rel"]), _number(t["tolerance"]), _number(t["max_abs"]))
        for t in details["tensors"]
    ]
    lines = [
        f"{details['precision']} through {details['backend']} on {details['product']}: {answers_text(details)}, "
        f"{details['samples']} samples.",
        "",
        markdown(("tensor", "graph", "relative error", "tolerance", "absolute error"), rows),
    ]
    notes = [f"- problem: {p}" for p in details["problems"]] + [f"- warning: {w}" for w in details["warnings"]]
    notes += [f"- look at: {a}" for a in (details.get("suspect") or {}).get("advice", [])]
    return [*lines, "", *notes] if notes else lines


def _bench(details: dict[str, Any]) -> list[str]:
    rows = [
        (
            r["case"],
            r["contender"],
            *(f"{1000 * r['wall'][p]:.2f}" for p in ("p50", "p90", "p99")),
            "n/a" if r["device"] is None else f"{1000 * r['device']['p50']:.2f}",
            "n/a" if r["ratio"] is None else f"{r['ratio']:.2f}x",
            _number(r["relative_error"]),
            "n/a" if r["mask_iou"] is None else f"{r['mask_iou']:.4f}",
        )
        for r in details["rows"]
    ]
    columns = (
        "case",
        "contender",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "GPU p50 ms",
        "vs torch fp32",
        "rel. error",
        "mask IoU",
    )
    starts = []
    for name, s in details["starts"].items():
        power = details["powers"].get(name)
        starts.append(
            (
                name,
                *(f"{s[k]:.2f}" for k in ("load", "first", "settle")),
                "n/a" if s["memory"] is None else f"{s['memory'] / 1e6:.0f}",
                "n/a" if power is None else f"{power['watts']:.0f}",
                "n/a" if power is None else f"{power['joules']:.2f}",
            )
        )
    first = ("contender", "load s", "first run s", "settle s", "memory MB", "power W", "J per image")
    notes = [f"- not measured: {name}: {why}" for name, why in details["skipped"].items()]
    notes += [f"- warning: {name}: {text}" for name, said in details["warnings"].items() for text in said[:_SHOWN]]
    return [markdown(columns, rows), "", markdown(first, starts), "", *notes]


def _number(value: float | None) -> str:
    """JSON has no infinity: what is null was not finite, or is not known."""
    return "n/a" if value is None else f"{value:.1e}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_SECTIONS: dict[str, Callable[[dict[str, Any]], Sequence[str]]] = {
    "doctor": _doctor,
    "GPU": _tests,
    "verify": _verify,
    "bench": _bench,
}
