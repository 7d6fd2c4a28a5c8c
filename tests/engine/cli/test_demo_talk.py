"""The demo's questions about the bundled pictures, with a fake model."""

from __future__ import annotations

from typing import Any

import numpy as np

from pixano_edge.engine.cli.demo import demo_folder
from pixano_edge.engine.cli.demo_talk import read_questions, run_questions
from pixano_edge.engine.models.images import decode_image
from pixano_edge.export.demo.talk_pictures import SEEDS, make_pictures
from tests.support.fake_vlm import FakeVlm


def test_bundled_pictures_are_what_the_script_draws(tmp_path: Any) -> None:
    make_pictures(tmp_path, SEEDS[:1])
    (picture, questions), *others = read_questions(demo_folder())
    assert len(others) == len(SEEDS) - 1
    [(made, same)] = read_questions(tmp_path)
    assert same == questions
    new, old = (np.asarray(decode_image(path), np.int16) for path in (made, picture))
    assert np.abs(new - old).mean() < 0.5  # OpenCV versions round differently; another scene is tens of levels away


def test_answers_are_judged_word_for_word() -> None:
    picture, questions = read_questions(demo_folder())[0]
    model: Any = FakeVlm()
    asked = [(question, f"1 images: {question}") for question, _ in questions[:-1]] + [(questions[-1][0], "A cat.")]
    found = run_questions(model, picture, asked)
    assert [r.exact for r in found] == [True] * (len(asked) - 1) + [False]
    assert [(r.question, r.right) for r in found] == asked
    assert all(0 < r.first_seconds <= r.seconds and r.tokens > 0 for r in found)
    assert {shape for _, shapes, _ in model.asked for shape in shapes} == {np.asarray(decode_image(picture)).shape}
    assert model.open == 0
