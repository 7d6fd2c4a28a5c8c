"""One calibration from data to a published variant: answers of fp32, the variant, its judgement, its publication.

Everything that takes long is kept in a work folder, so that a run that was interrupted goes on where it stopped and
comes to the same result. Held-out samples are looked at twice: by the judge, and for what the chosen ranges clip.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from pixano_edge.engine.bundle import Bundle, BundleWriter
from pixano_edge.engine.bundle.manifest import CalibrationEntry, GraphMemory
from pixano_edge.engine.contracts import sam2
from pixano_edge.engine.errors import CalibrationError, EdgeError
from pixano_edge.engine.models.calibrated import GOLDEN_SLACK
from pixano_edge.engine.models.decoder.opening import FAMILIES as TEXT_FAMILIES
from pixano_edge.engine.models.verify import verify_bundle
from pixano_edge.export.work_memory import fills_of, measure_file

from .publish import name_taken, publish
from .result import CalibrationResult, MemoryUse, VariantResult
from .speed import time_graphs
from .tasks import open_task
from .work import Made, Request, Step, Work, versions

PICTURE_GRAPHS = frozenset((sam2.IMAGE_ENCODER, sam2.MASK_DECODER))
"""Of a SAM 2, what answers about pictures."""

__all__ = ["Outcome", "Request", "Step", "calibrate"]


@dataclass
class Outcome:
    """What a calibration came to.

    Attributes:
        result: For the report.
        bundle: With the new variant; None where it was refused, or was not to be published.
    """

    result: CalibrationResult
    bundle: Bundle | None


def calibrate(bundle: Bundle, request: Request, step: Step = lambda what, done, of: None) -> Outcome:
    """Makes a variant within the budget and adds it to the bundle. One that misses the budget or fails a check is not
    published, and the result says why.

    Raises:
        CalibrationError: The data or the request cannot be used, no layer fits the budget, or another process
            calibrates the same.
        BundleError: The destination is taken by something else, or the disk is full; the bundle is as it was.
    """
    started = time.monotonic()
    task = open_task(bundle, replace(request.options, pictures=_asks_pictures(request)))
    if request.budget.metric != task.metric:
        raise CalibrationError(
            f"'{request.budget.metric}' is not what '{bundle.manifest.family}' is judged by here.",
            f"Give --budget '{task.metric}>={request.budget.at_least:g}': {task.about}.",
        )
    work = Work(bundle, request, task, step)
    with work.alone():
        return _calibrate(work, started)


def _calibrate(work: Work, started: float) -> Outcome:
    bundle, request, step = work.bundle, work.request, work.step
    wanted = _free_names(work, precisions(bundle, request))
    if not request.dry_run:
        # Says now, not after all the work, that the folder is taken or cannot be written.
        with BundleWriter(request.destination, overwrite=_is_at(bundle, request.destination)):
            pass
    work.refer()
    variants: list[VariantResult] = []
    for precision in wanted:
        name = request.name or precision
        try:
            made = _MAKERS[precision](work, name)
        except CalibrationError as error:
            if request.precision != "auto":
                raise
            work.notes.append(f"{precision} was passed over: {error.message}")
            continue
        judged = judge(work, made, name)
        variants.append(judged)
        if judged.passed:
            break
    if not variants:
        raise CalibrationError(f"No variant could be made: {' '.join(work.notes[-3:])}", "Give a lower budget.")
    result = _result(work, variants, time.monotonic() - started)
    if not judged.passed or request.dry_run:
        return Outcome(result, None)
    step("Publishing", 0, 1)
    variants[-1] = replace(judged, published=True)
    result = replace(result, variants=tuple(variants))
    published = _publish(work, made, result)
    work.clear()
    return Outcome(result, published)


def precisions(bundle: Bundle, request: Request) -> tuple[str, ...]:
    """What to try: the one asked for, or of ``auto`` the smaller ones first."""
    if request.precision != "auto":
        return (request.precision,)
    return ("int4", "int8") if bundle.manifest.family in TEXT_FAMILIES else ("int8", "fp16")


def _free_names(work: Work, wanted: tuple[str, ...]) -> list[str]:
    """The precisions whose variant may be published: asked now, not after all the work.

    Raises:
        CalibrationError: None may.
    """
    if work.request.dry_run:
        return list(wanted)
    found, taken = [], ""
    for precision in wanted:
        name = work.request.name or precision
        if taken := name_taken(work.bundle, name, work.request.replace):
            work.notes.append(f"{precision} was passed over: {taken}")
        else:
            found.append(precision)
    if not found:
        raise CalibrationError(taken, "Give --replace to put the new one in its place, or another --name.")
    return found


def _is_at(bundle: Bundle, folder: Path) -> bool:
    return folder.expanduser().resolve() == bundle.root.resolve()


def _asks_pictures(request: Request) -> bool:
    """Whether clips are asked about as pictures too."""
    return not request.graphs or not PICTURE_GRAPHS.isdisjoint(request.graphs)


def judge(work: Work, made: Made, name: str) -> VariantResult:
    """All figures of a variant."""
    task, budget = work.task, work.request.budget
    problems, base = list(made.problems), work.base(name)
    final = {**base, **made.judged}
    task.unoptimised |= {graph.judged for graph in made.graphs.values() if graph.judged is not None}
    done = work.counter("Judging", len(work.calibration) + len(work.held_out))
    held_out = task.score(final, work.held_out, done)
    on_calibration = task.score(final, work.calibration, done)
    if not budget.met(held_out.mean):
        problems.append(f"held-out {budget.metric} is {held_out.mean:.4f}, the budget {budget}")
    problems += _golden(work, final)
    pairs = {graph: (work.bundle.graph_path(graph, "fp32"), path) for graph, path in made.files.items()}
    if made.precision == "bf16":
        pairs = {}  # for GPUs: ONNX Runtime's CPU provider has no kernels
    told = work.counter("Timing", len(pairs))
    threads = work.request.options.threads
    fp32_speed, speed = time_graphs(pairs, work.timing().feeds, threads, on_graph=told) if pairs else ((), ())
    slower = [f"{a.what} takes {b.p50 / a.p50:.2f} of fp32's time" for a, b in zip(fp32_speed, speed) if b.p50 >= a.p50]
    memory = _memory(work, pairs)
    notes = [*made.notes, *([f"Not faster on this machine: {', '.join(slower)}."] if slower else [])]
    others = sum(
        _size(work, graph, name if graph in base else "fp32") for graph in task.graphs if graph not in made.graphs
    )
    return VariantResult(
        name,
        made.precision,
        made.sizes,
        sum(s.bytes for s in made.sizes) + others,
        sum(s.fp32_bytes for s in made.sizes) + others,
        budget,
        held_out,
        passed=not problems,
        published=False,
        on_calibration=on_calibration,
        truth=task.truth(final, work.held_out),
        fp32_speed=fp32_speed,
        speed=speed,
        memory=memory,
        problems=tuple(problems),
        notes=tuple(notes),
        blocks=made.blocks,
        ranges=made.ranges,
        worst=task.worst(final, held_out, work.held_out),
    )


def _size(work: Work, graph: str, variant: str) -> int:
    """Bytes of a graph of the bundle with its weights, which may lie in another graph's file."""
    entry = work.bundle.manifest.graphs[graph].variants[variant]
    return entry.weight_bytes or work.bundle.file(entry.file).stat().st_size


