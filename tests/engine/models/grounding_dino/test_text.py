"""Captions against transformers' processor and mask function, and what it leaves open."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the reference is transformers")

import torch
from transformers.models.grounding_dino.modeling_grounding_dino import (
    SPECIAL_TOKENS,
    generate_masks_with_special_tokens_and_transfer_map,
)

from pixano_edge.engine.contracts.grounding_dino import GroundingDinoConstants
from pixano_edge.engine.errors import BundleError, PromptError
from pixano_edge.engine.models.grounding_dino.text import Caption, Captioner, phrase_masks
from tests.support.grounding_dino import small_processor, tokenizer_json

CONSTANTS = GroundingDinoConstants()


@pytest.fixture(scope="module")
def processor() -> object:
    return small_processor()


@pytest.fixture(scope="module")
def captioner(processor: object) -> Captioner:
    return Captioner(tokenizer_json(processor), CONSTANTS)


def spans(caption: Caption) -> list[tuple[int, ...]]:
    """Ids of each phrase."""
    return [caption.ids[a:b] for a, b in caption.edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    "classes",
    [
        ["a cat", "a remote control"],
        ["remote", "remote control", "controller"],
        ["  A Striped SQUARE ", "Bed"],
        ["猫", "кошка", "Émilie's cup"],
        ["red-green (lamp)", "cup, plate!"],
        ["zzqx 2024"],
        ["\U0001f408 cat"],
    ],
)
def test_ids_are_those_of_the_processor(captioner: Captioner, processor: object, classes: list[str]) -> None:
    (caption,) = captioner.captions(classes)
    text = processor._preprocess_input_text(classes)  # type: ignore[attr-defined]
    expected = processor.tokenizer(text)  # type: ignore[attr-defined]
    assert list(caption.ids) == expected["input_ids"]
    assert not any(expected["token_type_ids"]), "the text encoder takes segment 0 for granted"
    assert spans(caption) == [captioner.phrase(name) for name in classes]


def test_masks_are_those_of_the_model() -> None:
    rng = np.random.default_rng(0)
    cases = [[101, 102], [101, 5, 1012, 102], [5, 6, 7], [1012], [101, 1012, 1012, 5, 102], [5, 1029, 6, 1012, 7]]
    for _ in range(300):
        length = int(rng.integers(1, 40))
        cases.append([int(i) for i in rng.choice([101, 102, 1012, 1029, 5, 6, 7, 8, 9, 10], length)])
    for ids in cases:
        mask, positions = phrase_masks(ids, SPECIAL_TOKENS)
        expected_mask, expected_positions = generate_masks_with_special_tokens_and_transfer_map(
            torch.tensor([ids]), torch.tensor(SPECIAL_TOKENS)
        )
        np.testing.assert_array_equal(mask, expected_mask[0].numpy(), err_msg=str(ids))
        np.testing.assert_array_equal(positions, expected_positions[0].numpy(), err_msg=str(ids))


def test_tensors_fit_the_contract(captioner: Captioner) -> None:
    (caption,) = captioner.captions(["cat", "dog"])
    count = len(caption)
    assert caption.input_ids.shape == caption.position_ids.shape == (1, count)
    assert caption.mask.shape == (1, count, count)
    assert (caption.input_ids.dtype, caption.position_ids.dtype) == (np.int32, np.int32)
    assert caption.mask.dtype == np.float32


@pytest.mark.parametrize("name", ["st. bernard", "st.bernard", "St? Bernard.", "st . bernard ?"])
def test_dots_do_not_split_a_name(captioner: Captioner, name: str) -> None:
    (caption,) = captioner.captions([name, "cat"])
    assert spans(caption) == [captioner.phrase("st bernard"), captioner.phrase("cat")]
    assert caption.ids.count(CONSTANTS.dot_token) == 2


def test_special_tokens_in_a_name_are_text(captioner: Captioner) -> None:
    (caption,) = captioner.captions(["[SEP]", "[CLS] cat", "[PAD]"])
    assert caption.ids.count(CONSTANTS.end_token) == caption.ids.count(CONSTANTS.start_token) == 1
    assert 0 not in caption.ids


def test_equal_names_are_asked_for_once(captioner: Captioner) -> None:
    (caption,) = captioner.captions(["cat", "Dog", "CAT ", "cat.", "dog"])
    assert caption.labels.tolist() == [0, 1]


def test_long_lists_are_split_in_order(captioner: Captioner) -> None:
    classes = [f"cat {i}" for i in range(300)]
    captions = captioner.captions(classes)
    assert len(captions) > 1
    assert all(len(c) <= CONSTANTS.max_text_len for c in captions)
    assert [label for c in captions for label in c.labels] == list(range(300))
    # Filled up: the next phrase would not have fitted.
    for caption, after in pairwise(captions):
        assert len(caption) + len(spans(after)[0]) + 1 > CONSTANTS.max_text_len
    assert [s for c in captions for s in spans(c)] == [captioner.phrase(name) for name in classes]


def test_a_caption_may_be_exactly_full(captioner: Captioner) -> None:
    longest = "cat " * (CONSTANTS.max_text_len - 3)
    (caption,) = captioner.captions([longest])
    assert len(caption) == CONSTANTS.max_text_len
    with pytest.raises(PromptError, match="254 tokens; 253 fit"):
        captioner.captions(["dog", longest + "cat"])


@pytest.mark.parametrize("name", ["", " ", "...", "?", "\u200b"])
def test_a_name_without_a_word_is_refused(captioner: Captioner, name: str) -> None:
    with pytest.raises(PromptError, match=r"Class 1 .* has no word"):
        captioner.captions(["cat", name])


@pytest.mark.parametrize("name", ["\U0001f408", "\U0001f408 \U0001f415"])
def test_a_name_of_unknown_words_is_refused(captioner: Captioner, name: str) -> None:
    with pytest.raises(PromptError, match="no word of class 1"):
        captioner.captions(["cat", name])


def test_another_tokenizer_is_refused(processor: object) -> None:
    with pytest.raises(BundleError, match=r"ids for \[CLS\]"):
        Captioner(tokenizer_json(processor), GroundingDinoConstants(start_token=7))
    with pytest.raises(BundleError, match="cannot be read"):
        Captioner("{}", CONSTANTS)
