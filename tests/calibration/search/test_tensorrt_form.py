"""The int8 decoder for TensorRT: the decisions of ONNX Runtime's form, compared before it is published, and built.

The demo's language model is trained; Qwen2.5-VL's weights are random, its positions are not those of SmolVLM."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pixano_edge.calibration import make_int8, tensorrt_form
from pixano_edge.calibration.data import open_data
from pixano_edge.calibration.publish import publish
from pixano_edge.calibration.result import Budget
from pixano_edge.calibration.run import Outcome, Request, calibrate
from pixano_edge.calibration.search import Found
from pixano_edge.calibration.tasks.base import TaskOptions
from pixano_edge.calibration.tasks.text import TextTask
from pixano_edge.calibration.tensorrt_form import (
    differing,
    int8_products,
    quantise_form,
    read_form,
)
from pixano_edge.calibration.variant import VariantFiles
from pixano_edge.calibration.work import NewGraph
from pixano_edge.engine.build.engines import report_layers
from pixano_edge.engine.build.plan import choose, left_out
from pixano_edge.engine.bundle import Bundle, BundleWriter, demo_path
from pixano_edge.engine.contracts import decoder as decoders
from pixano_edge.engine.errors import BundleError, CalibrationError
from pixano_edge.engine.models.decoder.base import GenerationOptions
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.text.messages import read_conversation
from pixano_edge.engine.models.verify import verify_bundle
from pixano_edge.engine.runtime import open_device, open_session
from pixano_edge.export import tensorrt_rtx
from tests.support.int8_form import Case, int8_forms

DECODER = decoders.DECODER
PLAIN = "graphs/decoder.fp32.tensorrt.onnx"
QUESTIONS = ("What color is the star?", "Describe the image.")


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open(demo_path("smolvlm-demo"))


@pytest.fixture(scope="module")
def case(demo: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return int8_forms(demo, tmp_path_factory.mktemp("form"))


def changed(model: onnx.ModelProto, name: str, by: float) -> onnx.ModelProto:
    """A copy with the constants whose names start so multiplied."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = [t for t in copy.graph.initializer if t.name.startswith(name)]
    assert found
    for tensor in found:
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((value * np.float32(by)).astype(value.dtype), tensor.name))
    return copy


def test_the_forms_of_the_demo_are_one_decoder(case: Case) -> None:
    found = case.compare(case.ours)
    assert found.problems == ()
    assert found.products == len(case.source.blocks) == 17
    assert len(case.feeds) < found.runs  # prompts end in single steps
    assert found.unrounded < 1e-5
    assert found.rounded < 0.5
    assert not any(node.domain for node in case.ours.graph.node)


def test_the_forms_of_a_qwen_are_one_decoder(qwen_bundle: Path, tmp_path: Path) -> None:
    """With biases behind its products, and positions of three rows."""
    case = int8_forms(Bundle.open(qwen_bundle), tmp_path)
    found = case.compare(case.ours)
    assert found.problems == ()
    assert found.products == len(case.source.blocks) == 9
    assert found.unrounded < 1e-5
    # The positions matter: without them the same graphs are far apart.
    case.feeds = [{**feed, decoders.POSITION_IDS: feed[decoders.POSITION_IDS] * 0 + 7} for feed in case.feeds]
    assert case.compare(case.ours).unrounded < 1e-5
    wrong = changed(case.ours, "cos_table.1", 1.5)
    (problem,) = [p for p in case.compare(wrong).problems if "without the rounding" in p]
    assert "of the largest" in problem


@pytest.mark.parametrize(
    ("constant", "by", "words"),
    [
        # A quarter too large: its logits alone would not show it.
        ("layers.2.mlp.gated_scale", 1.25, "'node_layers.2.mlp.down.product' has other weights or scales"),
        ("layers.1.mlp.down.weight_scales", 1.02, "'node_layers.1.mlp.down.product' has other weights or scales"),
        ("layers.1.mlp.down.weight_scales", 1.02, "without the rounding of activations its logits are"),
        # Nothing that is quantised: the rotation of keys and queries.
        ("cos_table", 0.9, "without the rounding of activations its logits are"),
        # So wrong that it shows in what int8 gives.
        ("final_row_scale", 0.25, "as these are from fp32, 1 at most"),
    ],
)
def test_a_form_that_is_wrong_is_caught(case: Case, constant: str, by: float, words: str) -> None:
    assert any(words in problem for problem in case.compare(changed(case.ours, constant, by)).problems)


def test_values_that_are_no_numbers_are_caught(case: Case) -> None:
    problems = case.compare(changed(case.ours, "final_norm.scale", np.nan)).problems
    assert any("nan" in problem for problem in problems)


