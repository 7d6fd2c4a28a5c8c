"""What the packaged language model answers about held-out scenes, and the bars that it is meant to reach.

The full gate takes minutes (`pytest -m slow`). The light one runs by default and notices a worse bundle or a broken
pipeline on a few scenes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pixano_edge.benchmarks.describe_quality import DescribeQuality, evaluate
from pixano_edge.engine.models.decoder.model import DecoderModel

FULL, MOST_FREQUENT = 0.90, 0.50
QUESTIONS, CAPTIONS = 60, 10
LIGHT = 0.90
"""Share of exact answers to the first questions."""
MAX_BYTES = 20_000_000
BUNDLE = Path(__file__).resolve().parents[2] / "engine" / "assets" / "smolvlm-demo"


@pytest.fixture(autouse=True)
def need_bundle() -> None:
    pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")


def test_light_gate() -> None:
    result = evaluate(BUNDLE, QUESTIONS, captions=CAPTIONS)
    assert result.of().exact >= LIGHT, result.wrong
    assert result.of().majority < MOST_FREQUENT
    assert result.of("caption").exact >= 0.5, result.wrong


def test_size() -> None:
    assert sum(file.stat().st_size for file in BUNDLE.rglob("*") if file.is_file()) < MAX_BYTES


def test_control_another_picture_fails_the_light_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions, each about the picture of the question before: answers come from the picture."""
    generate, shown = DecoderModel.generate, []

    def one_behind(self: DecoderModel, conversation: Any, images: Any, options: Any = None) -> Any:
        shown.append(images)
        return generate(self, conversation, shown[-2] if len(shown) > 1 else images, options)

    monkeypatch.setattr(DecoderModel, "generate", one_behind)
    assert evaluate(BUNDLE, QUESTIONS, captions=CAPTIONS).of().exact < MOST_FREQUENT + 0.1


@pytest.fixture(scope="module")
def measured() -> DescribeQuality:
    return evaluate(BUNDLE, 500)


@pytest.mark.slow
def test_full_gate(measured: DescribeQuality) -> None:
    assert measured.of().exact >= FULL, measured.lines
    assert measured.of().majority < MOST_FREQUENT
    for line in measured.lines[:-1]:
        assert line.majority < MOST_FREQUENT + 0.05, line
