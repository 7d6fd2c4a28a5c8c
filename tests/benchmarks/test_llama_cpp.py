"""llama.cpp as a contender: the weights that it is given are those of transformers, and its answers are read right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp", reason="needs pixano-edge[llama-cpp]")
pytest.importorskip("gguf", reason="needs pixano-edge[llama-cpp]")
torch = pytest.importorskip("torch", reason="needs pixano-edge[export]")

from pixano_edge.benchmarks import llama_cpp  # noqa: E402
from pixano_edge.engine.errors import EdgeError  # noqa: E402

PROMPT, TOKENS = list(range(5, 45)), 12


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=352, max_position_embeddings=512, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=2.5 / parameter.shape[1] ** 0.5)
        made.model.embed_tokens.weight.normal_()
    return made


def answer(file: Path) -> Any:
    llama = llama_cpp.LlamaCppAnswers(file, TOKENS, 1, 128, exact=True)
    try:
        return llama.text(PROMPT)
    finally:
        llama.close()


def test_greedy_tokens_are_those_of_transformers(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp.write_llama(tmp_path / "right.gguf", model.model, None, "fp32")
    with torch.no_grad():
        made = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
    want = tuple(made[0, len(PROMPT) :].tolist())
    assert len(set(want)) > 6
    found = answer(tmp_path / "right.gguf")
    assert found.tokens == want
    assert (found.count, found.prompt) == (TOKENS, len(PROMPT))
    assert found.first > 0
    assert found.rest > 0
    monkeypatch.setattr(llama_cpp, "paired", lambda weight, heads: weight)
    llama_cpp.write_llama(tmp_path / "wrong.gguf", model.model, None, "fp32")
    assert answer(tmp_path / "wrong.gguf").tokens != want


def test_matrices_of_q4_0_take_four_and_a_half_bits(model: Any, tmp_path: Path) -> None:
    for kind in llama_cpp.KINDS:
        llama_cpp.write_llama(tmp_path / kind, model.model, None, kind)
    counts = [p.numel() for p in model.model.parameters() if p.dim() > 1]
    vectors = sum(4 * p.numel() for p in model.model.parameters() if p.dim() == 1)
    assert llama_cpp.weight_bytes(tmp_path / "fp32") == 4 * sum(counts) + vectors
    assert llama_cpp.weight_bytes(tmp_path / "q4_0") == sum(counts) * 18 // 32 + vectors


def test_what_is_no_completion_is_an_error() -> None:
    with pytest.raises(EdgeError, match="too long"):
        llama_cpp.read_answer({"error": {"message": "too long"}}, 3)


def test_without_a_checkpoint_it_is_left_out() -> None:
    with pytest.raises(EdgeError, match="checkpoint"):
        llama_cpp.open_llama_cpp(None, "fp32", 8, 1, 10)


def test_a_contender_that_ends_says_why() -> None:
    from pixano_edge.benchmarks.describe_contenders import Child

    child = Child("llama.cpp", [sys.executable, "-c", "raise RuntimeError('no such model')"])
    with pytest.raises(EdgeError, match="ended without an answer: RuntimeError: no such model"):
        child.reply()
    child.close()
