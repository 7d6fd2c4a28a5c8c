"""The report of a calibration: one HTML file to read and one JSON file to compute with.

``python -m pixano_edge.calibration.report report.json -o folder`` draws it again from the JSON file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import typer

from pixano_edge.calibration.page import document, folded, items, key, picture, table, verdict
from pixano_edge.calibration.plots import ACCENT, BAD, GOOD, Bar, Dot, bars, histogram, scatter
from pixano_edge.calibration.result import (
    BlockResult,
    CalibrationResult,
    Speed,
    TensorRange,
    VariantResult,
    WorstSample,
)
from pixano_edge.engine.cli.output import bytes_text, make_folder, milliseconds, print_error, replacing, to_json
from pixano_edge.engine.errors import EdgeError

HTML_NAME = "report.html"
JSON_NAME = "report.json"
MOST_BARS = 24
MOST_RANGES = 24
WORST = 10


def write_report(result: CalibrationResult, folder: Path) -> tuple[Path, Path]:
    """Writes ``report.html`` and ``report.json``, each in one step, over older ones.

    Args:
        result: Of the run.
        folder: Made when it is not there.

    Returns:
        Paths of both.

    Raises:
        EdgeError: The folder cannot be written, the disk is full, or a picture is no PNG.
    """
    html, data = render(result), to_json(result.to_dict()) + "\n"
    make_folder(folder)
    for name, text in ((JSON_NAME, data), (HTML_NAME, html)):
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return folder / HTML_NAME, folder / JSON_NAME


def read_result(file: Path) -> CalibrationResult:
    """The result that `write_report` wrote as JSON.

    Raises:
        EdgeError: It cannot be read, or is no such result.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EdgeError(f"'{file}' cannot be read as JSON: {error}.", f"Give a calibration's {JSON_NAME}.") from error
    return CalibrationResult.from_dict(content)


def render(result: CalibrationResult) -> str:
    """The whole page."""
    title = f"Calibration of {result.bundle}"
    body = [
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="muted">{escape(f"{result.architecture} ({result.family}), {result.created}")}</p></header>',
        _headline(result.variants),
        items("notes", result.notes),
    ]
    if result.variants:
        body += ["<h2>Variants</h2>", _variants(result.variants), _sizes(result.variants), _speeds(result.variants)]
        body.append(_memory(result.variants))
    for variant in result.variants:
        body += _variant(variant)
    body += [*_data(result), *_run(result)]
    return document(title, [part for part in body if part])


def headline(variant: VariantResult) -> str:
    """One sentence about a variant."""
    held_out, budget = variant.held_out, variant.budget
    if held_out is None:
        reached = f"was refused before {budget.metric} was measured"
    else:
        sign = "≥" if budget.met(held_out.mean) else "<"
        reached = (
            f"{budget.metric} {_value(held_out.mean)} {sign} {budget.at_least:g} on {len(held_out.samples)} held-out "
            "samples"
        )
    told = [reached, f"{_percent(variant.size_ratio)} of fp32's size"]
    if speeds := _matched(variant):
        slow, fast = next((pair for pair in speeds if pair[0].what == "pipeline"), speeds[0])
        told.append(f"{_times(slow, fast)} ({fast.what}, {fast.backend})")
    return ", ".join(told)


def _headline(variants: Sequence[VariantResult]) -> str:
    if not variants:
        return items("problems", ["No variant was made."])
    cards = []
    for variant in variants:
        kind = "passed" if variant.passed else "failed"
        cards.append(
            f'<li class="{kind}"><strong>{escape(variant.name)}: {verdict(variant.passed, _word(variant))}</strong>'
            f"{escape(headline(variant))}.</li>"
        )
    return f'<ul class="lead">{"".join(cards)}</ul>'


def _word(variant: VariantResult) -> str:
    if variant.passed:
        return "passed, in the bundle" if variant.published else "passed, not put into the bundle"
    return "failed, not put into the bundle" if not variant.published else "failed, yet in the bundle"


