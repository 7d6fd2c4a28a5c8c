"""Chat template, control tokens, sampling, pieces of text."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixano_edge.engine.errors import BundleError, PromptError
from pixano_edge.engine.models.text.messages import Message, Part, read_conversation
from pixano_edge.engine.models.text.pieces import Detokenizer, StopStrings
from pixano_edge.engine.models.text.prompt import encode_conversation
from pixano_edge.engine.models.text.sampling import Sampler, Sampling
from pixano_edge.engine.models.text.template import MAX_TEMPLATE, ChatTemplate
from pixano_edge.engine.models.text.tokenizer import TextTokenizer

from .tokens import TEMPLATE, tokenizer

USER = (Message("user", (Part("Hi"),)),)


def test_template_renders_as_transformers_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    parts = (Part(), Part("What is "), Part(), Part("this?"))
    messages = (
        Message("system", (Part("Be short."),)),
        Message("user", parts),
        Message("assistant", (Part("A <cat>"),)),
    )
    told = [
        {
            "role": m.role,
            "content": [{"type": "image"} if p.is_image else {"type": "text", "text": p.text} for p in m.parts],
        }
        for m in messages
    ]
    for generate in (True, False):
        (want,), _ = render_jinja_template([told], chat_template=TEMPLATE, add_generation_prompt=generate)
        assert ChatTemplate(TEMPLATE).render(messages, generate=generate) == want


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("x" * (MAX_TEMPLATE + 1), "more than"),
        ("{{ messages[0]['nothing']['x'] }}", "fails"),
        ("{{ 1 / 0 }}", "fails"),
        ("{{ messages.__class__.__mro__ }}", "fails"),
        ("{{ messages.append(1) }}", "fails"),
        ("{{ 'x' * 1000000000 }}", "more than"),
        ("{{ '%1000000000d' % 1 }}", "fails"),
        ("{{ 2 ** 1000000 }}", "fails"),
        ("{{ 'x' | center(1000000000) }}", "cannot be read"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails"),
        (
            "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "more than",
        ),
        (
            "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "more than",
        ),
        ("{% for i in range(99) %}{{ 'x' * 100000 }}{% endfor %}", "more than"),
    ],
)  # fmt: skip
def test_broken_template(source: str | bytes, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        ChatTemplate(source).render(USER)


def test_endless_template_ends() -> None:
    head, tail = "{% for a in l %}{% for b in l %}{% for c in l %}", "{% endfor %}" * 3
    loops = "{% set l = range(99999) | list %}" + head + tail
    started = time.perf_counter()
    with pytest.raises(BundleError, match="longer than"):
        ChatTemplate(loops).render(USER)
    assert time.perf_counter() - started < 10


def test_template_that_refuses() -> None:
    with pytest.raises(PromptError, match="must alternate"):
        ChatTemplate("{{ raise_exception('Roles must alternate') }}").render(USER)


def encode(text: str, images: int = 0) -> list[int]:
    conversation = read_conversation(text, ["x"] * images)
    return encode_conversation(conversation, ChatTemplate(TEMPLATE), tokenizer(), "<image>", lambda i: "<image>" * 3)


def test_prompt_tokens_are_those_of_the_rendered_text() -> None:
    rendered = "<|im_start|>User:" + "<image>" * 6 + "What is this?<end_of_utterance>\nAssistant:"
    assert encode("What is this?", 2) == tokenizer().encode(rendered)
    assert encode("What is this?", 2).count(tokenizer().special["<image>"]) == 6


@pytest.mark.parametrize("name", ["<image>", "<end_of_utterance>", "<|im_start|>", "<row_1_col_1>"])
def test_control_tokens_that_a_user_writes_are_text(name: str) -> None:
    controls = set(tokenizer().special.values())
    plain, odd = encode("before after", 1), encode(f"before {name} after", 1)
    assert [i for i in odd if i in controls] == [i for i in plain if i in controls]
    assert name in tokenizer().decode(odd)


def test_texts_that_make_a_control_token_together_are_refused() -> None:
    parts = [{"type": "text", "text": "<end_of_"}, {"type": "text", "text": "utterance>"}]
    conversation = read_conversation([{"role": "user", "content": parts}])
    with pytest.raises(PromptError, match="control token"):
        encode_conversation(conversation, ChatTemplate(TEMPLATE), tokenizer(), "<image>", str)


def test_template_without_places_for_images() -> None:
    conversation = read_conversation("What?", ["x"])
    with pytest.raises(BundleError, match="0 places for 1 images"):
        encode_conversation(conversation, ChatTemplate("{{ 'User:' }}"), tokenizer(), "<image>", str)


def test_not_a_tokeniser() -> None:
    with pytest.raises(BundleError, match="tokeniser"):
        TextTokenizer("{}")
    with pytest.raises(BundleError, match="no token '<nothing>'"):
        tokenizer().id_of("<nothing>")


# Sampling


def test_greedy_takes_the_largest() -> None:
    sampler = Sampler(5)
    sampler.start(Sampling())
    assert sampler.choose(np.array([0, 3, 1, 3, 2], np.float32)) == 1


def test_temperature_draws_from_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)) * 0.7
    sampler = Sampler(4)
    sampler.start(Sampling(0.7, seed=1))
    drawn = np.bincount([sampler.choose(logits) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.015)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.96, 4), (1.0, 4)])
def test_top_p_keeps_what_reaches_it(top_p: float, kept: int) -> None:
    probabilities = np.array([0.15, 0.5, 0.05, 0.3])
    sampler = Sampler(4)
    sampler.start(Sampling(1.0, top_p, seed=1))
    drawn = {sampler.choose(np.log(probabilities).astype(np.float32)) for _ in range(2000)}
    assert drawn == set(np.argsort(-probabilities)[:kept].tolist())


def test_top_p_is_that_of_transformers() -> None:
    import torch
    from transformers.generation.logits_process import TopPLogitsWarper

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, 500).astype(np.float32)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        kept = torch.isfinite(TopPLogitsWarper(top_p)(torch.zeros(1, 1), torch.from_numpy(logits)[None]))[0].numpy()
        sampler = Sampler(500)
        sampler.start(Sampling(1.0, top_p, seed=0))
        p = np.exp(logits.astype(np.float64) - logits.max())
        sampler._keep_top(p)
        np.testing.assert_array_equal(p > 0, kept)


def test_a_seed_repeats() -> None:
    rng = np.random.default_rng(0)
    steps = rng.normal(0, 1, (50, 100)).astype(np.float32)

    def run(seed: int | None) -> list[int]:
        sampler = Sampler(100)
        sampler.start(Sampling(1.0, 0.9, seed))
        return [sampler.choose(step) for step in steps]

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)


def test_small_temperature_does_not_overflow() -> None:
    sampler = Sampler(3)
    sampler.start(Sampling(1e-6, seed=0))
    with np.errstate(over="raise", invalid="raise"):
        assert sampler.choose(np.array([-1e4, 1e4, 0], np.float32)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_sampling_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(PromptError):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, seed=1), Sampling(0.7, 0.9, 1)])
def test_choosing_allocates_nothing_of_the_size_of_the_vocabulary(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).normal(0, 2, 50_000).astype(np.float32)
    sampler = Sampler(50_000)
    sampler.start(sampling)
    sampler.choose(logits)
    tracemalloc.start()
    for _ in range(5):
        sampler.choose(logits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000  # a mask alone would be as much; numpy casts in chunks of 8192


# Pieces


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60))
def test_pieces_join_to_the_text_and_hold_no_half_characters(text: str) -> None:
    ids = tokenizer().encode_plain(text)
    detokenizer = Detokenizer(tokenizer())
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join([*pieces, detokenizer.finish()]) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 350), max_size=80))
def test_pieces_of_any_tokens_join_to_what_they_decode_to(ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer())
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join([*pieces, detokenizer.finish()]) == tokenizer().decode(ids)


def test_window_does_not_grow() -> None:
    detokenizer = Detokenizer(tokenizer())
    for i in tokenizer().encode("a red circle and a blue square " * 40):
        detokenizer.push(i)
        assert len(detokenizer._window) <= 24


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stop_strings_end_the_text_wherever_the_pieces_break(text: str, stops: list[str], data: st.DataObject) -> None:
    found = StopStrings(stops)
    shown, at = "", 0
    while at < len(text) and found.found is None:
        size = data.draw(st.integers(1, 5))
        shown += found.push(text[at : at + size])
        at += size
        assert not any(stop in shown for stop in stops)
    places = [text.find(stop) for stop in stops if stop in text]
    if found.found is None:
        assert shown + found.finish() == text
        assert not places
    else:
        assert found.found in stops
        seen = text[:at]
        assert shown == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
        assert found.push("more") == ""
        assert found.finish() == ""


@pytest.mark.parametrize("stops", [[""], ["x"] * 17, ["x" * 1001], ["\ud800"], [3]])
def test_stop_strings_out_of_range(stops: list[str]) -> None:
    with pytest.raises(PromptError):
        StopStrings(stops)
