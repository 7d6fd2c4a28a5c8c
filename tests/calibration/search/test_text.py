"""Vision-language models through the whole command: 4-bit decoder, int8 vision tower. Weights are random here, so an
answer that is off by a token says nothing; the comparison is replaced where a variant has to be published."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.calibration.data import open_data
from pixano_edge.calibration.result import Budget
from pixano_edge.calibration.run import Request, calibrate
from pixano_edge.calibration.tasks.base import TaskOptions
from pixano_edge.calibration.tasks.text import TextTask
from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.models.decoder.base import GenerationOptions
from pixano_edge.engine.models.decoder.opening import open_vlm
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.text.messages import read_conversation


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


def test_a_decoder_in_4_bits_is_published(
    tiny_vlm_bundle: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextTask, "compare", lambda self, want, got, plan: float(len(want) == len(got)))
    bundle = Bundle.open(tiny_vlm_bundle)
    outcome = calibrate(bundle, _request(scenes, tmp_path, "int4"))
    assert outcome.bundle is not None
    made = outcome.bundle
    assert made.variants() == [*bundle.variants(), "int4"]
    assert made.manifest.calibrations[0].metric == "exact"
    assert "graphs/decoder.int4.weights" in made.manifest.files
    (size,) = outcome.result.variants[0].graphs
    assert size.bytes < size.fp32_bytes
    assert _answer(made, "int4", scenes / "scene-000000.png") is not None


def test_a_vision_tower_in_int8_is_judged_by_answers(tiny_vlm_bundle: Path, scenes: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_vlm_bundle)
    request = _request(scenes, tmp_path, "int8", graphs=("vision_encoder",), search_samples=1, dry_run=True)
    variant = calibrate(bundle, request).result.variants[0]
    assert [g.graph for g in variant.graphs] == ["vision_encoder"]
    assert variant.held_out is not None
    assert {s.value for s in variant.held_out.samples} <= {0.0, 1.0}
    assert variant.passed == (variant.held_out.mean >= 0.9)
    assert variant.worst[0].asked == "What is on this image?"
    assert variant.worst[0].fp32_text
