"""llama.cpp next to the engine in `bench describe`: a checkpoint's language model as GGUF, run by xllamacpp's wheel.

The file is written here with the `gguf` package, since llama.cpp's own converter is no part of any wheel: a Llama in
fp32, or with every matrix in Q4_0 (blocks of 32 with one scale, what llama.cpp calls a pure Q4_0), which is the nearest
to the engine's int4. llama.cpp turns neighbouring pairs of a head where transformers turns halves, so the rows of
queries and keys are put in that order, as its converter does. Asked and answered in token ids.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixano_edge.engine.errors import EdgeError

from .describe_contenders import Answered, Child

KINDS = {"fp32": "fp32", "q4_0": "int4"}
"""Ways to write the weights, and the engine's precision that each stands next to."""

CHILD = """
import json, sys
import xllamacpp as llama
file, threads, context, keys = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
params = llama.CommonParams()
params.model.path = file
params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.cache_type_k = params.cache_type_v = getattr(llama.ggml_type, keys)
params.verbosity, params.ui, params.fit_params, params.warmup = -1, False, False, True
server = llama.Server(params)
print(json.dumps({"version": llama.__version__}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    found = server.handle_completions({
        "prompt": asked["ids"], "max_tokens": asked["tokens"], "temperature": 0, "top_k": 1, "ignore_eos": True,
        "cache_prompt": False,
    })
    print(json.dumps(found), flush=True)
"""


def open_llama_cpp(checkpoint: Path | None, kind: str, tokens: int, threads: int, prompt: int) -> LlamaCppAnswers:
    """llama.cpp with a checkpoint's language model, written beside the checkpoint where that was not done before.

    Args:
        checkpoint: Folder in transformers' format.
        kind: One of `KINDS`.
        tokens: Of each answer.
        threads: CPU threads.
        prompt: Tokens of the longest prompt.

    Raises:
        EdgeError: There is no checkpoint, a module is missing, or the model is not one that can be written.
    """
    for name in ("gguf", "xllamacpp"):
        if importlib.util.find_spec(name) is None:
            raise EdgeError(f"{name} is not installed", "Install it with: pip install 'pixano-edge[llama-cpp]'")
    if checkpoint is None:
        raise EdgeError("without --checkpoint there is nothing to write", "Name the bundle's checkpoint.")
    file = build_gguf(checkpoint, checkpoint.with_name(f"{checkpoint.name}.{kind}.gguf"), kind)
    return LlamaCppAnswers(file, tokens, threads, prompt + tokens + 8, exact=kind == "fp32")


def build_gguf(checkpoint: Path, file: Path, kind: str) -> Path:
    """The language model of a SmolVLM checkpoint for llama.cpp; kept where it already is.

    Args:
        checkpoint: Folder in transformers' format.
        file: To write.
        kind: One of `KINDS`.

    Raises:
        EdgeError: Its language model is not a plain Llama.
    """
    if file.is_file():
        return file
    from pixano_edge.export.smolvlm.checkpoint import load

    loaded = load(checkpoint)
    text = loaded.model.model.text_model
    if text.config.model_type != "llama":
        raise EdgeError(f"A {text.config.model_type} is not written as GGUF here.", "Leave llama.cpp out.")
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    write_llama(part, text, None if text.config.tie_word_embeddings else loaded.model.lm_head.weight, kind)
    part.replace(file)
    return file


def write_llama(file: Path, text: Any, head: Any | None, kind: str) -> None:
    """Writes a ``LlamaModel`` of transformers as GGUF, each token named by its id.

    Args:
        file: To write.
        text: The model without its head.
        head: (vocabulary, width), or None where it is the embedding.
        kind: One of `KINDS`; vectors stay fp32.
    """
    import gguf

    config = text.config
    rows, width = text.embed_tokens.weight.shape
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = width // heads
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(rows)
    # It is asked in ids and answers in text, from which `read_answer` reads them.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{number}" for number in range(rows)])
    writer.add_token_types([gguf.TokenType.NORMAL] * rows)
    writer.add_token_merges(["a b"])  # there has to be one

    def add(name: str, weight: Any) -> None:
        values = weight.detach().float().numpy()
        if kind == "q4_0" and values.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))

    add("token_embd.weight", text.embed_tokens.weight)
    add("output_norm.weight", text.norm.weight)
    if head is not None:
        add("output.weight", head)
    for index, layer in enumerate(text.layers):
        attention, mlp = layer.self_attn, layer.mlp
        add(f"blk.{index}.attn_norm.weight", layer.input_layernorm.weight)
        add(f"blk.{index}.attn_q.weight", paired(attention.q_proj.weight, heads))
        add(f"blk.{index}.attn_k.weight", paired(attention.k_proj.weight, groups))
        add(f"blk.{index}.attn_v.weight", attention.v_proj.weight)
        add(f"blk.{index}.attn_output.weight", attention.o_proj.weight)
        add(f"blk.{index}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        add(f"blk.{index}.ffn_gate.weight", mlp.gate_proj.weight)
        add(f"blk.{index}.ffn_up.weight", mlp.up_proj.weight)
        add(f"blk.{index}.ffn_down.weight", mlp.down_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def paired(weight: Any, heads: int) -> Any:
    """Rows of queries or keys (heads size, width) with the two halves of each head interleaved."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def read_answer(found: dict[str, Any], prompt: int) -> Answered:
    """The times and the tokens of a completion.

    Raises:
        EdgeError: It is no completion.
    """
    if "choices" not in found:
        raise EdgeError(f"llama.cpp answered: {json.dumps(found)[:200]}", "Run the benchmark without it.")
    made = tuple(int(number) for number in found["choices"][0]["text"].split("t")[1:])
    times = found["timings"]
    return Answered(times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3, len(made), prompt, made)


def weight_bytes(file: Path) -> int:
    """Bytes of a file's tensors: what one token reads."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(str(file)).tensors)


class LlamaCppAnswers:
    """llama.cpp with the language model alone, in a process of its own.

    Args:
        file: Made by `build_gguf`.
        tokens: Of each answer.
        threads: CPU threads.
        context: Tokens of prompt and answer at most.
        exact: Keys and values in fp32 instead of llama.cpp's usual fp16.
    """

    def __init__(self, file: Path, tokens: int, threads: int, context: int, exact: bool) -> None:
        self._tokens = tokens
        self.weight_bytes = weight_bytes(file)
        keys = "GGML_TYPE_F32" if exact else "GGML_TYPE_F16"
        command = [sys.executable, "-c", CHILD, str(file), str(threads), str(context), keys]
        self._child = Child("llama.cpp", command)
        self.close = self._child.close
        self.version = str(self._child.reply()["version"])

    def text(self, ids: Sequence[int]) -> Answered:
        """The answer to these tokens; times are llama.cpp's own, which leave out its server."""
        return read_answer(self._child.ask({"ids": list(ids), "tokens": self._tokens}), len(ids))
