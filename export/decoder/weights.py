"""The weights of a decoder as its graphs hold them: products packed, matrices ready to be multiplied from the right."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.engine.errors import ExportError
from pixano_edge.export.half_weights import exact_half

Matrix = npt.NDArray[np.float32]


@dataclass
class Linear:
    """A product: ``x @ weight + bias``; `weight` is (in, out)."""

    weight: Matrix
    bias: Matrix | None


@dataclass
class Layer:
    """One decoder layer.

    Attributes:
        input_norm: (hidden,) scale of the RMS norm before attention.
        qkv: Queries, keys and values side by side; one product instead of three.
        out: Attention's output.
        post_norm: (hidden,) scale of the RMS norm before the MLP.
        gate_up: The MLP's gate and up projections side by side.
        down: The MLP's last projection.
    """

    input_norm: Matrix
    qkv: Linear
    out: Linear
    post_norm: Matrix
    gate_up: Linear
    down: Linear


class DecoderWeights:
    """Reads the modules of one of transformers' decoders (Llama, Qwen2 and what has their submodules) on demand.

    Args:
        model: Has `layers`, `norm`, `embed_tokens` and `rotary_emb`; float32, on the CPU.
        head: The linear layer that makes logits.
        constants: Of the contract.
        mrope_section: Channels of half a head per axis of the positions; empty without M-RoPE.

    Attributes:
        epsilon: Of every RMS norm.
        mrope_section: As given.
        tied: Whether embedding and head are one matrix.

    Raises:
        ExportError: A module is not what the graphs compute.
    """

    def __init__(
        self, model: Any, head: nn.Linear, constants: DecoderConstants, mrope_section: tuple[int, ...] = ()
    ) -> None:
        self.constants = constants
        self.mrope_section = mrope_section
        self._model, self._head = model, head
        self.epsilon = float(model.norm.variance_epsilon)
        self.tied = head.weight.data_ptr() == model.embed_tokens.weight.data_ptr() or torch.equal(
            head.weight, model.embed_tokens.weight
        )
        self._check()

    def _check(self) -> None:
        c, config = self.constants, self._model.config
        wrong = []
        if config.hidden_act != "silu":
            wrong.append(f"activation '{config.hidden_act}'")
        if self._head.bias is not None:
            wrong.append("a bias of lm_head")
        if any(layer.self_attn.scaling != c.head_dim**-0.5 for layer in self._model.layers):
            wrong.append("another scale of attention")
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            wrong.append("a sliding window")
        kind = self._model.rotary_emb.rope_type
        if kind not in ("default", "linear", "llama3", "yarn"):
            wrong.append(f"rotary embedding '{kind}'")  # the others change with the length of the text
        if self.mrope_section and sum(self.mrope_section) != c.head_dim // 2:
            wrong.append(f"mrope_section {list(self.mrope_section)} of heads with {c.head_dim} channels")
        if wrong:
            raise ExportError(
                f"The language model has {', '.join(wrong)}, which the decoder's graph does not compute.",
                "Only the published architecture is exported.",
            )

    @functools.cached_property
    def fit_half(self) -> bool:
        """Whether fp16 holds every matrix exactly, as where a checkpoint was rounded to it."""
        tables = (matrix for matrix in (self.embedding, self.head))
        layers = (part.weight for x in self.layers() for part in (x.qkv, x.out, x.gate_up, x.down))
        return all(exact_half(matrix) is not None for matrix in itertools.chain(tables, layers))

    @property
    def embedding(self) -> Matrix:
        """(vocabulary, hidden)."""
        return _array(self._model.embed_tokens.weight)

    @property
    def head(self) -> Matrix:
        """(vocabulary, hidden)."""
        return _array(self._head.weight)

    @property
    def final_norm(self) -> Matrix:
        """(hidden,)."""
        return _array(self._model.norm.weight)

    def layers(self) -> Iterator[Layer]:
        """Layer by layer, each made when it is asked for: a large model need not be in memory twice."""
        for layer in self._model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            yield Layer(
                input_norm=_array(layer.input_layernorm.weight),
                qkv=_packed(attention.q_proj, attention.k_proj, attention.v_proj),
                out=_packed(attention.o_proj),
                post_norm=_array(layer.post_attention_layernorm.weight),
                gate_up=_packed(mlp.gate_proj, mlp.up_proj),
                down=_packed(mlp.down_proj),
            )

    def rotary_tables(self) -> tuple[Matrix, Matrix]:
        """Cosines and sines, each (max_length, head_dim / 2), with transformers' own arithmetic."""
        rotary = self._model.rotary_emb
        with torch.no_grad():
            positions = torch.arange(self.constants.max_length, dtype=torch.float32)
            angles = positions[:, None] * rotary.inv_freq.float()[None]
            cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
        return _array(cos), _array(sin)


def _array(tensor: Tensor) -> Matrix:
    return tensor.detach().to(torch.float32).contiguous().numpy()


def _packed(*parts: nn.Linear) -> Linear:
    weight = np.ascontiguousarray(np.concatenate([_array(p.weight) for p in parts]).T)
    biases = [p.bias for p in parts if p.bias is not None]
    if not biases:
        return Linear(weight, None)
    filled = [np.zeros(p.out_features, np.float32) if p.bias is None else _array(p.bias) for p in parts]
    return Linear(weight, np.concatenate(filled))