def _variants(variants: Sequence[VariantResult]) -> str:
    columns = ("variant", "verdict", "metric", "held out", "worst", "budget", "on calibration data", "layers", "size")
    rows = []
    for v in variants:
        layers, of_layers = sum(g.layers for g in v.graphs), sum(g.of_layers for g in v.graphs)
        worst = min((s.value for s in v.held_out.samples), default=math.nan) if v.held_out else math.nan
        rows.append(
            (
                v.name,
                verdict(v.passed, "passed" if v.passed else "failed"),
                v.budget.metric,
                _value(v.held_out.mean) if v.held_out else "-",
                _value(worst) if v.held_out else "-",
                f"{v.budget.at_least:g}",
                _value(v.on_calibration.mean) if v.on_calibration else "-",
                f"{layers} of {of_layers}" if of_layers else "-",
                f"{bytes_text(v.bytes)} of {bytes_text(v.fp32_bytes)} ({_percent(v.size_ratio)})",
            )
        )
    found = table(columns, rows, right=(*columns[3:7], "layers", "size"))
    truths = [(v.name, v.truth) for v in variants if v.truth is not None]
    if truths:
        found += "<h3>Against ground truth</h3>" + table(
            ("variant", "metric", "fp32", "this variant", "difference", "samples"),
            [
                (n, t.metric, _value(t.fp32), _value(t.variant), f"{t.variant - t.fp32:+.4f}", str(t.samples))
                for n, t in truths
            ],
            right=("fp32", "this variant", "difference", "samples"),
        )
    return found


def _sizes(variants: Sequence[VariantResult]) -> str:
    found = "<h3>Accuracy over size</h3>"
    for metric in dict.fromkeys(v.budget.metric for v in variants):
        same = [v for v in variants if v.budget.metric == metric]
        dots = [Dot("fp32", 1.0, 1.0, ACCENT)]
        dots += [Dot(v.name, v.size_ratio, v.held_out.mean, GOOD if v.passed else BAD) for v in same if v.held_out]
        found += f'<div class="plot" tabindex="0">{scatter(dots, max(v.budget.at_least for v in same), metric)}</div>'
    return found + key([(ACCENT, "fp32, by definition 1"), (GOOD, "passed"), (BAD, "failed")])


def _speeds(variants: Sequence[VariantResult]) -> str:
    columns = ("variant", "what", "back end", "threads", "fp32 p50", "p50", "p90", "speed", "runs", "clock")
    rows = [
        (
            v.name,
            fast.what,
            fast.backend,
            "default" if fast.threads is None else str(fast.threads),
            milliseconds(slow.p50),
            milliseconds(fast.p50),
            milliseconds(fast.p90),
            _times(slow, fast),
            str(fast.runs),
            fast.clock,
        )
        for v in variants
        for slow, fast in _matched(v)
    ]
    if not rows:
        return "<h3>Speed</h3><p>Not measured.</p>"
    return "<h3>Speed on this machine</h3>" + table(columns, rows, right=columns[4:9])


def _memory(variants: Sequence[VariantResult]) -> str:
    columns = ("variant", "graph", "open", "fp32 open", "while it runs", "fp32 while it runs")
    rows = [
        (v.name, m.graph, *map(_bytes, (m.session, m.fp32_session, m.activations, m.fp32_activations)))
        for v in variants
        for m in v.memory
    ]
    if not rows:
        return "<h3>Memory</h3><p>Not measured.</p>"
    return "<h3>Memory in ONNX Runtime on this machine's CPU</h3>" + table(columns, rows, right=columns[2:])


def _bytes(size: int | None) -> str:
    return "-" if size is None else bytes_text(size)


def _matched(variant: VariantResult) -> list[tuple[Speed, Speed]]:
    """Times of fp32 and of the variant that belong together."""
    plain = {(s.what, s.backend, s.threads, s.clock): s for s in variant.fp32_speed}
    found = [(plain.get((s.what, s.backend, s.threads, s.clock)), s) for s in variant.speed]
    return [(slow, fast) for slow, fast in found if slow is not None]


