"""Questions, batches and the training path of the demo's language model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import SmolVLMForConditionalGeneration

from pixano_edge.export.demo.questions import TYPES, ask, caption, place_phrase
from pixano_edge.export.demo.smolvlm_model import (
    GRID,
    IMAGE_TOKENS,
    WhatIsHere,
    attention_mask,
    initialise,
    normalise,
    tiny_config,
)
from pixano_edge.export.demo.train_smolvlm import TorchTalker, build_optimizers, step_loss, token_ids
from pixano_edge.export.demo.vlm_words import build_tokenizer
from pixano_edge.export.demo.vqa_batches import Writer, make_batch, make_block, sequence
from pixano_edge.export.demo.vqa_eval import cases, judge
from pixano_edge.export.demo.vqa_scenes import COLOR_NAMES, PLACES, SHAPES, SIZE, talk_scene


@pytest.fixture(scope="module")
def model() -> SmolVLMForConditionalGeneration:
    torch.manual_seed(0)
    found = SmolVLMForConditionalGeneration(tiny_config(token_ids(build_tokenizer()), vision=40, text=48))
    found.set_attn_implementation("eager")
    initialise(found)
    return found


def test_scenes_are_pure_and_their_splits_differ() -> None:
    a, b, other = talk_scene(3, "train"), talk_scene(3, "train"), talk_scene(3, "heldout")
    assert np.array_equal(a.image, b.image)
    assert a.things == b.things
    assert not np.array_equal(a.image, other.image)
    assert [t.place for t in a.things] == sorted({t.place for t in a.things})


def test_things_lie_where_they_are_said_to_be() -> None:
    for seed in range(20):
        scene = talk_scene(seed, "heldout")
        for index, thing in enumerate(scene.things):
            y, x = np.argwhere(scene.owner == index).mean(0)
            assert (int(3 * y // SIZE), int(3 * x // SIZE)) == divmod(thing.place, 3)


def test_answers_are_true() -> None:
    rng = np.random.default_rng(0)
    for seed in range(60):
        scene = talk_scene(seed, "train")
        for kind in TYPES:
            found = ask(scene, kind, rng)
            if found is None:
                continue
            words = found.text.rstrip("?.").split()
            color = next((w for w in words if w in COLOR_NAMES), None)
            shape = next((s for s in SHAPES for w in words if w in (s, f"{s}s", f"{s}es")), None)
            fitting = [t for t in scene.things if color in (None, t.color) and shape in (None, t.shape)]
            if kind == "color":
                assert {t.color for t in fitting} == {found.answer}
            elif kind == "count":
                assert str(len(fitting)) == found.answer
            elif kind == "exists":
                assert found.answer == ("yes" if fitting else "no")
            elif kind == "where":
                assert [PLACES[t.place] for t in fitting] == [found.answer]
            else:
                at = [t for t in scene.things if found.text.rstrip("?").endswith(place_phrase(t.place))]
                said = at or fitting
                assert found.answer in {t.shape for t in said}


def test_caption_reads_in_order() -> None:
    scene = talk_scene(2, "train")
    assert caption(scene.things).startswith("A")
    spots = [caption(scene.things).find(place_phrase(t.place)) for t in scene.things]
    assert spots == sorted(spots)
    assert min(spots) > 0


def test_every_word_of_the_questions_is_one_token() -> None:
    tokenizer, rng = build_tokenizer(), np.random.default_rng(1)
    for seed in range(30):
        scene = talk_scene(seed, "train")
        for kind in (*TYPES, "caption"):
            found = ask(scene, kind, rng)
            if found is not None:
                text = f" {found.answer}"
                words = text.replace(",", " ,").replace(".", " .").split()
                assert len(tokenizer.tokenize(text)) == len(words), text
    assert tokenizer.decode(tokenizer.encode("Ünïcode ☃ 😀")) == "Ünïcode ☃ 😀"


def test_questions_do_not_see_each_other(model: SmolVLMForConditionalGeneration) -> None:
    """The packed sequence gives each question the answer's scores that it has alone, in the stock model's forward."""
    scene, rng = talk_scene(5, "train"), np.random.default_rng(3)
    found = [q for kind in TYPES if (q := ask(scene, kind, rng)) is not None]
    rows = torch.tensor(sequence(found))
    pixels = normalise(torch.from_numpy(scene.image)[None])
    core = model.model
    with torch.no_grad():
        picture = core.connector(core.vision_model(pixel_values=pixels).last_hidden_state)
        assert picture.shape[1] == IMAGE_TOKENS
        words = model.get_input_embeddings()(rows[None, :, 0])
        words = words.masked_scatter((rows[None, :, 0] == model.config.image_token_id)[..., None], picture)
        mask = attention_mask(rows[None, :, 2])
        packed = core.text_model(inputs_embeds=words, attention_mask=mask, position_ids=rows[None, :, 1])
        for number in range(1, len(found) + 1):
            mine = (rows[:, 2] == 0) | (rows[:, 2] == number)
            alone = model(input_ids=rows[None, mine, 0], pixel_values=pixels[None]).logits[0]
            together = model.lm_head(packed.last_hidden_state[0, mine])
            assert torch.allclose(together, alone, atol=2e-4)
        seen = attention_mask(rows[None, :, 2].clamp(max=1))  # all questions as one: they would see each other
        leaky = core.text_model(inputs_embeds=words, attention_mask=seen, position_ids=rows[None, :, 1])
        assert not torch.allclose(leaky.last_hidden_state[0, -1], packed.last_hidden_state[0, -1], atol=2e-4)


def test_batches_are_reproducible_and_labelled() -> None:
    first, again = make_block(4, 1, 2)[3], make_block(4, 1, 2)[3]
    for a, b in zip(vars(first).values(), vars(again).values(), strict=True):
        assert np.array_equal(a, b)
    assert first.shape.shape == (2, GRID, GRID)
    assert (first.shape < len(SHAPES)).any()
    assert ((first.shape == len(SHAPES)) == (first.color == len(COLOR_NAMES))).all()
    assert first.answer[first.group == 0].sum() == 0


def test_a_few_steps_learn(model: SmolVLMForConditionalGeneration) -> None:
    here = WhatIsHere(40)
    optimizers = build_optimizers(model, here, 1e-3, 2e-3)
    batch = make_batch([talk_scene(k, "train") for k in range(4)], np.random.default_rng(0))
    values = []
    for _ in range(8):
        losses = step_loss(model, here, batch)
        (losses.words + losses.here).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        values.append(float(losses.words.detach()))
    assert values[-1] < 0.8 * values[0]


def test_talker_continues_the_prompt_of_training(model: SmolVLMForConditionalGeneration) -> None:
    tokenizer = build_tokenizer()
    said = TorchTalker(model, tokenizer)(talk_scene(1, "heldout").image, "Where is the star?", most=3)
    assert isinstance(said, str)
    assert Writer().head[0] == tokenizer.bos_token_id


def test_the_majority_is_a_weak_guess() -> None:
    asked = cases(500)
    rows = judge([case.question.answer for case in asked], asked)
    assert [row.kind for row in rows] == [*TYPES, "all"]
    assert rows[-1].exact == 1
    assert rows[-1].majority < 0.5
    wrong = judge([""] * len(asked), asked)
    assert wrong[-1].exact == 0
