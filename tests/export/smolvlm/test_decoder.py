"""The decoder's graphs against transformers, and deliberate mistakes that must show."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.errors import ExportError
from pixano_edge.export.decoder.graph import Bits, build_decoder, build_embedding
from pixano_edge.export.decoder.quantise import quantise
from pixano_edge.export.decoder.run import DecoderRun
from pixano_edge.export.decoder.store import ALIGNMENT, WeightStore
from pixano_edge.export.decoder.weights import DecoderWeights
from pixano_edge.export.onnx_graph import check_contract
from pixano_edge.export.operators import check_tensorrt_10_3
from pixano_edge.export.smolvlm.checkpoint import SmolVlmCheckpoint
from pixano_edge.export.smolvlm.family import SmolVlmFamily
from pixano_edge.export.vlm.family import Answer
from tests.support import vlm

BAR = 1e-4


def write(folder: Path, weights: DecoderWeights, precision: str, target: str, bits: Bits | None = None) -> Path:
    name = f"{precision}.{target}"
    with WeightStore(folder / f"{name}.weights") as store:
        model = build_decoder(weights, store, precision, target, bits)
    store.seal(model)
    onnx.save(model, folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


@pytest.fixture(scope="module")
def weights(loaded_smolvlm: SmolVlmCheckpoint) -> DecoderWeights:
    return SmolVlmFamily(loaded_smolvlm).weights


@pytest.fixture(scope="module", params=[contract.ONNX, contract.TENSORRT])
def run(
    request: pytest.FixtureRequest, weights: DecoderWeights, tmp_path_factory: pytest.TempPathFactory
) -> DecoderRun:
    file = write(tmp_path_factory.mktemp("decoder"), weights, "fp32", request.param)
    return DecoderRun(file, weights.constants, request.param, threads=1)


def error(got: np.ndarray, answer: Answer) -> float:
    return float(np.abs(got - answer.logits[-len(got) :]).max() / np.abs(answer.logits).max())


def test_every_step_of_a_greedy_answer(run: DecoderRun, smolvlm_answer: Answer) -> None:
    got = run.logits(smolvlm_answer.parts(), slots=200)
    assert error(got, smolvlm_answer) < BAR
    assert (got.argmax(axis=1) == smolvlm_answer.tokens).all()
    assert len(set(smolvlm_answer.tokens.tolist())) > 8  # an answer of one token would prove little


@pytest.mark.parametrize("cuts", [(1,), (30,), (1, 2, 33, 66)])
def test_a_prompt_in_parts(run: DecoderRun, smolvlm_answer: Answer, cuts: tuple[int, ...]) -> None:
    """A prefix that is in the cache already, and tokens after it."""
    prompt = smolvlm_answer.embeds
    parts = [np.ascontiguousarray(p) for p in np.split(prompt, cuts, axis=1)] + smolvlm_answer.parts()[1:]
    got = run.logits(parts)[len(cuts) :]
    assert error(got, smolvlm_answer) < BAR


def test_wrong_positions_show(run: DecoderRun, smolvlm_answer: Answer) -> None:
    """Two tokens of padding in front move every position; rotary embedding sees differences alone, so one slot between
    prompt and answer does it."""
    parts = smolvlm_answer.parts()
    skipped = [parts[0], np.zeros_like(parts[1]), *parts[1:]]
    got = np.delete(run.logits(skipped), 1, axis=0)
    assert error(got[1:], smolvlm_answer) > 100 * BAR


def test_a_stale_cache_shows(weights: DecoderWeights, smolvlm_answer: Answer, tmp_path: Path) -> None:
    """Twenty slots of another prompt, taken over as if they were this one's."""
    run = DecoderRun(write(tmp_path, weights, "fp32", contract.ONNX), weights.constants, threads=1)
    parts = smolvlm_answer.parts()
    other = parts[0][:, ::-1]
    got = run.logits([np.ascontiguousarray(other[:, :20]), np.ascontiguousarray(parts[0][:, 20:]), *parts[1:]])[1:]
    assert error(got, smolvlm_answer) > 100 * BAR