def _times(slow: Speed, fast: Speed) -> str:
    ratio = slow.p50 / fast.p50 if fast.p50 > 0 else math.nan
    if not math.isfinite(ratio):
        return "-"
    return f"{ratio:.2f}x as fast" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def _variant(v: VariantResult) -> list[str]:
    body = [f"<h2>{escape(v.name)}</h2>", items("problems", v.problems), items("notes", v.notes)]
    if v.graphs:
        rows = [
            (
                g.graph,
                f"{g.layers} of {g.of_layers}" if g.of_layers else "-",
                bytes_text(g.bytes),
                bytes_text(g.fp32_bytes),
                _percent(g.bytes / g.fp32_bytes if g.fp32_bytes else math.nan),
            )
            for g in v.graphs
        ]
        columns = ("graph", "layers quantised", "size", "fp32", "ratio")
        body.append(table(columns, rows, right=columns[1:]))
    if v.blocks:
        body += _blocks(v.blocks, v.budget.metric)
    if v.ranges:
        body += _ranges(v.ranges)
    if v.held_out and v.held_out.samples:
        samples = sorted(v.held_out.samples, key=lambda s: _first_nan(s.value))
        values = table(
            ("sample", v.budget.metric), [(s.name, _value(s.value)) for s in samples], right=(v.budget.metric,)
        )
        body.append(folded(f"All {len(samples)} held-out samples", values))
    if v.worst:
        worst = sorted(v.worst, key=lambda sample: _first_nan(sample.value))[:WORST]
        body.append(f"<h3>Worst samples, side by side ({len(worst)})</h3>")
        body += [_pair(sample, v) for sample in worst]
    return body


def _blocks(blocks: Sequence[BlockResult], metric: str) -> list[str]:
    """What each block costs alone, and which stayed in high precision."""
    measured = [b for b in blocks if b.alone is not None and math.isfinite(b.alone)]
    measured.sort(key=lambda b: b.alone or 0.0)
    body = ["<h3>Sensitivity: what each block costs</h3>"]
    if measured:
        shown = measured[:MOST_BARS]
        rows = [
            Bar(f"{b.graph} {b.name}", max(0.0, 1 - (b.alone or 0.0)), f"{1 - (b.alone or 0.0):.5f}", _kind(b))
            for b in shown
        ]
        body += [
            f"<p>Loss of {escape(metric)} with this block alone quantised; the {len(shown)} largest of "
            f"{len(measured)} measured.</p>",
            f'<div class="plot" tabindex="0">{bars(rows, f"Loss of {metric} by block")}</div>',
            key([(ACCENT, "quantised in this variant"), (BAD, "stayed in high precision")]),
        ]
    else:
        body.append("<p>Not measured block by block.</p>")
    high = [b for b in blocks if not b.quantised]
    if high:
        rows_high = [(b.graph, b.name, b.kind, b.why or "no reason was given") for b in high]
        body.append(
            table(("graph", "block", "kind", "why it stayed in high precision"), rows_high, caption="Not quantised")
        )
    columns = ("graph", "block", "kind", "quantised", "alone", "all but it", "MACs", "weights")
    every = [
        (
            b.graph,
            b.name,
            b.kind,
            "yes" if b.quantised else "no",
            "-" if b.alone is None else f"{b.alone:.5f}",
            "-" if b.without is None else f"{b.without:.5f}",
            f"{b.macs / 1e6:.1f} M",
            bytes_text(b.weight_bytes),
        )
        for b in blocks
    ]
    body.append(folded(f"All {len(blocks)} blocks", table(columns, every, right=columns[4:])))
    return body


def _kind(block: BlockResult) -> str:
    return ACCENT if block.quantised else BAD