def _golden(work: Work, files: Mapping[str, Path]) -> list[str]:
    """Whether the metric on the bundle's own pictures is so low that the data cannot have been right, in words."""
    asked = work.golden()
    if not asked:
        return []
    mean = work.task.score(files, asked).mean
    bar = 1 - GOLDEN_SLACK * (1 - work.request.budget.at_least)
    # There are few of them: one answer that is right or wrong as a whole must not decide.
    if mean >= bar - max(map(work.task.grain, asked)) / len(asked):
        return []
    return [
        f"on the bundle's golden pictures {work.task.metric} is {mean:.4f}, below {bar:.4f}: the calibration data do "
        "not look like what the model is for"
    ]


def _memory(work: Work, pairs: Mapping[str, tuple[Path, Path]]) -> tuple[MemoryUse, ...]:
    """What the new graphs take, each opened in a process of its own; empty where that cannot be told."""
    known = {m.graph: m for m in work.bundle.manifest.memory if m.variant == "fp32"}
    told = work.counter("Measuring memory", len(pairs))
    work.measured.clear()
    found = []
    for graph, (_, path) in pairs.items():
        spec = work.task.spec(graph)
        try:
            measured = measure_file(path, spec, work.request.options.threads, fills_of(spec))
        except EdgeError as error:
            work.notes.append(f"The memory of {graph} is not known: {error.message}")
            measured = None
        if measured is not None:
            full = known.get(graph)
            before = (full.session_bytes, full.activation_bytes) if full is not None else (None, None)
            found.append(MemoryUse(graph, measured["session_bytes"], measured["activation_bytes"], *before))
            work.measured[graph] = measured
        told()
    return tuple(found)