def test_swapped_tiles_show(run: DecoderRun, smolvlm_answer: Answer, loaded_smolvlm: SmolVlmCheckpoint) -> None:
    c = loaded_smolvlm.constants
    places = np.flatnonzero(smolvlm_answer.input_ids == c.image_token_id)
    rows = places.reshape(-1, c.image_seq_len)
    swapped = smolvlm_answer.embeds.copy()
    swapped[0, rows[0]], swapped[0, rows[1]] = smolvlm_answer.embeds[0, rows[1]], smolvlm_answer.embeds[0, rows[0]]
    got = run.logits([swapped, *smolvlm_answer.parts()[1:]])
    assert error(got, smolvlm_answer) > 100 * BAR


@pytest.mark.parametrize("target", [contract.ONNX, contract.TENSORRT])
def test_fp16(weights: DecoderWeights, smolvlm_answer: Answer, tmp_path: Path, target: str) -> None:
    file = write(tmp_path, weights, "fp16", target)
    check_contract(onnx.load(file), contract.decoder(weights.constants, "float16", target))
    got = DecoderRun(file, weights.constants, target, threads=1).logits(smolvlm_answer.parts())
    assert error(got, smolvlm_answer) < 3e-2


def test_plain_operators_alone_for_tensorrt(weights: DecoderWeights, tmp_path: Path) -> None:
    for precision in ("fp32", "fp16"):
        file = write(tmp_path, weights, precision, contract.TENSORRT)
        onnx.checker.check_model(str(file), full_check=True)
        assert check_tensorrt_10_3(onnx.load(file, load_external_data=False)) == []
    assert check_tensorrt_10_3(onnx.load(write(tmp_path, weights, "fp32", contract.ONNX), load_external_data=False))


def test_weights_are_stored_once(weights: DecoderWeights, tmp_path: Path) -> None:
    """Both targets, embedding and tied head: one copy of each matrix, on pages of its own."""
    with WeightStore(tmp_path / "one.weights") as store:
        first = build_decoder(weights, store)
        size = store.path.stat().st_size
        others = [build_decoder(weights, store, target=contract.TENSORRT), build_embedding(weights, store)]
    store.seal(first, *others)
    parameters = sum(p.size for p in (weights.embedding, *(m for m in matrices(weights))))
    assert weights.tied
    assert 4 * parameters <= store.path.stat().st_size < 4 * parameters + 200_000  # tables, and ends of pages
    assert store.path.stat().st_size - size < 3 * ALIGNMENT  # what the second graph has of its own
    table = {t.name: {e.key: e.value for e in t.external_data} for g in (first, *others) for t in g.graph.initializer}
    assert table["embed_tokens.weight"] == table["lm_head.weight"]
    assert all(int(e["offset"]) % ALIGNMENT == 0 for e in table.values() if e)
    assert len({p.value for g in (first, *others) for p in g.metadata_props if p.key.endswith("sha256")}) == 1


def test_weights_that_fp16_holds_are_stored_in_it(
    weights: DecoderWeights, loaded_smolvlm: SmolVlmCheckpoint, smolvlm_answer: Answer, tmp_path: Path
) -> None:
    """The same logits bit by bit from half the bytes, in one file with fp16's; one weight more of precision ends it."""
    assert not weights.fit_half
    rounded = copy.copy(loaded_smolvlm)
    rounded.model = copy.deepcopy(loaded_smolvlm.model)
    with torch.no_grad():
        for parameter in rounded.model.parameters():
            parameter.copy_(parameter.half().float())
    narrow, wide = SmolVlmFamily(rounded).weights, SmolVlmFamily(rounded).weights
    assert narrow.fit_half
    wide.__dict__["fit_half"] = False
    for target in (contract.ONNX, contract.TENSORRT):
        got = []
        for kind, name in ((narrow, "narrow"), (wide, "wide")):
            (tmp_path / name).mkdir(exist_ok=True)
            file = write(tmp_path / name, kind, "fp32", target)
            got.append(DecoderRun(file, kind.constants, target, threads=1).logits(smolvlm_answer.parts()))
        assert (got[0] == got[1]).all()
        small, large = ((tmp_path / n / f"fp32.{target}.weights").stat().st_size for n in ("narrow", "wide"))
        assert small < 0.6 * large
    with WeightStore(tmp_path / "both.weights") as store:
        build_decoder(narrow, store, "fp16")
        size = store.path.stat().st_size
        build_decoder(narrow, store, "fp32")
    assert store.path.stat().st_size - size < 200_000  # tables of the angles, which stay fp32
    with torch.no_grad():
        rounded.model.model.text_model.layers[0].mlp.down_proj.weight[0, 0] = 0.1
    assert not SmolVlmFamily(rounded).weights.fit_half