def test_a_product_that_is_left_out_or_reads_something_else_is_told(case: Case) -> None:
    fewer, _ = VariantFiles({DECODER: case.source}, Path(), "auto", "search").quantise(
        DECODER, [name for name in case.source.blocks if name != "lm_head"]
    )
    assert differing(case.ours, fewer) == ["the product 'node_logits' is int8 in the form for TensorRT alone"]
    assert differing(fewer, case.ours) == ["the product 'node_logits' is int8 in ONNX Runtime's form alone"]
    other = onnx.ModelProto()
    other.CopyFrom(case.ours)
    (pair,) = [n for n in other.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "layers.0.mlp.gated"]
    pair.input[0] = "layers.1.mlp.gated"
    (told,) = differing(other, case.theirs)
    assert "reads 'layers.1.mlp.gated' instead of 'layers.0.mlp.gated'" in told


def test_channels_are_rescaled_alike(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained weights of the demo need no such place; here every product in front of which one can be gets it."""
    monkeypatch.setattr("pixano_edge.calibration.smooth.MUL_GAIN", np.inf)
    files = VariantFiles({DECODER: case.source}, Path(), "auto", 0.5)
    theirs, told = files.quantise(DECODER, case.source.blocks)
    form = read_form(case.bundle, case.source)
    assert form is not None
    ours, same = quantise_form(form, case.source, case.source.blocks, "auto", 0.5)
    assert len(told.smoothed) == 17
    assert (same.smoothed, same.ranges, same.blocks) == (told.smoothed, told.ranges, told.blocks)
    assert len(int8_products(theirs)) == 17
    assert replace(case, theirs=theirs).compare(ours).problems == ()
    # Against the decisions of the search they differ.
    assert len(differing(ours, case.theirs)) > 8


def with_plain_graph(bundle: Bundle, folder: Path, change: Callable[[onnx.ModelProto], object]) -> Bundle:
    """A copy of a bundle whose decoder for TensorRT is another one; without a word on calibrations."""
    with BundleWriter(folder) as writer:
        for file in bundle.manifest.files:
            writer.add_file(file, bundle.file(file))
        model = onnx.load(str(bundle.file(PLAIN)), load_external_data=False)
        change(model)
        (writer.root / PLAIN).unlink()
        writer.add_file(PLAIN, model.SerializeToString())
        writer.finish(bundle.manifest.model_dump(exclude={"schema_version", "files", "calibrations"}))
    return Bundle.open(folder)


def _rename(model: onnx.ModelProto) -> None:
    (node,) = [n for n in model.graph.node if n.name == "node_layers.1.mlp.down.product"]
    node.name = "node_other"


def _reread(model: onnx.ModelProto) -> None:
    (node,) = [n for n in model.graph.node if n.name == "node_layers.1.mlp.down.product"]
    node.input[0] = "layers.0.mlp.gated"


@pytest.mark.parametrize(("change", "words"), [(_rename, "no such product"), (_reread, "another product")])
def test_a_product_that_is_missing_there_is_left_out_of_both_and_told(
    case: Case, tmp_path: Path, change: Callable[[onnx.ModelProto], object], words: str
) -> None:
    bundle = with_plain_graph(case.bundle, tmp_path / "bundle", change)
    form = read_form(bundle, case.source)
    assert form is not None
    assert list(form.absent) == ["layers.1.mlp.down"]
    assert words in form.absent["layers.1.mlp.down"]
    with pytest.raises(CalibrationError, match="cannot be quantised in the graph for TensorRT"):
        quantise_form(form, case.source, case.source.blocks, "auto", None)


def _all_of_them(units: Any, *rest: Any, refused: Any, **more: Any) -> Found:
    return Found(frozenset(unit for unit in units if unit not in refused), 1.0, 1.0)


def _request(bundle: Bundle, folder: Path, **more: Any) -> Request:
    return Request(
        open_data(bundle.root / "golden", allow_few=True),
        Budget("exact", 0.5),
        TaskOptions(threads=1, questions=QUESTIONS, max_new_tokens=4),
        folder / "out",
        graphs=(DECODER,),
        work=folder / "work",
        **more,
    )


def _quicken(patch: pytest.MonkeyPatch) -> None:
    """Leaves out the search, and what is measured of speed and memory."""
    patch.setattr(make_int8, "search", _all_of_them)
    patch.setattr("pixano_edge.calibration.run.measure_file", lambda *_: None)
    patch.setattr("pixano_edge.calibration.run.time_graphs", lambda *_, **__: ((), ()))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    _quicken(monkeypatch)


@pytest.fixture(scope="module")
def calibrated(demo: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The demo with an int8 variant of its whole decoder."""
    with pytest.MonkeyPatch.context() as patch:
        _quicken(patch)
        return calibrate(demo, _request(demo, tmp_path_factory.mktemp("int8")))


def _published(outcome: Outcome) -> Bundle:
    assert outcome.bundle is not None, outcome.result.variants[0].problems
    return outcome.bundle


def test_the_whole_variant_can_be_built(calibrated: Outcome, demo: Bundle) -> None:
    bundle = _published(calibrated)
    (note,) = [n for n in calibrated.result.variants[0].notes if "for TensorRT" in n]
    assert "17 products in int8 as in ONNX Runtime's form" in note
    held = bundle.manifest.graphs[DECODER].variants
    assert held["int8"].onnxruntime_only
    assert (held["int8-tensorrt"].target, held["int8-tensorrt"].onnxruntime_only) == ("tensorrt", False)
    assert held["int8-tensorrt"].file == "graphs/decoder.int8.tensorrt.onnx"
    # The int8 weights lie there once, and what stayed in float is that of fp32's file.
    assert bundle.file(held["int8-tensorrt"].file).stat().st_size < 80_000
    assert {(c.variant, c.target) for c in choose(bundle, precisions=["int8"])} == {("int8-tensorrt", "tensorrt")}
    assert left_out(bundle) == []
    assert {f: e for f, e in bundle.manifest.files.items() if "int8" not in f} == demo.manifest.files
    assert not [m for m in bundle.manifest.memory if m.variant == "int8-tensorrt"]
    assert verify_bundle(bundle, "cpu", "onnxruntime", "int8", threads=1).passed


def test_it_answers_as_the_other_form(calibrated: Outcome) -> None:
    bundle = _published(calibrated)
    image = decode_image(bundle.file(bundle.manifest.golden[0].image))
    answers = []
    for target in ("onnx", "tensorrt"):
        device = open_device("cpu")
        opened = {
            name: open_session(
                bundle.graph_path(name, "int8", target), bundle.spec(name, "int8", target), device, threads=1
            )
            for name in bundle.specs
        }
        task = TextTask(bundle, TaskOptions(threads=1))
        with task.make(opened, dict.fromkeys(opened, target)) as model:
            told = [model.generate(read_conversation(q, [image]), [image], GenerationOptions(12)) for q in QUESTIONS]
            answers.append([answer.text for answer in told])
    assert answers[0] == answers[1]
    assert all(answers[0])


@pytest.mark.skipif(
    tensorrt_rtx.missing_module() is not None,
    reason=f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'",
)
def test_its_engine_builds_and_every_product_reads_int8(calibrated: Outcome) -> None:
    bundle = _published(calibrated)
    (choice,) = choose(bundle, [DECODER], ["int8"])
    assert tensorrt_rtx.check_build(bundle.root / choice.file, choice.spec, ("SM89",)).engine_bytes > 100_000
    report = report_layers(bundle, choice, "tensorrt_rtx")
    assert report.precisions["int8 -> float32"] == 17


def test_another_calibration_leaves_no_file_behind(calibrated: Outcome, tmp_path: Path, quick: None) -> None:
    bundle = Bundle.open(shutil.copytree(_published(calibrated).root, tmp_path / "out"))
    again = _published(calibrate(bundle, _request(bundle, tmp_path)))
    assert again.root == bundle.root
    assert again.manifest.graphs == bundle.manifest.graphs
    assert set(again.manifest.files) == set(bundle.manifest.files)
    assert not list((tmp_path / "work").iterdir())


def test_what_is_not_calibrated_again_goes_with_both_forms(calibrated: Outcome, tmp_path: Path) -> None:
    """The decoder is looked at again and stays in fp32: both of its int8 files go."""
    bundle = _published(calibrated)
    vision = onnx.load(str(bundle.graph_path("vision_encoder", "fp32")))
    onnx.save(vision, str(tmp_path / "vision.onnx"))
    new = {"vision_encoder": NewGraph(tmp_path / "vision.onnx")}
    (entry,) = bundle.manifest.calibrations
    made = publish(
        bundle,
        tmp_path / "made",
        "int8",
        "int8",
        new,
        entry.model_copy(update={"report": None}),
        {},
        considered=bundle.manifest.graphs,
    )
    held = made.manifest.graphs[DECODER].variants
    assert (held["int8"].file, held["int8-tensorrt"].file) == (held["fp32"].file, PLAIN)
    assert not [f for f in made.manifest.files if f.startswith("graphs/decoder.int8")]
    assert {c.variant for c in choose(made, precisions=["int8"])} == {"int8-tensorrt"}
    # Not looked at, it stays as it is.
    beside = publish(bundle, tmp_path / "beside", "int8", "int8", new, entry.model_copy(update={"report": None}), {})
    assert beside.manifest.graphs[DECODER] == bundle.manifest.graphs[DECODER]
    vision = beside.manifest.graphs["vision_encoder"].variants
    assert vision["int8"].file == vision["int8-tensorrt"].file == "graphs/vision_encoder.int8.onnx"
    assert {c.variant for c in choose(beside, precisions=["int8"])} == {"int8-tensorrt"}


def _old(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle as versions wrote it that made no form for TensorRT."""
    source = folder / "decoder.onnx"
    onnx.save(onnx.load(str(bundle.graph_path(DECODER, "int8"))), str(source))
    (entry,) = bundle.manifest.calibrations
    new = {DECODER: NewGraph(source)}
    entry = entry.model_copy(update={"report": None})
    return publish(bundle, folder / "old", "int8", "int8", new, entry, {}, considered=bundle.manifest.graphs)


def test_a_bundle_without_the_form_works_and_says_what_to_do(calibrated: Outcome, tmp_path: Path, quick: None) -> None:
    old = _old(_published(calibrated), tmp_path)
    assert not [v for graph in old.manifest.graphs.values() for v in graph.variants if v == "int8-tensorrt"]
    assert not [f for f in old.manifest.files if f.startswith("graphs/decoder.int8.tensorrt")]
    assert verify_bundle(old, "cpu", "onnxruntime", "int8", threads=1).passed
    for graphs in ((), (DECODER,)):
        with pytest.raises(BundleError, match="was calibrated without a form for TensorRT") as caught:
            choose(old, graphs, ["int8"])
        assert "pixano-edge calibrate <bundle> --data <pictures> --precision int8 --in-place" in caught.value.action
    assert any("decoder in int8 is not built" in told for told in left_out(old))
    assert "int8" not in {c.precision for c in choose(old, [DECODER])}
    # Calibrated again, the decoder alone: the graphs that run fp32's file under that name can be built now, too.
    new = _published(calibrate(old, _request(old, tmp_path)))
    assert {c.target for c in choose(new, precisions=["int8"])} == {"tensorrt"}


def test_a_form_that_differs_is_not_published(
    demo: Bundle, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tensorrt_form.quantise_form

    def broken(*arguments: Any) -> Any:
        model, report = made(*arguments)
        return changed(model, "layers.2.mlp.gated_scale", 1.25), report

    monkeypatch.setattr(make_int8, "quantise_form", broken)
    monkeypatch.setattr("pixano_edge.calibration.run._golden", lambda *_: [])  # seconds, and tested elsewhere
    outcome = calibrate(demo, _request(demo, tmp_path))
    assert outcome.bundle is None
    assert not (tmp_path / "out").exists()
    (variant,) = outcome.result.variants
    (problem,) = [p for p in variant.problems if "for TensorRT" in p]
    assert "export the bundle again, or report it" in variant.problems[-1]
    assert "decoder for TensorRT: the product 'node_layers.2.mlp.down.product' has other weights or scales" in problem


def test_a_broken_scale_of_the_form_is_never_published(calibrated: Outcome, tmp_path: Path) -> None:
    bundle = _published(calibrated)
    paths = {}
    for target in ("onnx", "tensorrt"):
        model = onnx.load(str(bundle.graph_path(DECODER, "int8", target)))
        model = changed(model, "layers.2.mlp.gated_scale", 0.0) if target == "tensorrt" else model
        paths[target] = tmp_path / f"{target}.onnx"
        onnx.save(model, str(paths[target]))
    new = {DECODER: NewGraph(paths["onnx"], tensorrt=paths["tensorrt"])}
    with pytest.raises(CalibrationError, match="broken"):
        publish(bundle, tmp_path / "made", "int8", "int8", new, bundle.manifest.calibrations[0], {})


def test_a_missing_product_stays_in_fp32_with_the_reason(case: Case, tmp_path: Path, quick: None) -> None:
    bundle = with_plain_graph(case.bundle, tmp_path / "bundle", _rename)
    outcome = calibrate(bundle, replace(_request(bundle, tmp_path), dry_run=True))
    (variant,) = outcome.result.variants
    assert variant.passed, variant.problems
    assert [b.name for b in variant.blocks if not b.quantised] == ["layers.1.mlp.down"]
    (row,) = [b for b in variant.blocks if not b.quantised]
    assert row.why == "the decoder's graph for TensorRT has no such product"
    assert any("1 layer(s) of decoder stay in fp32" in note for note in outcome.result.notes)
    assert any("16 products in int8" in note for note in variant.notes)


def test_no_form_where_none_is_needed(demo: Bundle, case: Case) -> None:
    assert read_form(demo, replace(case.source, graph="vision_encoder")) is None
