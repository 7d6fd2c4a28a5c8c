"""The table of exact answers, with a model that gives the right ones to some questions only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pixano_edge.benchmarks import describe_quality
from pixano_edge.benchmarks.describe_quality import COLUMNS, evaluate, table_rows, wilson
from pixano_edge.engine.models.decoder import opening
from pixano_edge.export.demo.questions import TYPES
from pixano_edge.export.demo.vqa_eval import FIRST_SEED, cases


class _Reader:
    """Knows the right answer of every question but those about colours."""

    def __init__(self, asked: list[Any]) -> None:
        self._answers = iter(asked)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def info(self) -> dict[str, str]:
        return {"precision": "fp32"}

    def generate(self, conversation: Any, images: Any, options: Any) -> Any:
        case = next(self._answers)
        assert case.question.text in conversation.texts
        assert (images[0] == case.image).all()
        return SimpleNamespace(text=" no idea" if case.question.kind == "color" else f" {case.question.answer}")


def test_each_type_is_counted_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [*cases(20), *cases(3, FIRST_SEED + 10_000, ("caption",))]
    monkeypatch.setattr(opening, "open_vlm", lambda *_, **__: _Reader(asked))
    name = SimpleNamespace(manifest=SimpleNamespace(name="reader"))
    monkeypatch.setattr(describe_quality.Bundle, "open", lambda _: name)
    done: list[int] = []
    found = evaluate("reader", 20, captions=3, on_answer=lambda: done.append(1))
    assert len(done) == 23
    assert {line.kind: line.exact for line in found.lines} == {
        **dict.fromkeys(TYPES, 1.0), "color": 0.0, "all": 0.8, "caption": 1.0,
    }  # fmt: skip
    assert {row["kind"] for row in found.wrong} == {"color"}
    assert [len(row) for row in table_rows(found)] == [len(COLUMNS)] * 7


def test_interval_holds_the_share_and_narrows() -> None:
    few, many = wilson(0.9, 20), wilson(0.9, 500)
    assert few[0] < many[0] < 0.9 < many[1] < few[1]
    assert wilson(1.0, 10)[1] == 1.0