def _ranges(ranges: Sequence[TensorRange]) -> list[str]:
    """Histograms of the activations that are clipped most, and all of them as a table."""
    order = sorted(ranges, key=lambda r: -max(r.clipped, r.held_out_clipped or 0.0))
    cards = []
    for held in order[:MOST_RANGES]:
        told = f"{held.method}, {held.amax:.3g}; clipped {_share(held.clipped)}"
        if held.held_out_clipped is not None:
            told += f", {_share(held.held_out_clipped)} of held-out values"
        cards.append(
            f'<figure class="card">{histogram(held)}<figcaption>{escape(held.graph)} '
            f"<code>{escape(held.name)}</code><br>{escape(told)}</figcaption></figure>"
        )
    columns = ("graph", "tensor", "method", "range", "largest", "clipped", "of held-out", "smoothed")
    rows = [
        (
            r.graph,
            r.name,
            r.method,
            f"{r.amax:.4g}",
            f"{r.limit:.4g}",
            _share(r.clipped),
            "-" if r.held_out_clipped is None else _share(r.held_out_clipped),
            "yes" if r.smoothed else "no",
        )
        for r in order
    ]
    return [
        "<h3>Activations and their ranges</h3>",
        f"<p>How many values are how large, on a logarithmic scale; the {len(cards)} of {len(ranges)} tensors that are "
        "clipped most.</p>",
        f'<div class="grid-of">{"".join(cards)}</div>',
        key([(ACCENT, "within the chosen range"), (BAD, "beyond it: clipped")]),
        folded(f"All {len(ranges)} ranges", table(columns, rows, right=columns[3:7])),
    ]


def _pair(sample: WorstSample, variant: VariantResult) -> str:
    sides = []
    for name, png, text in (
        ("fp32", sample.fp32_png, sample.fp32_text),
        (variant.name, sample.variant_png, sample.variant_text),
    ):
        shown = picture(png, f"{sample.name}, {name}") if png else ""
        said = f"<blockquote>{escape(text)}</blockquote>" if text else ""
        none = "" if png or text else "<p>No answer.</p>"
        sides.append(f"<figure>{shown}{said}{none}<figcaption>{escape(name)}</figcaption></figure>")
    asked = f' <span class="muted">{escape(sample.asked)}</span>' if sample.asked else ""
    value = f"{variant.budget.metric} {_value(sample.value)}"
    return (
        f'<section class="pair"><strong>{escape(sample.name)}</strong>: {escape(value)}{asked}<div>{"".join(sides)}'
        "</div></section>"
    )


def _data(result: CalibrationResult) -> list[str]:
    data = result.data
    facts = [
        ("source", f"{data.source} ({data.kind})"),
        ("ranges taken from", f"{len(data.calibration)} samples"),
        ("judged on", f"{len(data.held_out)} other samples"),
        ("seed of the split", str(data.seed)),
        ("files skipped", str(len(data.skipped))),
        ("SHA-256 of the files", data.digest or "not taken"),
    ]
    body = ["<h2>Data</h2>", table(("fact", "value"), facts), items("notes", data.warnings)]
    if data.skipped:
        body.append(table(("file", "why"), [(s.name, s.reason) for s in data.skipped], caption="Skipped files"))
    names = table(
        ("sample", "used for"), [(n, "ranges") for n in data.calibration] + [(n, "judging") for n in data.held_out]
    )
    body.append(folded("Names of all samples", names))
    return body


def _run(result: CalibrationResult) -> list[str]:
    facts = [("command", result.command), ("took", f"{result.seconds:.0f} s"), ("bundle before", result.bundle_hash)]
    return ["<h2>This run</h2>", table(("fact", "value"), facts), items("notes", result.hardware)]


def _value(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not a number"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else "unknown"


def _share(value: float) -> str:
    return f"{100 * value:.3g} %" if math.isfinite(value) else "not a number"


def _first_nan(value: float) -> float:
    """Orders NaN before every number: it is the worst."""
    return -math.inf if math.isnan(value) else value


app = typer.Typer()


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="The report.json of a calibration.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report.")],
) -> None:
    """Draw a calibration's report again from its JSON file."""
    try:
        html, _ = write_report(read_result(file), output)
    except EdgeError as error:
        print_error(error)
        raise typer.Exit(1) from error
    typer.echo(str(html))


if __name__ == "__main__":
    app()