def matrices(weights: DecoderWeights) -> Iterator[np.ndarray]:
    for layer in weights.layers():
        yield from (p.weight for p in (layer.qkv, layer.out, layer.gate_up, layer.down))


def test_an_untied_head_and_biases(tmp_path: Path) -> None:
    """Llama with attention biases and a head of its own, as the family's larger models may have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(**{**vlm.SMALL_TEXT, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False})
    model = LlamaForCausalLM(config).eval()
    vlm.sharpen(model.model, 3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(0, 0.3)
    c = contract.DecoderConstants(2, 4, 2, 16, 64, 352, 512, "default", (2,))
    weights = DecoderWeights(model.model, model.lm_head, c)
    assert not weights.tied
    ids = torch.randint(0, 352, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits[0].numpy()
        embeds = model.model.embed_tokens(ids).numpy()
    for target in (contract.ONNX, contract.TENSORRT):
        run = DecoderRun(write(tmp_path, weights, "fp32", target), c, target, threads=1)
        got = run.logits([embeds[:, :30], *(embeds[:, i : i + 1] for i in range(30, 40))])
        assert np.abs(got - want[29:]).max() / np.abs(want).max() < BAR


@pytest.mark.parametrize(("bits", "bound"), [(4, 1 / 8), (8, 1 / 128)])
@pytest.mark.parametrize("rows", [64, 70])
def test_quantised_weights_are_near(bits: int, bound: float, rows: int) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, 24)).astype(np.float32)
    weight[:32, 3] = 0
    packed = quantise(weight, bits)
    back = packed.dequantised()
    for start in range(0, rows, 32):
        block, near = weight[start : start + 32], back[start : start + 32]
        # Half a step, or one where the far end of the codes is cut.
        assert (np.abs(block - near) <= np.abs(block).max(axis=0) * bound + 1e-6).all()
    assert packed.codes.shape == (24, -(-rows // 32), 4 * bits)
    assert not back[:32, 3].any()


def test_int4_multiplies_what_the_codes_stand_for(
    loaded_smolvlm: SmolVlmCheckpoint, smolvlm_answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's operator, without quantised activations, against transformers with the dequantised matrices."""
    import copy

    from pixano_edge.export.decoder import graph

    monkeypatch.setattr(graph, "ACCURACY_LEVEL", 1)
    weights = SmolVlmFamily(loaded_smolvlm).weights
    file = write(tmp_path, weights, "int4", contract.ONNX)
    model: Any = copy.deepcopy(loaded_smolvlm.model.model.text_model)
    with torch.no_grad():
        for layer in model.layers:
            for part in (*layer.self_attn.children(), *layer.mlp.children()):
                if isinstance(part, torch.nn.Linear):
                    part.weight.copy_(
                        torch.from_numpy(quantise(part.weight.numpy().T.copy(), 4).dequantised().T.copy())
                    )
        hidden = model(inputs_embeds=torch.from_numpy(smolvlm_answer.embeds)).last_hidden_state[:, -1].numpy()
    want = hidden @ quantise(weights.head.T.copy(), 8).dequantised()
    got = DecoderRun(file, weights.constants, threads=1).logits([smolvlm_answer.embeds])
    assert np.abs(got - want).max() / np.abs(want).max() < BAR


def test_what_the_graph_does_not_compute_is_refused(loaded_smolvlm: SmolVlmCheckpoint) -> None:
    text, head = loaded_smolvlm.model.model.text_model, loaded_smolvlm.model.lm_head
    c = loaded_smolvlm.constants.decoder
    for change, restore, word in (("hidden_act", "silu", "activation"),):
        setattr(text.config, change, "gelu")
        try:
            with pytest.raises(ExportError, match=word):
                DecoderWeights(text, head, c)
        finally:
            setattr(text.config, change, restore)
    text.rotary_emb.rope_type = "dynamic"
    try:
        with pytest.raises(ExportError, match="rotary embedding 'dynamic'"):
            DecoderWeights(text, head, c)
    finally:
        text.rotary_emb.rope_type = "default"
