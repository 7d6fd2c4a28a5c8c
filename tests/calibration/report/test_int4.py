"""A language model's decoder in 4 bits, from the bundle's own graph, judged on turns that nothing was fitted to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pixano_edge.calibration import decoder_int4
from pixano_edge.calibration.decoder_int4 import LayerError, products, quantise_decoder, tapped_tensors
from pixano_edge.calibration.grams import Grams, Pair, collect, groups
from pixano_edge.calibration.int4_report import compare_methods
from pixano_edge.calibration.int4_variant import decoder_constants, make_int4
from pixano_edge.calibration.turns import Question, Turn, Turns, record_turns
from pixano_edge.calibration.weight_only import Gram
from pixano_edge.engine.bundle import Bundle, demo_path
from pixano_edge.engine.bundle.writer import BundleWriter
from pixano_edge.engine.contracts import decoder as contract
from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.engine.errors import BundleError, EdgeError
from pixano_edge.export.decoder.graph import build_decoder
from pixano_edge.export.decoder.run import DecoderRun
from pixano_edge.export.decoder.store import WeightStore
from pixano_edge.export.decoder.weights import DecoderWeights
from pixano_edge.export.half_weights import widen
from pixano_edge.export.shared_weights import share_weights
from tests.support import vlm

TEXTS = ("What is on this image?", "How many are there?", "Describe it.")
FITTED = 16
"""Turns that are collected from; those after them are asked in the end."""


def questions(count: int) -> list[Question]:
    return [Question(vlm.picture(40 + 5 * (i % 7), 60 + 3 * (i % 5), i), TEXTS[i % len(TEXTS)]) for i in range(count)]


@dataclass
class Case:
    """An fp32 decoder, what was collected, and turns that were not."""

    file: Path
    constants: DecoderConstants
    grams: Mapping[str, Pair]
    held_out: list[Turn]
    want: list[np.ndarray]

    def quantised(self, folder: Path, method: str, **options: Any) -> tuple[Path, list[LayerError]]:
        grams: Mapping[str, Pair] = options.pop("grams", self.grams)
        with WeightStore(folder / f"{method}.weights") as store:
            model, errors = quantise_decoder(self.file, self.constants, grams, store, method=method, **options)
        store.seal(model)
        onnx.save(model, folder / f"{method}.onnx")
        return folder / f"{method}.onnx", errors

    def logits_error(self, file: Path) -> float:
        """Of every step of the turns that nothing was fitted to, relative to the logits' size."""
        got = logits(file, self.constants, self.held_out)
        wrong = sum(float(((a - b) ** 2).sum()) for a, b in zip(got, self.want))
        return float(np.sqrt(wrong / sum(float((b**2).sum()) for b in self.want)))


def logits(file: Path, constants: DecoderConstants, turns: list[Turn]) -> list[np.ndarray]:
    run = DecoderRun(file, constants, threads=1)
    found = []
    for turn in turns:
        parts = [turn.prompt, *(turn.answer[:, at : at + 1] for at in range(turn.answer.shape[1]))]
        cuts = np.cumsum([part.shape[1] for part in parts])[:-1]
        positions = None if turn.positions is None else np.split(turn.positions, cuts, axis=1)
        found.append(run.logits(parts, positions))
    return found


