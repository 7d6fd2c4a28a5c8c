"""SmolVLM against transformers' `generate`, token by token, and mistakes that must show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.models.decoder import model as decoder_model
from pixano_edge.engine.models.decoder.base import GenerationOptions
from pixano_edge.engine.models.decoder.session import Lane
from pixano_edge.engine.models.smolvlm.model import SmolVlmModel
from pixano_edge.engine.models.text.messages import Conversation, read_conversation
from tests.support.vlm import picture

from .conftest import Exported, Reference

TOKENS = 64
BAR = 1e-3
"""Largest error of a step's logits, relative to the largest of them."""
Images = Sequence[np.ndarray]

CASES: dict[str, tuple[str, list[tuple[int, int]]]] = {
    "no image": ("How many are there?", []),
    "one odd image": ("What is on this image?", [(97, 61)]),
    "one tile": ("What is on this image?", [(1, 1)]),
    "two images": ("Which of them has größere 漢字?", [(33, 200), (64, 64)]),
    "long": ("Describe the red circle and the blue square. " * 6, [(20, 20)]),
}


def ask(prompt: str, sizes: list[tuple[int, int]]) -> tuple[Conversation, list[np.ndarray], list[dict[str, Any]]]:
    images = [picture(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    return read_conversation(prompt, images), images, [{"role": "user", "content": content}]


def worst(model: SmolVlmModel, conversation: Conversation, images: Images, tokens: Any, logits: Any) -> float:
    """Largest relative error of the logits at any step over given tokens."""
    found = list(model.logits(conversation, images, tokens[:-1].tolist()))
    assert len(found) == len(tokens)
    return max(float(np.abs(got - want).max() / np.abs(want).max()) for got, want in zip(found, logits))


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logits_are_those_of_transformers(
    exported: Exported, reference: Reference, model: SmolVlmModel, case: str
) -> None:
    conversation, images, messages = ask(*CASES[case])
    ids, tokens, logits = reference.generate(messages, images, TOKENS)
    prompt = model.prepare(conversation, images)
    np.testing.assert_array_equal(prompt.ids, ids)
    assert len(set(tokens.tolist())) > 10, "the answer repeats itself, which would hide mistakes"
    got = list(model.logits(conversation, images, tokens[:-1].tolist()))
    assert [int(step.argmax()) for step in got] == tokens.tolist()
    errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, logits)]
    assert max(errors) < BAR
    # The end token ends the engine's own answer.
    ends = np.flatnonzero(np.isin(tokens, model.constants.decoder.eos_ids))
    kept = tokens[: ends[0]] if len(ends) else tokens
    answer = model.generate(conversation, images, GenerationOptions(TOKENS))
    assert answer.text == model.tokenizer.decode(kept.tolist())
    assert answer.usage.prompt == len(ids)
    assert answer.usage.completion == len(kept) + bool(len(ends))


def test_plain_operators_and_alternating_buffers_do_the_same(exported: Exported, reference: Reference) -> None:
    with exported.open_plain() as model:
        for case in ("no image", "two images"):
            conversation, images, messages = ask(*CASES[case])
            _, tokens, logits = reference.generate(messages, images, 20)
            assert worst(model, conversation, images, tokens, logits) < BAR
        first = model.generate(conversation, images, GenerationOptions(20))
        again = model.generate(conversation, images, GenerationOptions(20))
        assert again.text == first.text
        assert again.usage.reused == again.usage.prompt - 1
        caches = model.info()["kv_cache"]["caches"]
        assert {cache["kind"] for cache in caches} == {"alternating"}
        assert sum(cache["binds"] for cache in caches) > 60
        assert sum(cache["bind_seconds"] for cache in caches) > 0


def test_a_prompt_in_parts_is_the_same(
    model: SmolVlmModel, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, images, messages = ask(*CASES["two images"])
    _, tokens, logits = reference.generate(messages, images, 8)
    monkeypatch.setattr(decoder_model, "PREFILL_TOKENS", 37)
    assert worst(model, conversation, images, tokens, logits) < BAR


def test_a_kept_prefix_changes_nothing(exported: Exported, model: SmolVlmModel) -> None:
    images = [picture(97, 61), picture(64, 64, 1)]
    questions = ["What is it?", "What is it? And how many?", "Where?"]
    fresh = []
    for question in questions:
        with exported.open() as other:
            fresh.append(other.generate(read_conversation(question, images), images, GenerationOptions(TOKENS)))
    kept = [model.generate(read_conversation(q, images), images, GenerationOptions(TOKENS)) for q in questions]
    assert [answer.text for answer in kept] == [answer.text for answer in fresh]
    assert [answer.usage.completion for answer in kept] == [answer.usage.completion for answer in fresh]
    assert kept[0].usage.reused == fresh[0].usage.reused == 0
    assert [answer.images_encoded for answer in kept] == [2, 0, 0]
    image_tokens = int(
        (model.prepare(read_conversation("x", images), images).ids == model.constants.image_token_id).sum()
    )
    assert min(answer.usage.reused for answer in kept[1:]) > image_tokens
    # A longer conversation goes on where the answer ended.
    longer = read_conversation(
        [
            {"role": "user", "content": [{"type": "image", "url": "a"}, {"type": "image", "url": "b"}, "Where?"]},
            {"role": "assistant", "content": kept[2].text},
            {"role": "user", "content": "Why?"},
        ]
    )
    again = model.generate(longer, images, GenerationOptions(16))
    with exported.open() as other:
        assert other.generate(longer, images, GenerationOptions(16)).text == again.text
    assert again.usage.reused > image_tokens


@pytest.fixture
def expected(reference: Reference) -> tuple[Conversation, list[np.ndarray], Any, Any]:
    conversation, images, messages = ask(*CASES["one odd image"])
    _, tokens, logits = reference.generate(messages, images, 8)
    return conversation, images, tokens, logits


def test_wrong_position_shows(model: SmolVlmModel, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Lane.step

    def step(self: Lane, token: int, position: int | None = None) -> Any:
        self.length -= 1  # writes over the slot before, and rotates as for that
        found = real(self, token, position)
        return found

    monkeypatch.setattr(Lane, "step", step)
    assert worst(model, *expected) > 10 * BAR


def test_stale_cache_shows(model: SmolVlmModel, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, images, _, _ = expected
    other = [picture(*image.shape[:2], seed=9) for image in images]
    honest = model.generate(conversation, images, GenerationOptions(24)).text
    model.generate(conversation, other, GenerationOptions(24))
    assert model.generate(conversation, images, GenerationOptions(24)).text == honest
    monkeypatch.setattr("pixano_edge.engine.models.smolvlm.model.pixel_digest", lambda image: b"the same for all")
    model.shrink()
    model.generate(conversation, other, GenerationOptions(24))
    assert model.generate(conversation, images, GenerationOptions(24)).text != honest


def test_swapped_tiles_show(model: SmolVlmModel, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixano_edge.engine.models.smolvlm import model as smolvlm_model
    from pixano_edge.engine.models.smolvlm.preprocess import Tiles, cut

    def swapped(*args: Any, **options: Any) -> Tiles:
        tiles = cut(*args, **options)
        first, second, *rest = tiles.squares
        return Tiles(tiles.rows, tiles.columns, (second, first, *rest))

    monkeypatch.setattr(smolvlm_model, "cut", swapped)
    assert worst(model, *expected) > 10 * BAR


def test_other_filter_shows(model: SmolVlmModel, expected: Any) -> None:
    model._resample = 2  # bilinear
    assert worst(model, *expected) > BAR
