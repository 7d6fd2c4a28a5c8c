"""The int8 variant: ranges from the calibration data, and the largest set of layers within the budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pixano_edge.engine.bundle.files import os_errors
from pixano_edge.engine.errors import CalibrationError

from .int4_variant import decoder_constants
from .publish import check_scales
from .result import BlockResult, GraphSize, TensorRange
from .search import Found, Group, Scores, Unit, Units, search
from .spool import Feeds, Spool
from .tasks.base import key_of
from .tensorrt_form import Comparison, TensorrtForm, compare, quantise_form, read_form
from .variant import Source, VariantFiles, ranges, read_source, refused
from .work import FEEDS, Made, NewGraph, Work

MARGIN = 0.25
"""Part of the budget's allowance that the search leaves free: held-out data are a little harder than those that the
layers were chosen on."""
HELD_OUT_FEEDS = 8
GROUP_BYTES = 1 << 29
"""Of tensors that one run hands out while observing."""
MAX_CLIPPED = 0.01
"""Mean share of the held-out values that may lie beyond the ranges, above what of the calibration values does."""
MAX_ONE_CLIPPED = 0.05
"""The same of one tensor."""
COMPARED = 4
"""Recorded calls, of the calibration and of the held-out data each, that the form for TensorRT is compared on."""


def make_int8(work: Work, variant: str) -> Made:
    """Finds and makes the variant.

    Raises:
        CalibrationError: No layer can be quantised, or none within the budget.
    """
    spool = work.spool("calibration", work.calibration, FEEDS)
    sources = _sources(work, spool)
    files = VariantFiles(sources, work.folder / "graphs", work.request.method, work.request.smooth)
    cannot: dict[Unit, str] = {}
    for source in sources.values():
        cannot |= refused(source, files)
    forms = _forms(work, sources)
    for graph, form in forms.items():
        cannot |= {Unit(graph, name): why for name, why in form.absent.items()}
    found = _search(work, sources, files, cannot, work.base(variant))
    if not found.chosen:
        best = max(found.alone.values(), default=0.0)
        raise CalibrationError(
            f"No layer fits the budget {work.request.budget}: the best alone has {best:.4f}.",
            "Give a lower budget, or data like what the model sees.",
        )
    return _make(work, sources, files, forms, found, cannot)


def _sources(work: Work, spool: Spool) -> dict[str, Source]:
    sources = {}
    for graph in work.graphs:
        feeds = spool.feeds(graph)
        if not len(feeds):
            work.notes.append(f"{graph} never ran on these data; it stays in fp32.")
            continue
        source = read_source(
            graph,
            work.bundle.graph_path(graph, "fp32"),
            feeds,
            work.folder / f"{graph}.npz",
            work.request.options.threads,
            group_bytes=GROUP_BYTES,
            on_feed=work.counter(f"Observing {graph}", len(feeds)),
        )
        if source.blocks:
            sources[graph] = source
        else:
            work.notes.append(f"{graph} has no layer that int8 would speed up; it stays in fp32.")
    if not sources:
        raise CalibrationError("No graph has a layer that can be quantised.", "Choose other --graphs.")
    return sources


def _forms(work: Work, sources: Mapping[str, Source]) -> dict[str, TensorrtForm]:
    """The graphs for TensorRT of those that have operators of ONNX Runtime's own."""
    forms = {graph: form for graph, source in sources.items() if (form := read_form(work.bundle, source)) is not None}
    for graph, form in forms.items():
        if form.absent:
            shown = ", ".join(list(form.absent)[:3]) + (", ..." if len(form.absent) > 3 else "")
            work.notes.append(
                f"{len(form.absent)} layer(s) of {graph} stay in fp32, since its graph for TensorRT does not have them "
                f"alike: {shown}. Export the bundle again to quantise them."
            )
    return forms


def _search(
    work: Work,
    sources: Mapping[str, Source],
    files: VariantFiles,
    cannot: Mapping[Unit, str],
    base: Mapping[str, Path],
) -> Found:
    budget = work.request.budget
    samples = work.calibration[: work.request.search_samples]
    scores = Scores(work.folder / "scores.json", key_of(work.key, sorted(base.items())))

    def measure(units: Units) -> float:
        return work.task.score({**base, **files.files(units)}, samples).mean

    def saving(unit: Unit) -> float:
        block = sources[unit.graph].blocks[unit.name]
        return float(block.weight_bytes + block.macs)

    return search(
        [unit for source in sources.values() for unit in source.units()],
        lambda unit: sources[unit.graph].blocks[unit.name].parent or unit.name,
        saving,
        lambda units: scores.get(units, measure),
        budget.at_least + MARGIN * (1 - budget.at_least),
        refused=tuple(cannot),
        metric=budget.metric,
        on_step=lambda what, done, of: work.step(f"Searching: {what}", done, of),
    )