def _result(work: Work, variants: list[VariantResult], seconds: float) -> CalibrationResult:
    manifest = work.bundle.manifest
    hardware = (
        f"CPU: {platform.processor() or platform.machine()}, {platform.system()}",
        *(f"{name}: {version}" for name, version in versions().items()),
    )
    return CalibrationResult(
        manifest.name,
        work.bundle.hash,
        manifest.family,
        manifest.source.architecture,
        _now().isoformat(),
        work.request.command,
        hardware,
        work.summary,
        tuple(variants),
        seconds,
        tuple(dict.fromkeys(work.notes)),
    )


def _publish(work: Work, made: Made, result: CalibrationResult) -> Bundle:
    """Writes the judged variant into the bundle, with its figures."""
    variant = result.variants[-1]
    assert variant.held_out is not None
    file = f"reports/calibration-{variant.name}-{variant.budget.metric}.json"
    plain = replace(variant, worst=tuple(replace(w, fp32_png=None, variant_png=None) for w in variant.worst))
    content = json.dumps(replace(result, variants=(plain,)).to_dict(), indent=1, allow_nan=False)
    entry = CalibrationEntry(
        variant=variant.name,
        graphs=list(work.task.graphs),
        metric=variant.budget.metric,
        budget=variant.budget.at_least,
        held_out=variant.held_out.mean,
        worst=min(s.value for s in variant.held_out.samples),
        held_out_samples=len(variant.held_out.samples),
        data=result.data.source,
        data_digest=result.data.digest,
        calibration_samples=len(result.data.calibration),
        method=made.method,
        created=_now(),
        tools=versions(),
        report=file,
    )

    def write(destination: Path, told: CalibrationEntry) -> Bundle:
        return publish(
            work.bundle,
            destination,
            variant.name,
            made.precision,
            made.graphs,
            told,
            {file: (content + "\n").encode()},
            considered=work.graphs,
            memory=[GraphMemory(graph=g, variant=variant.name, **told) for g, told in work.measured.items()],
            replace=work.request.replace,
        )

    # First elsewhere: what the bundle's own check says of it there is what other machines are compared with.
    trial = work.folder / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    golden = verified(write(trial, entry), made.precision, work.request.options.threads)
    shutil.rmtree(trial, ignore_errors=True)
    return write(work.request.destination, entry.model_copy(update={"golden": golden}))


def verified(bundle: Bundle, precision: str, threads: int | None) -> float | None:
    """Lowest mean agreement with PyTorch in the bundle's own check on this CPU; None where it has no kernels."""
    if precision == "bf16" or not bundle.golden():
        return None
    report = verify_bundle(bundle, "cpu", "onnxruntime", precision, threads=threads)
    clip = getattr(report, "clip", None)
    found = min(report.mean_iou, clip.mean_iou if clip is not None else 1.0)
    return found if math.isfinite(found) else 0.0


def _int8(work: Work, name: str) -> Made:
    from .make_int8 import make_int8

    return make_int8(work, name)


def _int4(work: Work, name: str) -> Made:
    from .make_other import make_int4

    return make_int4(work, name)


def _half(precision: str) -> Callable[[Work, str], Made]:
    def make(work: Work, name: str) -> Made:
        from .make_other import make_half

        return make_half(work, name, precision)

    return make


_MAKERS: Mapping[str, Callable[[Work, str], Made]] = {
    "int8": _int8,
    "int4": _int4,
    "fp16": _half("fp16"),
    "bf16": _half("bf16"),
}


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
