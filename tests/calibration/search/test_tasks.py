"""What families are judged by: fp32 agrees with itself, half precision nearly, and inputs are recorded as they are."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.calibration.data import Picture, open_data
from pixano_edge.calibration.speed import of_one_shape
from pixano_edge.calibration.spool import GraphSpool, Spool
from pixano_edge.calibration.tasks import open_task
from pixano_edge.calibration.tasks.base import Task, TaskOptions
from pixano_edge.calibration.tasks.detector import Boxes, average_precision
from pixano_edge.calibration.tasks.sam2 import TIE, Answered, _picks, rle_iou
from pixano_edge.calibration.tasks.sam2_video import Sam2VideoTask, Tracks
from pixano_edge.calibration.tasks.text import CONTEXT, TextTask
from pixano_edge.engine.bundle import Bundle, demo_path
from pixano_edge.engine.contracts import decoder as decoders
from pixano_edge.engine.errors import BundleError, CalibrationError
from pixano_edge.engine.models.masks import mask_iou
from pixano_edge.engine.models.rle import encode_rle
from tests.engine.test_no_torch import BLOCKER


def _judge(bundle: Bundle, options: TaskOptions, data: Path, tmp_path: Path, samples: int) -> None:
    found = open_data(data, clips=options.video, limit=samples, clip_length=4, allow_few=True)
    task = open_task(bundle, options)
    asked = task.refer(found.samples)
    assert asked
    assert task.score({}, asked).mean == 1
    half = {graph: bundle.graph_path(graph, "fp16") for graph in task.graphs}
    score = task.score(half, asked)
    assert 0.98 < score.mean <= 1
    broken = {g: bundle.graph_path(g, "fp32") for g in task.graphs}
    assert task.score(broken, asked).mean == 1
    (worst,) = task.worst(half, score, asked, 1)
    assert worst.value == min(value.value for value in score.samples)
    assert worst.fp32_png is not None
    assert worst.fp32_png.startswith(b"\x89PNG")
    spool = Spool(tmp_path / "spool", "key", limit=2, max_bytes=1 << 30)
    task.collect(asked, spool)
    for graph in task.graphs:
        feeds = spool.feeds(graph)
        assert 1 <= len(feeds) <= 2
        spec = task.spec(graph)
        assert {t.name for t in spec.inputs} == set(feeds[0])
        assert all(feeds[0][t.name].dtype == t.np_dtype for t in spec.inputs)
    assert Spool(tmp_path / "spool", "key", limit=2, max_bytes=1 << 30).complete
    assert not Spool(tmp_path / "spool", "other", limit=2, max_bytes=1 << 30).complete


def test_detectors_are_judged_by_boxes(scenes: Path, tmp_path: Path) -> None:
    classes = open_data(scenes / "scenes.json", allow_few=True).classes
    bundle = Bundle.open(demo_path("owlv2-demo"))
    _judge(bundle, TaskOptions(threads=1, classes=classes, threshold=0.2), scenes / "scenes.json", tmp_path, 3)


def test_tracking_is_judged_by_clips(sam2_demo: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the clips' textures need pixano-edge[benchmarks]")
    from pixano_edge.export.demo.write_scenes import write_clips

    write_clips(tmp_path / "clips", 2, length=4, size=128)
    # With pictures all five graphs run, so that one calibration can take them all.
    _judge(sam2_demo, TaskOptions(threads=1, video=True, pictures=True), tmp_path / "clips", tmp_path, 2)


def test_nothing_to_ask_about(scenes: Path) -> None:
    task = open_task(Bundle.open(demo_path("owlv2-demo")), TaskOptions(threads=1, classes=("zebra",), threshold=0.999))
    samples = open_data(scenes, limit=2, allow_few=True).samples
    with pytest.raises(CalibrationError, match="answers nothing on 2 sample"):
        task.refer(samples)


def _boxes(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Boxes:
    return Boxes(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int64))


ONE, TWO = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (_boxes([ONE, TWO], [0.9, 0.8], [0, 1]), 1.0),
        (_boxes([ONE], [0.9], [0]), 0.5),
        (_boxes([ONE, TWO], [0.9, 0.8], [1, 0]), 0.0),
        (_boxes([[50, 50, 60, 60], ONE, TWO], [0.9, 0.8, 0.7], [0, 0, 1]), 2 / 3),
        (_boxes([ONE, ONE, TWO], [0.9, 0.8, 0.7], [0, 0, 1]), (1 + 2 / 3) / 2),
        (_boxes([], [], []), 0.0),
    ],
)
def test_average_precision(got: Boxes, expected: float) -> None:
    assert average_precision(got, _boxes([ONE, TWO], [1, 1], [0, 1]), 0.5) == pytest.approx(expected)


def test_average_precision_without_truth() -> None:
    none = _boxes([], [], [])
    assert average_precision(none, none, 0.5) == 1
    assert average_precision(_boxes([ONE], [0.9], [0]), none, 0.5) == 0


def test_masks_that_fp32_rates_alike_may_be_chosen_either_way() -> None:
    def answered(*scores: float) -> Answered:
        return Answered((), (np.array(scores, np.float32),))

    want = answered(0.9, 0.9 - TIE / 2, 0.5)
    assert _picks(want, answered(0.9, 0.8, 0.5), 0) == (0, 0)
    assert _picks(want, answered(0.8, 0.9, 0.5), 0) == (1, 1)
    assert _picks(want, answered(0.8, 0.7, 0.9), 0) == (0, 2)


def test_a_spool_keeps_a_bounded_number_from_end_to_end(tmp_path: Path) -> None:
    spool = GraphSpool(tmp_path / "graph", limit=8, max_bytes=1 << 20, seed=1)
    for call in range(200):
        spool.add({"x": np.full(4, call, np.float32)})
    kept = sorted(float(np.load(spool.path(slot))["x"][0]) for slot in range(len(spool)))
    assert len(kept) == 8 == len(list((tmp_path / "graph").iterdir()))
    assert kept[0] < 100 < kept[-1]
    small = GraphSpool(tmp_path / "small", limit=8, max_bytes=40)
    for call in range(9):
        small.add({"x": np.full(4, call, np.float32)})
    assert len(small) == 2


def test_a_spool_of_large_and_small_calls_is_bounded_and_goes_by_weight(tmp_path: Path) -> None:
    spool = GraphSpool(tmp_path / "graph", limit=8, max_bytes=1000)
    for _ in range(8):
        spool.add({"x": np.zeros(2, np.float32)})
    for call in range(20):
        spool.add({"x": np.full(100, call, np.float32)}, weight=100)
    kept = [np.load(spool.path(slot))["x"] for slot in range(len(spool))]
    assert len(kept) == len(list((tmp_path / "graph").iterdir()))
    assert 400 <= sum(array.nbytes for array in kept) <= 1000
    assert [len(array) for array in kept] == [100, 100]


def test_data_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    """Of --data and --held-out: both have a scene-000000.png, with another picture in it."""

    class Sizes(Task[Picture, None, str, int]):
        metric, about, usual = "m", "", 0.9

        def __init__(self) -> None:
            self._plans, self._references = {}, {}

        graphs = ()

        def make(self, sessions: Any, digests: Any) -> None: ...

        def close(self, model: None) -> None: ...

        def plan(self, model: None, sample: Picture) -> str:
            return "size"

        def answer(self, model: None, sample: Picture, plan: str) -> int:
            return int(sample.source.stem)

        def compare(self, want: int, got: int, plan: str) -> float:
            return float(want == got)

        @contextlib.contextmanager
        def open(self, files: Any) -> Iterator[None]:
            yield None

    task, samples = Sizes(), [Picture("same.png", tmp_path / f"{size}.png") for size in (1, 2)]
    for sample in samples:
        assert task.refer([sample]) == [sample]
    assert [task.reference(sample) for sample in samples] == [1, 2]
    assert task.score({}, samples).mean == 1


def test_overlaps_of_run_lengths_are_those_of_masks() -> None:
    random = np.random.default_rng(0)
    masks = [random.random((30, 40)) < share for share in (0.0, 0.02, 0.5, 0.9, 1.0)]
    for one in masks:
        for other in masks:
            assert rle_iou(encode_rle(one), encode_rle(other)) == pytest.approx(mask_iou(one, other))


def test_a_clip_counts_as_its_first_frame_where_that_is_worse() -> None:
    full, half = np.ones((4, 4), bool), np.arange(16).reshape(4, 4) < 8
    good, bad = encode_rle(full), encode_rle(half)

    def tracks(later: Any, shown: Any) -> Tracks:
        return Tracks(((good, later),), Answered(((shown,),), (np.ones(1, np.float32),)))

    def value(got: Tracks) -> float:
        return Sam2VideoTask.compare(None, tracks(good, good), got, None)  # type: ignore[arg-type]

    assert value(tracks(good, good)) == 1
    assert value(tracks(good, bad)) == value(tracks(bad, good)) == 0.5
    assert value(Tracks(((good, bad),))) == 0.5


def test_prompts_weigh_as_many_tokens_as_they_have() -> None:
    task = object.__new__(TextTask)
    prompt = {decoders.INPUTS_EMBEDS: np.zeros((1, 70, 8))}
    assert task.weight(decoders.DECODER, prompt) == 70
    assert task.weight("vision_encoder", {}) == 1
    task.options, task._longest, task._recording = TaskOptions(max_new_tokens=9), 70, False
    assert task._context() == CONTEXT
    task._recording = True
    assert task._context() == 80


def test_graphs_are_timed_on_calls_of_one_shape(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "key", limit=9, max_bytes=1 << 20)
    for tokens in (7, 1, 8, 1, 9):
        spool.graph("decoder").add({"x": np.zeros(tokens, np.float32)})
    spool.finish()
    assert [len(feed["x"]) for feed in of_one_shape(spool.feeds("decoder"))] == [1, 1]
    assert not len(of_one_shape(spool.feeds("never ran")))


def test_damaged_recordings_say_what_to_do(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "key", limit=2, max_bytes=1 << 20)
    spool.graph("g").add({"x": np.zeros(4, np.float32)})
    spool.finish()
    (tmp_path / "g" / "0000.npz").write_bytes(b"x")
    with pytest.raises(BundleError, match="damaged"):
        spool.feeds("g")[0]


def test_calibrating_needs_no_torch() -> None:
    code = BLOCKER + (
        "import importlib, pkgutil\n"
        "import pixano_edge.calibration as calibration\n"
        "for module in pkgutil.walk_packages(calibration.__path__, 'pixano_edge.calibration.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert 'onnx' in sys.modules\n"
    )
    blocked = "torch,torchvision,transformers,optimum,onnxscript,safetensors,skimage"
    done = subprocess.run([sys.executable, "-c", code, blocked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