@pytest.fixture(scope="module")
def turns(tiny_vlm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Turns:
    return record_turns(tiny_vlm_bundle, questions(24), tmp_path_factory.mktemp("turns"), tokens=16, threads=1)


@pytest.fixture(scope="module")
def case(tiny_vlm_bundle: Path, turns: Turns, tmp_path_factory: pytest.TempPathFactory) -> Case:
    bundle = Bundle.open(tiny_vlm_bundle)
    file, constants = bundle.graph_path(contract.DECODER, "fp32"), decoder_constants(bundle)
    tensors = tapped_tensors(file)
    folder = tmp_path_factory.mktemp("grams")
    grams = collect(file, constants, Turns(turns.files[:FITTED]), tensors, folder, threads=1)
    held_out = list(Turns(turns.files[FITTED:]))
    return Case(file, constants, grams, held_out, logits(file, constants, held_out))


def test_turns_are_what_the_engine_answers(tiny_vlm_bundle: Path, turns: Turns) -> None:
    from pixano_edge.engine.models.decoder.base import GenerationOptions
    from pixano_edge.engine.models.decoder.opening import open_vlm
    from pixano_edge.engine.models.text.messages import read_conversation

    asked = questions(1)[0]
    with open_vlm(tiny_vlm_bundle, device="cpu", threads=1) as model:
        found = model.generate(read_conversation(asked.text, [asked.image]), [asked.image], GenerationOptions(16))
        turn = next(iter(turns))
        assert model.tokenizer.decode(turn.tokens.tolist()) == found.text
    assert turn.prompt.shape[1] == found.usage.prompt


def test_rounding_gives_the_exporters_own_graph(case: Case, tiny_vlm_checkpoint: Path, tmp_path: Path) -> None:
    from pixano_edge.export.smolvlm.checkpoint import load
    from pixano_edge.export.smolvlm.family import SmolVlmFamily

    file, errors = case.quantised(tmp_path, "rtn")
    with WeightStore(tmp_path / "exported.weights") as store:
        exported = build_decoder(SmolVlmFamily(load(tiny_vlm_checkpoint)).weights, store, "int4")
    onnx.save(exported, tmp_path / "exported.onnx")
    mine, theirs = onnx.load(str(file)), onnx.load(str(tmp_path / "exported.onnx"))
    assert [n.SerializeToString() for n in mine.graph.node] == [n.SerializeToString() for n in theirs.graph.node]
    kept, wanted = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (mine, theirs))
    assert kept.keys() == wanted.keys()
    assert all(np.array_equal(kept[name], wanted[name]) for name in kept)
    assert all(e.method == "rtn" and e.chosen == e.rtn for e in errors)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_how_the_weights_are_stored_changes_nothing(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packaged decoder's: in full, in half precision in a file beside it, and in another graph's file."""
    monkeypatch.setattr("pixano_edge.calibration.weight_only.EXPONENTS", (0.5,))
    bundle = Bundle.open(demo_path("smolvlm-demo"))
    file, constants = bundle.graph_path(contract.DECODER, "fp32"), decoder_constants(bundle)
    narrowed, full = onnx.load(str(file)), onnx.load(str(file))
    widen(full)
    onnx.save(narrowed, tmp_path / "holder.onnx")
    shared = share_weights(narrowed, tmp_path / "holder.onnx")
    assert shared.holder == "holder.onnx"
    onnx.save(shared.model, tmp_path / "shared.onnx")
    onnx.save(full, tmp_path / "full.onnx")
    random = np.random.default_rng(0)
    grams = {name: random_pair(random, channels) for name, channels in tapped_tensors(file).items()}
    made = []
    for stored in (tmp_path / "full.onnx", file, tmp_path / "shared.onnx"):
        case = Case(stored, constants, grams, [], [])
        assert tapped_tensors(stored) == tapped_tensors(file)
        folder = tmp_path / stored.stem
        folder.mkdir()
        made.append(onnx.load(str(case.quantised(folder, method)[0])))
    assert all(model == made[0] for model in made[1:])


def random_pair(random: np.random.Generator, channels: int) -> Pair:
    """Activations of which some channels are large."""
    rows = random.standard_normal((2, 2 * channels, channels)) * np.exp(random.standard_normal(channels))
    fit, check = (Gram((part.T @ part).astype(np.float32), len(part)) for part in rows)
    return Pair(fit, check)


def test_what_it_costs_is_less_than_rounding(case: Case, tmp_path: Path) -> None:
    rounded, _ = case.quantised(tmp_path, "rtn")
    fitted, errors = case.quantised(tmp_path, "auto")
    assert len(errors) == 8
    assert all(e.chosen <= e.rtn for e in errors)
    assert np.mean([e.chosen / e.rtn for e in errors]) < 0.85
    assert case.logits_error(fitted) < 0.95 * case.logits_error(rounded)


def test_the_wrong_activations_are_worse(case: Case, tmp_path: Path) -> None:
    """Each matrix fitted to its neighbours' activations, judged by its own."""

    def wrong(pair: Pair) -> Pair:
        order = np.roll(np.arange(len(pair.fit.matrix)), 9)
        return replace(pair, fit=Gram(pair.fit.matrix[np.ix_(order, order)], pair.fit.rows))

    _, right = case.quantised(tmp_path, "gptq")
    (tmp_path / "wrong").mkdir()
    _, shifted = case.quantised(tmp_path / "wrong", "gptq", grams={n: wrong(p) for n, p in case.grams.items()})
    assert np.mean([e.chosen for e in shifted]) > 1.15 * np.mean([e.rtn for e in shifted])
    assert np.mean([e.chosen for e in shifted]) > 1.4 * np.mean([e.chosen for e in right])


def test_factors_are_undone_before_the_matrices(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 8 bits next to nothing is lost, so that a factor that stays in the graph would show; and one does."""
    monkeypatch.setattr("pixano_edge.calibration.weight_only.EXPONENTS", (0.9,))
    file, errors = case.quantised(tmp_path, "awq", bits=8)
    assert all(e.exponent == 0.9 for e in errors)
    whole = case.logits_error(file)
    assert whole < 0.1
    for name in ("columns", "norm"):
        broken = tmp_path / name
        broken.mkdir()
        with monkeypatch.context() as patch:
            if name == "columns":
                patch.setattr(decoder_int4._Undo, "columns", lambda self, factors: np.ones(8, np.float32))
            else:
                patch.setattr(decoder_int4._Decoder, "put", _keep_norms(decoder_int4._Decoder.put))
            file, _ = case.quantised(broken, "awq", bits=8)
        assert case.logits_error(file) > 3 * whole


def _keep_norms(put: Any) -> Any:
    def changed(self: Any, product: Any, chosen: Any, undo: Any) -> None:
        put(self, product, chosen, undo)
        if undo.norm:
            del self._changed[undo.norm]

    return changed


def test_attention_biases_and_rotary_positions(tmp_path: Path) -> None:
    """Qwen2.5-VL's decoder: queries, keys and values have a bias, positions come from the caller."""
    model = vlm.qwen_model()
    text = model.model.language_model
    c = DecoderConstants(2, 4, 2, 16, 64, 320, 512, "mrope", (2,))
    with WeightStore(tmp_path / "decoder.fp32.weights") as store:
        plain = build_decoder(DecoderWeights(text, model.lm_head, c, (2, 3, 3)), store)
    store.seal(plain)
    file = tmp_path / "decoder.fp32.onnx"
    onnx.save(plain, file)
    random = np.random.default_rng(0)
    files = []
    for index in range(8):
        embeds = random.standard_normal((1, 48, 64)).astype(np.float32)
        positions = np.sort(random.integers(0, 60, (3, 48)), axis=1).astype(np.int32)
        files.append(tmp_path / f"{index}.npz")
        content = {"prompt": embeds[:, :40], "answer": embeds[:, 40:], "tokens": np.zeros(8), "positions": positions}
        np.savez(files[-1], **content)
    held_out = list(Turns(files[6:]))
    grams = collect(file, c, Turns(files[:6]), tapped_tensors(file), tmp_path / "grams", threads=1)
    case = Case(file, c, grams, held_out, logits(file, c, held_out))
    assert len({p.tensor for p in products(plain)}) == 8
    (tmp_path / "wide").mkdir()
    fine, errors = case.quantised(tmp_path / "wide", "awq", bits=8)
    assert all(e.method == "awq" for e in errors)
    assert case.logits_error(fine) < 0.1


def test_groups_and_resuming(case: Case, turns: Turns, tmp_path: Path) -> None:
    tensors = tapped_tensors(case.file)
    few = Turns(turns.files[:3])
    assert [len(group) for group in groups(tensors, 1)] == [1] * len(tensors)
    passes: list[int] = []

    def run(used: Turns, limit: int) -> Grams:
        passes.clear()
        return collect(
            case.file, case.constants, used, tensors, tmp_path, group_bytes=limit, threads=1,
            on_turn=lambda: passes.append(1),
        )  # fmt: skip

    limit = 3 * 2 * 8 * 64 * 64
    whole = {name: pair.fit.matrix for name, pair in run(few, 1 << 30).items()}
    assert len(passes) == 3
    (tmp_path / "gram-0000.npz").unlink()
    again = run(few, limit)
    assert len(passes) == 3  # one group of three
    for name, pair in again.items():
        np.testing.assert_allclose(pair.fit.matrix, whole[name], rtol=1e-4, atol=1e-3)
    run(Turns(turns.files[1:4]), limit)
    assert len(passes) == 3 * len(groups(tensors, limit))  # other turns: nothing is taken over
    with pytest.raises(EdgeError, match="cannot be fitted to and judged by"):
        run(Turns(turns.files[:1]), limit)


def test_the_variant_runs_in_its_bundle(tiny_vlm_bundle: Path, tmp_path: Path) -> None:
    from pixano_edge.engine.models.decoder.base import GenerationOptions
    from pixano_edge.engine.models.decoder.opening import open_vlm
    from pixano_edge.engine.models.text.messages import read_conversation

    asked = questions(4)
    made = make_int4(tiny_vlm_bundle, asked, tmp_path / "work", tokens=4, threads=1)
    assert made.graph.name == "decoder.int4.onnx"
    held = Bundle.open(tiny_vlm_bundle)
    fields = held.manifest.model_dump(exclude={"files", "schema_version", "calibrations"})
    for graph, entry in made.entries.items():
        fields["graphs"][graph]["variants"]["int4"] = entry.model_dump()
    with BundleWriter(tmp_path / "bundle") as writer:
        shutil.copytree(tiny_vlm_bundle, writer.root, dirs_exist_ok=True)
        (writer.root / "manifest.json").unlink()
        for file in (made.graph, made.weights):
            writer.add_file(f"graphs/{file.name}", file)
        writer.finish(fields)
    with open_vlm(tmp_path / "bundle", device="cpu", precision="int4", threads=1) as model:
        conversation = read_conversation(asked[0].text, [asked[0].image])
        found = model.generate(conversation, [asked[0].image], GenerationOptions(8))
        assert model.info()["precision"] == "int4"
    assert found.usage.completion > 0


def test_methods_are_compared_on_held_out_questions(tiny_vlm_bundle: Path, tmp_path: Path) -> None:
    found = compare_methods(Bundle.open(tiny_vlm_bundle), questions(6), tmp_path, ("rtn", "clip"), tokens=4, threads=1)
    assert [cost.method for cost in found] == ["rtn", "clip"]
    assert all(cost.questions == 1 and 0 < cost.layers <= cost.worst < 1 for cost in found)
    assert all(0 < cost.logits < 1 and 0 <= cost.exact <= cost.tokens <= 1 for cost in found)
    assert found[1].layers < found[0].layers
    with pytest.raises(EdgeError, match="too few"):
        compare_methods(Bundle.open(tiny_vlm_bundle), questions(2), tmp_path)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, pixano_edge.calibration.report, pixano_edge.calibration.int4_report\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_bundle_without_a_language_model_is_refused(demo_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no language model"):
        decoder_constants(Bundle.open(demo_bundle))
