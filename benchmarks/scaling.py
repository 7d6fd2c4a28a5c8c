"""How times grow: with the picture, the model's input, prompts, objects, frames, clients and threads.

The points of a curve are measured in turns, so that a slow minute of the machine bends none of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.engine.errors import EdgeError
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel

from .fitting import make_curve
from .segment import interleave, make_inputs
from .serving import photo
from .track import DEMO, FILLED, EngineTracking, blobs, demo_clip

AXES = ("picture", "input", "prompts", "objects", "frames", "clients", "threads")


@dataclass(frozen=True)
class Extent:
    """How far each axis goes.

    Attributes:
        rounds: Timed calls per point.
        megapixels: Of the picture.
        sides: Of the model's input; each is a bundle of its own, which has to be exported.
        prompts: In one call.
        objects: Tracked at once.
        frames: Of the longest clip.
        clients: At once.
        seconds: Of each number of clients.
    """

    rounds: int = 10
    megapixels: tuple[float, ...] = (0.25, 1, 2, 4, 8)
    sides: tuple[int, ...] = (256, 512, 768, 1024)
    prompts: tuple[int, ...] = (1, 4, 16, 64)
    objects: tuple[int, ...] = (1, 2, 4, 8, 16)
    frames: int = 48
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    seconds: float = 8.0


QUICK = Extent(2, (0.25, 0.5, 1), (64, 96, 128), (1, 2, 4), (1, 2, 3), 6, (1, 2, 3), 0.5)

Curves = list[dict[str, Any]]
Step = Callable[[str], None]


def measure(
    bundle: Bundle, axes: Sequence[str], extent: Extent, threads: int, step: Step = lambda _: None
) -> tuple[Curves, dict[str, str]]:
    """Curves of the axes asked for.

    Args:
        bundle: A SAM 2; it tracks, for objects and frames.
        axes: Of `AXES`.
        extent: How far.
        threads: CPU threads; for the axis of threads the most.
        step: Told what is timed.

    Returns:
        Curves, and axis to the reason why it is missing.

    Raises:
        EdgeError: Unknown axis.
    """
    if unknown := sorted(set(axes) - set(AXES)):
        raise EdgeError(f"There is no axis {unknown}.", f"Axes: {', '.join(AXES)}.")
    curves: Curves = []
    missing: dict[str, str] = {}
    for axis in axes:
        step(axis)
        try:
            curves += _MEASURES[axis](bundle, extent, threads)
        except EdgeError as error:
            missing[axis] = str(error)
    return curves, missing


def _predictor(bundle: Bundle, threads: int) -> Sam2ImagePredictor:
    return Sam2ImagePredictor.open(bundle, device="cpu", precision="fp32", threads=threads)


def pictures(bundle: Bundle, extent: Extent, threads: int) -> Curves:
    """Encoding, and a click whose mask comes at the picture's size."""
    predictor = _predictor(bundle, threads)
    images = {size: photo(size) for size in extent.megapixels}
    embeddings = {size: predictor.encode(image) for size, image in images.items()}

    def click(size: float) -> None:
        height, width = images[size].shape[:2]
        predictor.predict(embeddings[size], [Prompt(points=[(width / 2, height / 2)], labels=[1])])

    calls: dict[str, Callable[[], object]] = {}
    for size in extent.megapixels:
        calls[f"encode {size}"] = partial(predictor.encode, images[size], wait=True, cached=False)
        calls[f"click {size}"] = partial(click, size)
    times = interleave(calls, extent.rounds)
    predictor.close()
    return [
        make_curve(case, "picture", "megapixels", {s: times[f"{word} {s}"] for s in extent.megapixels})
        for case, word in (("encoding a picture", "encode"), ("a click, masks at the picture's size", "click"))
    ]


def inputs(bundle: Bundle, extent: Extent, threads: int) -> Curves:
    """The encoder by the side of the model's input: random models of the demo's shape, exported once."""
    from .checkpoints import exported_bundle, random_checkpoint

    images = photo(0.5)
    with ExitStack() as opened:
        calls: dict[str, Callable[[], object]] = {}
        for side in extent.sides:
            made = exported_bundle(random_checkpoint("demo", side, video=True))
            predictor = _predictor(Bundle.open(made), threads)
            opened.callback(predictor.close)
            calls[str(side)] = partial(predictor.encode, images, wait=True, cached=False)
        times = interleave(calls, extent.rounds)
    seconds: dict[float, Sequence[float]] = {side: times[str(side)] for side in extent.sides}
    return [make_curve("encoding, model of the demo's shape", "input", "pixels of a side", seconds, "x^2")]