def _make(
    work: Work,
    sources: Mapping[str, Source],
    files: VariantFiles,
    forms: Mapping[str, TensorrtForm],
    found: Found,
    cannot: Mapping[Unit, str],
) -> Made:
    seen = work.spool("calibration", work.calibration, FEEDS)
    held_out = work.spool("held-out", work.held_out[:HELD_OUT_FEEDS], HELD_OUT_FEEDS)
    paths = files.files(found.chosen)
    taken: list[TensorRange] = []
    sizes, problems, notes = [], [], []
    graphs: dict[str, NewGraph] = {}
    for graph, path in paths.items():
        source, names = sources[graph], {u.name for u in found.chosen if u.graph == graph}
        work.step(f"Looking at the ranges of {graph}", 0, 0)
        model, report = files.quantise(graph, names)
        if broken := check_scales(graph, model):
            problems += broken
        else:
            feeds = seen.feeds(graph)[:HELD_OUT_FEEDS], held_out.feeds(graph)
            taken += ranges(source, model, report, *feeds, work.request.options.threads, GROUP_BYTES)
        graphs[graph] = NewGraph(path)
        if graph in forms and not broken:
            calls = Feeds([*seen.feeds(graph).files[:COMPARED], *held_out.feeds(graph).files[:COMPARED]])
            file, compared = _for_tensorrt(work, source, forms[graph], names, path, calls)
            graphs[graph] = NewGraph(path, tensorrt=file)
            problems += [f"{graph} for TensorRT: {problem}" for problem in compared.problems]
            if compared.problems:
                problems.append("neither data nor budget change that: export the bundle again, or report it")
            notes.append(f"{graph} for TensorRT: {compared}.")
        sizes.append(GraphSize(graph, path.stat().st_size, source.model.ByteSize(), len(names), len(source.blocks)))
    layers, of_layers = len(found.chosen), sum(len(s.blocks) for s in sources.values())
    smooth = work.request.smooth
    return Made(
        "int8",
        graphs,
        tuple(sizes),
        _rows(sources, found, cannot),
        tuple(taken),
        problems + _clipping(taken),
        notes,
        method=f"{work.request.method}, smoothing {smooth or 'off'}, {layers} of {of_layers} layers",
    )


def _for_tensorrt(
    work: Work,
    source: Source,
    form: TensorrtForm,
    names: Collection[str],
    theirs: Path,
    feeds: Feeds,
) -> tuple[Path, Comparison]:
    """Makes the form for TensorRT of a quantised decoder and compares the two: its file, and how near they are.

    Args:
        work: The calibration.
        source: ONNX Runtime's graph in fp32.
        form: TensorRT's.
        names: Blocks in int8.
        theirs: File of ONNX Runtime's form with these.
        feeds: Recorded inputs of that graph.
    """
    graph = source.graph
    work.step(f"Comparing {graph} for TensorRT", 0, 0)
    ours, _ = quantise_form(form, source, names, work.request.method, work.request.smooth)
    path = work.folder / "graphs" / f"{graph}.tensorrt.onnx"
    with os_errors(f"writing '{path}'"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ours.SerializeToString())
    del ours
    constants = decoder_constants(work.bundle)
    return path, compare(path, theirs, source.path, feeds, constants, work.request.options.threads)


def _clipping(found: Sequence[TensorRange]) -> list[str]:
    """Ranges that clip many more of the held-out than of the calibration values: the data are not alike."""
    shares = [(max(0.0, r.held_out_clipped - r.clipped), r) for r in found if r.held_out_clipped is not None]
    if not shares:
        return []
    problems = []
    mean = sum(share for share, _ in shares) / len(shares)
    if mean > MAX_CLIPPED:
        problems.append(f"{100 * mean:.1f} % more of the held-out values are clipped than of the calibration values")
    share, worst = max(shares, key=lambda s: s[0])
    if share > MAX_ONE_CLIPPED:
        problems.append(
            f"{100 * share:.1f} % more of the held-out values of '{worst.name}' ({worst.graph}) are clipped than of "
            "the calibration values"
        )
    return problems


def _rows(sources: Mapping[str, Source], found: Found, cannot: Mapping[Unit, str]) -> tuple[BlockResult, ...]:
    """A row for each group that was measured as a whole and taken, and one for each layer of the others."""
    groups = {group[0]: group for group in found.alone if len(group) > 1 and set(group) <= found.chosen}
    inside = {unit for group in groups.values() for unit in group}
    return tuple(
        _row(source, groups.get(unit, (unit,)), found, cannot)
        for source in sources.values()
        for unit in source.units()
        if unit in groups or unit not in inside
    )


def _row(source: Source, group: Group, found: Found, cannot: Mapping[Unit, str]) -> BlockResult:
    unit = group[0]
    members = [source.blocks[u.name] for u in group]
    return BlockResult(
        source.graph,
        unit.name if len(group) == 1 else members[0].parent or unit.name,
        "+".join(dict.fromkeys(block.kind for block in members)),
        sum(block.macs for block in members),
        sum(block.weight_bytes for block in members),
        unit in found.chosen,
        cannot.get(unit, found.why.get(unit, "")),
        found.alone.get(group),
        found.without.get(group),
    )
