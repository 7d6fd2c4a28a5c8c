"""Class names to ids, against transformers' own tokeniser, and names that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts.owlv2 import OwlConstants
from pixano_edge.engine.errors import BundleError, PromptError
from pixano_edge.engine.models.owlv2.text import Tokenizer

NAMES = [
    "cat", "Remote Control", "  spaces   between ", "a saucer on a table", "café", "naïve ÉLAN", "дом", "猫", "🐈",
    "it's", "x1-y2", "a\tb\nc", "remote, control!",
]  # fmt: skip


@pytest.fixture(scope="module")
def stock() -> Any:
    pytest.importorskip("transformers", reason="the reference")
    from tests.support.tiny_owl import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="module")
def tokenizer(stock: Any) -> Tokenizer:
    return Tokenizer(stock.backend_tokenizer.to_str(), OwlConstants(end_token=stock.eos_token_id))


def test_as_transformers(stock: Any, tokenizer: Tokenizer) -> None:
    wanted = stock(NAMES, padding="max_length", max_length=16, return_tensors="np")["input_ids"]
    found = tokenizer.encode(NAMES)
    assert found.dtype == np.int32
    assert np.array_equal(found, wanted)


def test_upper_case_is_the_same_class(tokenizer: Tokenizer) -> None:
    assert np.array_equal(*tokenizer.encode(["CAT", "cat"]))


@pytest.mark.parametrize("name", ["a " * 15, "猫" * 10, "supercalifragilisticexpialidocious"])
def test_too_long_is_an_error_not_a_cut(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(PromptError, match="tokens, more than 14"):
        tokenizer.encode(["cat", name])


def test_the_longest_that_fits(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["a " * 14])[0]
    assert ids[-1] == tokenizer._constants.end_token


@pytest.mark.parametrize("name", ["", " ", "\t"])
def test_a_name_without_a_word_is_an_error(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(PromptError, match="no word"):
        tokenizer.encode([name])


def test_another_tokenizer_is_refused(stock: Any) -> None:
    text = stock.backend_tokenizer.to_str()
    with pytest.raises(BundleError, match="does not end a text with token 5"):
        Tokenizer(text, OwlConstants(end_token=5))
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer(text[:100], OwlConstants())