def prompts(bundle: Bundle, extent: Extent, threads: int) -> Curves:
    """Clicks in one call, each with its own mask."""
    predictor = _predictor(bundle, threads)
    picture = make_inputs(Sam2Constants.from_dict(dict(bundle.manifest.constants))).picture
    embedding = predictor.encode(picture)
    height, width = picture.shape[:2]

    def clicks(count: int) -> None:
        points = [((i + 0.5) * width / count, (0.3 + 0.4 * (i % 2)) * height) for i in range(count)]
        predictor.predict(embedding, [Prompt(points=[p], labels=[1]) for p in points])

    times = interleave({str(n): partial(clicks, n) for n in extent.prompts}, extent.rounds)
    predictor.close()
    seconds: dict[float, Sequence[float]] = {n: times[str(n)] for n in extent.prompts}
    return [make_curve("clicks in one call", "prompts", "prompt", seconds)]


def objects(bundle: Bundle, extent: Extent, threads: int) -> Curves:
    """A frame with a full memory bank."""
    length = FILLED + extent.rounds + 6
    clip = demo_clip(length) if bundle.manifest.name == DEMO else blobs(length)
    with Sam2VideoModel.open(bundle, "cpu", precision="fp32", threads=threads) as model:
        trackers = {n: EngineTracking(model, clip, n) for n in extent.objects}
        times = interleave({str(n): one.step for n, one in trackers.items()}, extent.rounds)
    return [make_curve("a tracked frame", "objects", "object", {n: times[str(n)] for n in extent.objects})]


def frames(bundle: Bundle, extent: Extent, threads: int) -> Curves:
    """A clip of so many frames with one object, from its prompt on; memories fill up meanwhile."""
    clip = demo_clip(extent.frames) if bundle.manifest.name == DEMO else blobs(extent.frames)
    marks = [n for n in (2, 4, 8, 16, 24, 32, 48, 64, 96, 128) if n <= extent.frames]
    seconds: dict[float, list[float]] = {n: [] for n in marks}
    with Sam2VideoModel.open(bundle, "cpu", precision="fp32", threads=threads) as model:
        for _ in range(max(2, extent.rounds // 3)):
            tracker = model.track(clip, history=False)
            begun = time.perf_counter()
            tracker.add_prompt(1, 0, Prompt(points=clip.clicks(1), labels=[1]))
            for number, _result in enumerate(tracker.propagate(0), 1):
                if number in seconds:
                    seconds[number].append(time.perf_counter() - begun)
            tracker.close()
    return [make_curve("a whole clip, one object", "frames", "frame", seconds)]


def clients(bundle: Bundle, extent: Extent, threads: int) -> Curves:
    """Clicks over HTTP in a closed loop."""
    from .serve import load

    rows = load(bundle, clients=extent.clients, seconds=extent.seconds, threads=threads)
    if failed := [row.clients for row in rows if row.errors]:
        raise EdgeError(f"Requests failed with {failed} clients.", "Look at the server's log.")
    # Latency is already summarised there; p50 alone makes the point, p90 and p99 stand beside it.
    curve = make_curve("a click over HTTP", "clients", "client", {r.clients: [r.seconds.p50] for r in rows})
    for point, row in zip(curve["points"], rows):
        s = row.seconds
        point["seconds"] = {"p50": s.p50, "p90": s.p90, "p99": s.p99, "mean": s.mean, "count": s.count}
    return [curve]


def threads(bundle: Bundle, extent: Extent, most: int) -> Curves:
    """Encoding with 1 thread up to all."""
    image = photo(0.5)
    with ExitStack() as opened:
        calls: dict[str, Callable[[], object]] = {}
        numbers = sorted({1, *(n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32) if n < most), most})
        for number in numbers:
            predictor = _predictor(bundle, number)
            opened.callback(predictor.close)
            calls[str(number)] = partial(predictor.encode, image, wait=True, cached=False)
        times = interleave(calls, extent.rounds)
    return [make_curve("encoding a picture", "threads", "threads", {n: times[str(n)] for n in numbers}, "1/x")]


_MEASURES: dict[str, Callable[[Bundle, Extent, int], Curves]] = {
    "picture": pictures,
    "input": inputs,
    "prompts": prompts,
    "objects": objects,
    "frames": frames,
    "clients": clients,
    "threads": threads,
}
