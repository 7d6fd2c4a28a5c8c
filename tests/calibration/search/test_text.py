"""Vision-language models through the whole command: 4-bit decoder, int8 vision tower. Weights of the tiny model are
random, so an answer that is off by a token says nothing; the comparison is replaced where a variant of it has to be
published. The packaged one is trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from pixano_edge.calibration.data import open_data
from pixano_edge.calibration.result import Budget
from pixano_edge.calibration.run import Request, calibrate
from pixano_edge.calibration.tasks.base import TaskOptions
from pixano_edge.calibration.tasks.text import TextTask
from pixano_edge.engine.bundle import Bundle, demo_path
from pixano_edge.engine.models.decoder.base import GenerationOptions
from pixano_edge.engine.models.decoder.opening import open_vlm
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.text.messages import read_conversation
from pixano_edge.engine.models.verify import verify_bundle


def _request(scenes: Path, tmp_path: Path, precision: str, **more: object) -> Request:
    return Request(
        open_data(scenes, limit=4, allow_few=True),
        Budget("exact", 0.9),
        TaskOptions(threads=1, questions=("What is on this image?",), max_new_tokens=3),
        tmp_path / "out",
        precision=precision,
        work=tmp_path / "work",
        **more,  # type: ignore[arg-type]
    )


def _answer(bundle: Bundle, precision: str, picture: Path) -> str:
    image = decode_image(picture)
    with open_vlm(bundle, device="cpu", precision=precision, threads=1) as model:
        asked = read_conversation("What is on this image?", [image])
        return model.generate(asked, [image], GenerationOptions(max_new_tokens=3)).text


@pytest.fixture(params=["tiny_vlm_bundle", "qwen_bundle"])
def family(request: pytest.FixtureRequest) -> Bundle:
    """A small language model of each kind: SmolVLM, Qwen2.5-VL."""
    return Bundle.open(request.getfixturevalue(request.param))


def test_a_decoder_in_4_bits_is_published(
    family: Bundle, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextTask, "compare", lambda self, want, got, plan: float(len(want) == len(got)))
    bundle = family
    outcome = calibrate(bundle, _request(scenes, tmp_path, "int4"))
    assert outcome.bundle is not None
    made = outcome.bundle
    assert made.variants() == [*bundle.variants(), "int4"]
    assert made.manifest.calibrations[0].metric == "exact"
    assert "graphs/decoder.int4.weights" in made.manifest.files
    (size,) = outcome.result.variants[0].graphs
    assert size.bytes < size.fp32_bytes
    assert _answer(made, "int4", scenes / "scene-000000.png") is not None


def test_the_packaged_model_in_4_bits_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fp32 graphs read their matrices from fp16's file, through a Cast."""
    pytest.importorskip("skimage", reason="the scenes' textures need pixano-edge[benchmarks]")
    from pixano_edge.export.demo.write_scenes import write_talk

    for name, fewer in (("METHODS", ("rtn", "awq")), ("EXPONENTS", (0.5,))):  # half a minute for all of them
        monkeypatch.setattr(f"pixano_edge.calibration.weight_only.{name}", fewer)
    write_talk(tmp_path / "talk", 9)
    bundle = Bundle.open(demo_path("smolvlm-demo"))
    full = onnx.load(bundle.graph_path("decoder", "fp32"), load_external_data=False)
    assert Counter(n.op_type for n in full.graph.node)["Cast"] > 16
    request = Request(
        open_data(tmp_path / "talk"),
        Budget("exact", 0.5),
        TaskOptions(threads=1, questions=("What color is the star?", "How many objects are there?"), max_new_tokens=4),
        tmp_path / "out",
        precision="int4",
        work=tmp_path / "work",
    )
    outcome = calibrate(bundle, request)
    variant = outcome.result.variants[0]
    assert variant.passed, variant.problems
    assert outcome.bundle is not None
    (size,) = variant.graphs
    assert size.layers == size.of_layers == 16
    assert size.bytes < 0.2 * size.fp32_bytes
    made = onnx.load(outcome.bundle.graph_path("decoder", "int4"), load_external_data=False)
    found = Counter(n.op_type for n in made.graph.node)
    assert (found["MatMulNBits"], found["MatMul"], found["Gemm"]) == (17, 0, 0)
    assert onnx.TensorProto.FLOAT16 not in {t.data_type for t in made.graph.initializer}
    held = outcome.bundle.manifest.graphs
    assert held["vision_encoder"].variants["int4"].file == held["vision_encoder"].variants["fp32"].file
    assert verify_bundle(outcome.bundle, "cpu", "onnxruntime", "int4", threads=1).passed


def test_a_vision_tower_in_int8_is_judged_by_answers(family: Bundle, scenes: Path, tmp_path: Path) -> None:
    request = _request(scenes, tmp_path, "int8", graphs=("vision_encoder",), search_samples=1, dry_run=True)
    variant = calibrate(family, request).result.variants[0]
    assert [g.graph for g in variant.graphs] == ["vision_encoder"]
    assert variant.held_out is not None
    assert {s.value for s in variant.held_out.samples} <= {0.0, 1.0}
    assert variant.passed == (variant.held_out.mean >= 0.9)
    assert variant.worst[0].asked == "What is on this image?"
    assert variant.worst[0].fp32_text
