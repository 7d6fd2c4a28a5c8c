"""The parts of the demo's Grounding DINO and of its training: tokens, captions, norms, scenes, losses, calibration."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")
torch = pytest.importorskip("torch", reason="training needs pixano-edge[export]")
pytest.importorskip("transformers", reason="training needs pixano-edge[export]")

import onnx  # noqa: E402
from transformers import GroundingDinoForObjectDetection  # noqa: E402

from pixano_edge.engine.bundle import Bundle  # noqa: E402
from pixano_edge.engine.bundle.store import demo_path  # noqa: E402
from pixano_edge.engine.models.grounding_dino.text import Captioner  # noqa: E402
from pixano_edge.export.demo import gdino_loss as losses  # noqa: E402
from pixano_edge.export.demo import gdino_model as small  # noqa: E402
from pixano_edge.export.demo import train_gdino as training  # noqa: E402
from pixano_edge.export.demo.calibrate_gdino import keep_boxes, shift_scores  # noqa: E402
from pixano_edge.export.demo.detect_batches import ASKED, NOTHING, UNSURE  # noqa: E402
from pixano_edge.export.demo.quick_deformable import quick_deformable  # noqa: E402
from pixano_edge.export.demo.quick_text import pack, quick_text  # noqa: E402
from pixano_edge.export.demo.scene_pool import ScenePool, draw_pool, open_pool  # noqa: E402
from pixano_edge.export.demo.scenes import generate_scene  # noqa: E402

SCENES = 10


@pytest.fixture(scope="module")
def model() -> Any:
    """With batch statistics that are not those it starts with."""
    torch.manual_seed(0)
    made = GroundingDinoForObjectDetection(small.tiny_config())
    small.thaw(made)
    small.initialise(made)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    return made.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small.build_tokenizer()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ScenePool:
    folder = tmp_path_factory.mktemp("pool")
    draw_pool(folder, SCENES, 3, processes=1)
    return open_pool(folder)


def step_of(pool: ScenePool, tokenizer: Any, seed: int = 0) -> tuple[Any, Any, losses.Targets]:
    return training.make_step(pool, training.Captions(tokenizer), np.arange(4), np.random.default_rng(seed))


def test_known_words_are_one_token_and_all_others_are_spelled(tokenizer: Any) -> None:
    assert tokenizer.tokenize("Red circle. striped donut?") == ["red", "circle", ".", "striped", "donut", "?"]
    assert tokenizer.tokenize("xqz \u0436\u043a") == ["x", "##q", "##z", "\u0436", "##\u043a"]
    for token, number in small.FIXED_TOKENS.items():
        assert tokenizer.convert_tokens_to_ids(token) == number
    assert len(tokenizer) == small.VOCABULARY


def test_captions_are_those_of_the_engine(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "spoken", lambda phrase, rng: phrase.text)
    monkeypatch.setattr(training, "ONE_KIND", 0.0)
    words = np.array([[0, 0, 0], [4, 2, 1]])
    ids, match = training.Captions(tokenizer)(words, np.array([True, True]), np.random.default_rng(0))
    names = [text.strip() for text in tokenizer.decode(ids[1:-1]).split(".")][:-1]
    captioner = Captioner(tokenizer.backend_tokenizer.to_str(), small.constants())
    (caption,) = captioner.captions(names)
    assert list(caption.ids) == ids
    assert match.shape == (2, len(ids))
    for start, end, name in zip(caption.edges[::2], caption.edges[1::2], names, strict=True):
        assert (match[:, start:end] == match[:, start : start + 1]).all(), name
        assert not match[:, end].any()
    first = names.index("circle")
    assert match[:, caption.edges[2 * first]].tolist() == [1.0, 0.0]


def test_short_captions_ask_for_what_is_there_and_for_about_as_much_that_is_not() -> None:
    words = np.array([[0, 0, 0], [4, 2, 1]])
    kinds = set()
    for seed in range(30):
        asked = training.ask_few(words, np.random.default_rng(seed))
        true = [training._true_of(phrase, words).any() for phrase in asked]
        (kind,) = {phrase.kind for phrase in asked}
        kinds.add(kind)
        assert sum(true) == 2
        assert 1 <= len(asked) - sum(true) <= 5
    assert kinds == {"shape", "color", "pattern"}


def test_frozen_norms_answer_as_the_thawed_ones(model: Any, tmp_path: Path) -> None:
    pixels = torch.randn(1, 3, small.IMAGE_SIZE, small.IMAGE_SIZE)
    ids = torch.tensor([[101, 1100, 1012, 1101, 1102, 1012, 102]])
    training.write_folder(model, tmp_path)
    stock: Any = GroundingDinoForObjectDetection.from_pretrained(tmp_path)
    changed = copy.deepcopy(stock)
    with torch.no_grad():
        wanted = small.predict(model, pixels, ids)
        found = stock(pixel_values=pixels, input_ids=ids)
        changed.model.backbone.conv_encoder.model.embedder.embedder.normalization.running_var.mul_(1.3)
        other = changed(pixel_values=pixels, input_ids=ids)
    assert torch.allclose(found.pred_boxes, wanted.query_boxes[-1], atol=1e-5)
    assert torch.allclose(found.logits[..., : ids.shape[1]], wanted.query_logits[-1], atol=1e-4)
    assert not torch.allclose(other.logits[..., : ids.shape[1]], wanted.query_logits[-1], atol=1e-2)


def test_a_pool_holds_the_scenes_of_its_seed(pool: ScenePool, tmp_path: Path) -> None:
    assert len(pool) == SCENES
    scene = generate_scene(3 * 10**7 + 5, "train")
    assert np.array_equal(pool.images[5], scene.image)
    assert (pool.state[5] != NOTHING).sum() <= len(scene.objects)
    draw_pool(tmp_path, SCENES, 4, processes=1)
    assert not np.array_equal(open_pool(tmp_path).images[5], pool.images[5])


def test_epochs_show_every_scene_once(pool: ScenePool) -> None:
    steps, batch = 100, 9
    rows = list(training.pool_rows(100, steps, batch, 0))
    easy = int(training.EASY_STEPS * steps)
    assert np.concatenate(rows[:easy]).max() < 10
    first = np.concatenate(rows[easy : easy + 10])
    assert sorted(first) == list(range(10, 100))
    assert all(np.array_equal(a, b) for a, b in zip(rows, training.pool_rows(100, steps, batch, 0), strict=True))


def test_targets_lie_where_the_objects_are(pool: ScenePool, tokenizer: Any) -> None:
    images, ids, targets = step_of(pool, tokenizer)
    again, same_ids, _ = step_of(pool, tokenizer)
    assert torch.equal(images, again) and torch.equal(ids, same_ids)  # noqa: PT018
    side = targets.owner.shape[1]
    for row in range(len(images)):
        for i in range(targets.state.shape[1]):
            if targets.state[row, i] != ASKED:
                continue
            y, x = torch.nonzero(targets.owner[row] == i, as_tuple=True)
            cx, cy, w, h = (targets.boxes[row, i] * side).tolist()
            assert abs(x.min() - (cx - w / 2)) <= 2 and abs(x.max() + 1 - (cx + w / 2)) <= 2  # noqa: PT018
            assert abs(y.min() - (cy - h / 2)) <= 2 and abs(y.max() + 1 - (cy + h / 2)) <= 2  # noqa: PT018
            assert targets.match[row, i].sum() > 0


def perfect(targets: losses.Targets, place: Any = None) -> small.Predictions:
    """What a model that knows everything would say: one place and one query for each object."""
    count, slots, tokens = targets.match.shape
    grid = small.IMAGE_SIZE // small.STRIDES[0]
    places = grid**2 + 45
    logits = torch.full((count, places, tokens), -9.0)
    boxes = torch.full((count, places, 4), 0.1)
    queries = torch.full((count, small.QUERIES, tokens), -9.0)
    query_boxes = torch.full((count, small.QUERIES, 4), 0.1)
    nearest = losses.distances(targets.boxes, grid).argmin(-1)
    for row in range(count):
        for i in range(slots):
            if targets.state[row, i] == ASKED:
                logits[row, nearest[row, i]] = 18 * targets.match[row, i] - 9
                boxes[row, nearest[row, i]] = targets.boxes[row, i]
                queries[row, 39 - i] = 18 * targets.match[row, i] - 9
                query_boxes[row, 39 - i] = targets.boxes[row, i]
    return small.Predictions(
        logits, boxes, queries[None], query_boxes[None], torch.zeros(1, count, small.QUERIES, small.WIDTH),
        torch.zeros(count, places, small.WIDTH), [torch.zeros(count, small.CHANNELS, grid, grid)],
    )  # fmt: skip


def test_the_right_answers_cost_nothing(pool: ScenePool, tokenizer: Any) -> None:
    _, _, targets = step_of(pool, tokenizer)
    out = perfect(targets)
    found, places, queries = losses.detection_loss(out, targets, choice=0.0)
    asked = targets.state == ASKED
    assert torch.equal(places >= 0, asked)
    assert torch.equal(queries[asked], (39 - torch.arange(asked.shape[1])).expand_as(asked)[asked])
    assert float(found["place"]) < 0.02
    assert float(found["query"]) < 0.02
    assert float(found["qbox"]) < 1e-4
    assert float(found["which"]) < 1e-4 and float(found["pwhich"]) < 1e-4  # noqa: PT018
    # The same answers for other objects cost much.
    turned = losses.Targets(**{**vars(targets), "match": targets.match.roll(1, 1), "boxes": targets.boxes.roll(1, 1)})
    turned.state = targets.state
    wrong, _, _ = losses.detection_loss(out, turned, choice=0.0)
    assert float(wrong["place"]) > 1
    assert float(wrong["qbox"]) > 0.3
    assert float(wrong["which"]) > 1


def test_unsure_objects_and_padding_are_left_out(pool: ScenePool, tokenizer: Any) -> None:
    _, _, targets = step_of(pool, tokenizer)
    out = perfect(targets)
    row, slot = (int(v[0]) for v in torch.nonzero(targets.state == ASKED, as_tuple=True))
    targets.state[row, slot] = UNSURE
    alone, _, _ = losses.detection_loss(out, targets, choice=0.0)
    assert float(alone["place"]) < 0.02 and float(alone["query"]) < 0.02  # noqa: PT018
    targets.state[row, slot] = NOTHING
    counted, _, _ = losses.detection_loss(out, targets, choice=0.0)
    assert float(counted["place"]) > 0.1 and float(counted["query"]) > 0.1  # noqa: PT018
    out.logits[targets.real[:, None].expand_as(out.logits) == 0] = 9.0
    padded, _, _ = losses.detection_loss(out, targets, choice=0.0)
    assert float(padded["place"]) == pytest.approx(float(counted["place"]))


def test_scores_move_and_boxes_do_not(model: Any) -> None:
    pixels = torch.randn(1, 3, small.IMAGE_SIZE, small.IMAGE_SIZE)
    ids = torch.tensor([[101, 1100, 1012, 1101, 1102, 1012, 102]])
    moved = copy.deepcopy(model)
    shift_scores(moved, 1.5)
    with torch.no_grad():
        before, after = small.predict(model, pixels, ids), small.predict(moved, pixels, ids)
    rise = after.query_logits[-1] - before.query_logits[-1]
    assert float(rise.mean()) == pytest.approx(1.5, abs=0.1)
    assert float(rise.std()) < 0.2
    assert torch.allclose(before.query_boxes[-1], after.query_boxes[-1], atol=1e-5)
    assert torch.equal(before.logits, after.logits)


def test_a_step_reaches_every_parameter_that_is_used(model: Any, pool: ScenePool, tokenizer: Any) -> None:
    trained = copy.deepcopy(model).train()
    here = losses.WhatIsHere(128)
    alone = training.parse(["--out", "-", "--workers", "1"])
    optimizers, _, flat, parameters = training.build_optimizers(trained, here, alone)
    assert {id(p) for p in parameters} == {id(p) for p in (*trained.parameters(), *here.parameters())}
    images, ids, targets = step_of(pool, tokenizer)
    before = copy.deepcopy(trained.state_dict())
    found, rights = training.step_loss(trained, here, images, ids, targets, 0.5, bf16=False)
    assert all(torch.isfinite(value) for value in found.values())
    assert rights.shape == (3,)
    torch.stack([*found.values()]).sum().backward()
    flat.take_gradients()
    for optimizer in optimizers:
        optimizer.step()
    same = [name for name, value in trained.state_dict().items() if torch.equal(value, before[name])]
    # A bias of keys shifts all scores of a softmax alike; nothing else may stand still.
    assert [n for n in same if not n.endswith(("num_batches_tracked", "key.bias", "k_proj.bias", "position_ids"))] == []


def test_inner_layers_boxes_are_those_that_move_the_next_layer(model: Any) -> None:
    pixels = torch.randn(1, 3, small.FIRST_SIZE, small.FIRST_SIZE)
    ids = torch.tensor([[101, 1100, 1012, 1101, 1102, 1012, 102]])
    with torch.no_grad():
        found = small.predict(model, pixels, ids)
        out = model(pixel_values=pixels, input_ids=ids)
    assert found.grid == small.FIRST_SIZE // small.STRIDES[0]
    assert torch.allclose(found.query_boxes[0], out.intermediate_reference_points[:, 0], atol=1e-6)
    assert torch.allclose(found.query_boxes[-1], out.pred_boxes, atol=1e-6)


def test_quick_deformable_attention_is_the_stock_one(model: Any) -> None:
    pixels = torch.randn(2, 3, small.FIRST_SIZE, small.FIRST_SIZE)
    ids = torch.tensor([[101, 1100, 1012, 1101, 1102, 1012, 102]] * 2)
    wide = copy.deepcopy(model)
    for module in wide.modules():  # some samples lie outside
        if type(module).__name__ == "GroundingDinoMultiscaleDeformableAttention":
            torch.nn.init.normal_(module.sampling_offsets.bias, std=4)
    results = []
    for how in (contextlib.nullcontext, quick_deformable):
        wide.zero_grad()
        with how():
            out = small.predict(wide, pixels, ids)
            (out.query_boxes.sum() + out.query_logits.square().mean()).backward()
        offsets = wide.model.encoder.layers[0].deformable_layer.self_attn.sampling_offsets.weight.grad.clone()
        results.append((out.query_logits.detach(), out.query_boxes.detach(), offsets))
    for stock, quick in zip(*results, strict=True):
        assert float((stock - quick).abs().max()) < 1e-4 * float(stock.abs().max())


def test_texts_are_packed_phrase_by_phrase() -> None:
    captions = np.array([[101, 7, 8, 1012, 9, 1012, 102, 0], [101, 9, 1012, 7, 8, 1012, 102, 0]])
    captions = np.concatenate([captions, [[101, 8, 1012, *range(20, 24), 1012]]])  # ends without [SEP], as if cut
    ids, numbers, positions, where = pack(captions, width=6)
    assert np.array_equal(ids.ravel()[where], captions)
    assert ids.shape == (3, 6)  # 14 tokens of 7 different phrases, none of them over two rows
    assert sorted(numbers[numbers >= 0].tolist()) == [0, 1, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 6, 6, 6]
    assert positions.ravel()[where][0].tolist() == [0, 0, 1, 2, 0, 1, 0, 0]
    assert where[0, 1:4].tolist() == where[1, 3:6].tolist()  # "7 8 ." is there once
    assert pack(captions, width=2)[0].shape[1] == 5  # a row holds the longest


@pytest.mark.parametrize("trains", [False, True])
def test_quick_texts_are_the_stock_ones(model: Any, tokenizer: Any, pool: ScenePool, trains: bool) -> None:
    _, ids, _ = step_of(pool, tokenizer)
    pixels = torch.randn(len(ids), 3, small.FIRST_SIZE, small.FIRST_SIZE)
    both = copy.deepcopy(model)
    text = both.model.text_backbone
    seen: list[int] = []
    text.embeddings.register_forward_hook(lambda *states: seen.append(states[-1][..., 0].numel()))
    results = []
    for how in (contextlib.nullcontext(), quick_text(both)):
        both.zero_grad()
        with how, torch.set_grad_enabled(trains):
            out = small.predict(both, pixels, ids)
        found = [out.query_logits, out.query_boxes]
        if trains:
            (out.query_boxes.sum() + out.query_logits.square().mean()).backward()
            found += [text.embeddings.word_embeddings.weight.grad, text.encoder.layer[0].output.dense.weight.grad]
        results.append([value.detach().clone() for value in found])
    for stock, quick in zip(*results, strict=True):
        assert float((stock - quick).abs().max()) < 1e-4 * float(stock.abs().max())
    assert seen[1] < 0.8 * seen[0]  # of four pictures; a step has sixteen
    assert "forward" not in vars(text)


def test_matrices_are_divided_evenly(model: Any) -> None:
    args = training.parse(["--out", "-"])
    made = [training.build_optimizers(copy.deepcopy(model), losses.WhatIsHere(128), args, rank) for rank in range(2)]
    groups = made[0][1]
    costs = [sum(min(m.shape) * m.numel() for m in group) for group in groups]
    assert max(costs) < 1.1 * min(costs)
    assert not {id(m) for m in groups[0]} & {id(m) for m in groups[1]}
    for rank, (optimizers, own, *_) in enumerate(made):  # every process divides them alike and steps its own
        assert [[m.shape for m in group] for group in own] == [[m.shape for m in group] for group in groups]
        assert [id(m) for m in optimizers[0].param_groups[0]["params"]] == [id(m) for m in own[rank]]


def stopped_run(rank: int, args: Any) -> None:
    """A process of a run that is killed in its third step."""
    own, calls = training.average, [0]

    def average(*given: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("killed")
        own(*given)

    training.average = average
    training.train(rank, args)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    """Two processes, each with its share of Muon."""
    from torch.multiprocessing.spawn import spawn

    draw_pool(tmp_path / "pool", SCENES, 3, processes=1)
    weights = []
    for name in ("whole", "stopped"):
        given = ["--out", str(tmp_path / name), "--pool", str(tmp_path / "pool"), "--judge-scenes", "1"]
        args = training.parse([*given, "--steps", "4", "--batch", "4", "--save-every", "2"])
        Path(args.out).mkdir()
        if name == "stopped":
            with pytest.raises(Exception, match="killed"):
                spawn(stopped_run, args=(args,), nprocs=2)
            assert not (tmp_path / name / "final").exists()
            args.resume = True
        spawn(training.train, args=(args,), nprocs=2)
        kind: Any = GroundingDinoForObjectDetection
        weights.append(kind.from_pretrained(tmp_path / name / "final").state_dict())
    whole, stopped = weights
    assert [key for key in whole if not torch.equal(whole[key], stopped[key])] == []


def test_queries_keep_the_boxes_of_their_places(model: Any) -> None:
    pixels = torch.randn(1, 3, small.IMAGE_SIZE, small.IMAGE_SIZE)
    ids = torch.tensor([[101, 1100, 1012, 1101, 1102, 1012, 102]])
    kept = copy.deepcopy(model)
    keep_boxes(kept)
    with torch.no_grad():
        moved, still = small.predict(model, pixels, ids), small.predict(kept, pixels, ids)
    best = still.logits.amax(-1).topk(small.QUERIES, 1)[1][0]
    assert torch.allclose(still.query_boxes[-1, 0], still.boxes[0, best], atol=1e-5)
    assert not torch.allclose(moved.query_boxes[-1, 0], moved.boxes[0, best], atol=1e-2)


@pytest.mark.slow
def test_the_packaged_detector_builds_for_tensorrt_rtx() -> None:
    """Its convolutions read their kernels from a Cast (`export.half_weights`)."""
    tensorrt_rtx = pytest.importorskip("pixano_edge.export.tensorrt_rtx")
    if tensorrt_rtx.missing_module():
        pytest.skip("the TensorRT-RTX wheels are not installed")
    bundle = Bundle.open(demo_path("grounding-dino-demo"))
    graph = bundle.graph_path("detector", "fp32", target="tensorrt")
    assert "Cast" in {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
    assert tensorrt_rtx.check_build(graph, bundle.spec("detector", "fp32", "tensorrt"), ("SM89",)).engine_bytes > 0
