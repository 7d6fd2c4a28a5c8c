"""The demo detector's training parts: words and tokens, batches, which token answers, losses, average precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")
torch = pytest.importorskip("torch", reason="training needs pixano-edge[export]")
pytest.importorskip("transformers", reason="training needs pixano-edge[export]")

from pixano_edge.export.demo import detect_eval  # noqa: E402
from pixano_edge.export.demo.calibrate_owlv2 import best_threshold, calibrate  # noqa: E402
from pixano_edge.export.demo.detect_batches import (  # noqa: E402
    ASKED,
    BLOCK,
    NOTHING,
    UNSURE,
    USES,
    fill,
    make_block,
    turned,
)
from pixano_edge.export.demo.detect_loss import (  # noqa: E402
    Targets,
    WhatIsHere,
    assign,
    centred,
    detection_loss,
    distances,
    overlaps,
)
from pixano_edge.export.demo.owlv2_model import (  # noqa: E402
    GRID,
    IMAGE_SIZE,
    Predictions,
    TorchDetector,
    cosine_patches,
    encode_texts,
    initialise,
    normalise,
    predict,
    tiny_config,
)
from pixano_edge.export.demo.scenes import SHAPES, generate_scene, is_evaluated, mask_box  # noqa: E402
from pixano_edge.export.demo.train_owlv2 import ask_phrases, matches, write_folder  # noqa: E402
from pixano_edge.export.demo.words import (  # noqa: E402
    NAMED_PATTERNS,
    Phrase,
    all_phrases,
    build_tokenizer,
    phrases_of,
    spoken,
    stranger,
    vocabulary,
)

TOKENS = GRID * GRID


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import Owlv2ForObjectDetection

    torch.manual_seed(0)
    made = Owlv2ForObjectDetection(tiny_config(len(tokenizer), width=48, layers=2, heads=2))
    initialise(made)
    return made.eval()


class TestWords:
    def test_phrases(self) -> None:
        kinds = [phrase.kind for phrase in all_phrases()]
        assert [kinds.count(kind) for kind in ("shape", "color", "pattern")] == [12, 144, 48]
        assert len({phrase.text for phrase in all_phrases()}) == len(kinds)
        assert Phrase("circle", color="red").text == "red circle"

    def test_what_is_true_of_an_object(self) -> None:
        for seed in range(8):
            for obj in generate_scene(seed, "heldout").objects:
                true = [phrase for phrase in all_phrases() if phrase.matches(obj)]
                assert set(true) == set(phrases_of(obj))
                assert len(true) == (3 if obj.pattern in NAMED_PATTERNS else 2)

    def test_every_known_word_is_one_token(self, tokenizer) -> None:
        assert {len(tokenizer(word)["input_ids"]) for word in vocabulary()} == {3}
        rng = np.random.default_rng(0)
        known = set(vocabulary())
        for phrase in all_phrases():
            assert set(spoken(phrase, rng).split()) <= known

    def test_tokens_are_laid_out_as_in_clip(self, tokenizer) -> None:
        ids = tokenizer("a red circle", padding="max_length")["input_ids"]
        assert len(ids) == 16
        assert ids[0] == tokenizer.bos_token_id
        assert max(ids) == tokenizer.eos_token_id
        assert tokenizer.eos_token_id == len(tokenizer) - 1
        assert ids[5:] == [0] * 11
        assert tokenizer.pad_token == "!"

    @pytest.mark.parametrize("text", ["größe", "红色的圆", "\x00\x7f", "🙂 circle", "RED  Circle"])
    def test_any_text_can_be_written(self, tokenizer, text: str) -> None:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.eos_token_id not in ids[1:-1], "an unknown token would be the end of the text"
        assert tokenizer("RED  Circle")["input_ids"] == tokenizer("red circle")["input_ids"]

    def test_strangers_name_nothing(self) -> None:
        rng = np.random.default_rng(0)
        names = {word for phrase in all_phrases() for word in phrase.text.split() if word in SHAPES}
        assert not any(names & set(stranger(rng).split()) for _ in range(300))


class TestBatches:
    def test_blocks_are_pure_and_show_each_scene_again(self) -> None:
        a, b = make_block(2, 3, 1, IMAGE_SIZE), make_block(2, 3, 1, IMAGE_SIZE)
        for x, y in zip(a, b, strict=True):
            assert np.array_equal(x.images, y.images)
            assert np.array_equal(x.boxes, y.boxes)
        sums = sorted(int(batch.images.sum()) for batch in a)
        assert sums[::USES] == sums[USES - 1 :: USES]
        assert len(set(sums)) == BLOCK // USES
        assert len({batch.images.tobytes() for batch in a}) == BLOCK

    @pytest.mark.parametrize("turn", range(8))
    def test_boxes_turn_with_the_picture(self, turn: int) -> None:
        from pixano_edge.export.demo.detect_batches import _empty

        scene = generate_scene(4, "train")
        out = _empty(1, IMAGE_SIZE)
        fill(out, 0, scene, turn)
        assert np.array_equal(out.images[0], turned(scene.image, turn))
        for i, obj in enumerate(scene.objects):
            if out.state[0, i] != NOTHING:
                assert tuple(out.boxes[0, i]) == mask_box(np.ascontiguousarray(turned(obj.visible, turn)))
            assert (out.state[0, i] == ASKED) == is_evaluated(obj)


def answers(boxes, logits) -> Predictions:
    return Predictions(boxes, logits, torch.zeros(logits.shape[:2]), torch.zeros(*logits.shape[:2], 8))


def targets_of(boxes: list[list[float]], states: list[int], match: list[list[bool]]) -> Targets:
    count = len(boxes)
    return Targets(
        centred(torch.tensor(boxes)[None]),
        torch.tensor(states)[None],
        torch.tensor(match)[None],
        torch.zeros(1, count, 3, dtype=torch.long),
        torch.full((1, 4 * GRID, 4 * GRID), -1),
    )


class TestAssignment:
    def test_the_nearest_token_answers_at_first(self) -> None:
        # Centres in the middle of the cells (column 2, row 3) and (5, 1); the third is not asked for.
        boxes = [[20.0, 36.0, 60.0, 76.0], [68.0, 4.0, 108.0, 44.0], [100.0, 100.0, 140.0, 140.0]]
        targets = targets_of(boxes, [ASKED, ASKED, UNSURE], [[True], [True], [True]])
        out = answers(torch.rand(1, TOKENS, 4), torch.randn(1, TOKENS, 1))
        assert assign(out, targets, 0.0).tolist() == [[3 * GRID + 2, 1 * GRID + 5, -1]]

    def test_two_objects_never_share_a_token(self) -> None:
        boxes = [[20.0, 36.0, 60.0, 76.0], [22.0, 38.0, 58.0, 74.0]]
        targets = targets_of(boxes, [ASKED, ASKED], [[True], [True]])
        tokens = assign(answers(torch.rand(1, TOKENS, 4), torch.zeros(1, TOKENS, 1)), targets, 0.0)[0]
        assert tokens[0] != tokens[1]
        assert bool((distances(targets.boxes)[0, [0, 1], tokens] <= 1.5).all())

    def test_the_better_neighbour_answers_later_but_none_farther_away(self) -> None:
        targets = targets_of([[20.0, 36.0, 60.0, 76.0]], [ASKED], [[False, True]])
        good, far = 3 * GRID + 3, 9 * GRID + 9
        boxes, logits = torch.full((1, TOKENS, 4), 0.5), torch.full((1, TOKENS, 2), -4.0)
        for token in (good, far):
            boxes[0, token], logits[0, token, 1] = targets.boxes[0, 0], 4.0
        assert assign(answers(boxes, logits), targets, 1.0).tolist() == [[good]]
        logits[0, :, 0] = 8.0  # a text that is not true of it has no say
        assert assign(answers(boxes, logits), targets, 1.0).tolist() == [[good]]
        assert assign(answers(boxes, logits), targets, 0.0).tolist() == [[3 * GRID + 2]]

    def test_overlaps_by_hand(self) -> None:
        a = centred(torch.tensor([0.0, 0.0, 128.0, 128.0]))
        b = centred(torch.tensor([64.0, 0.0, 192.0, 128.0]))
        iou, giou = overlaps(a, b)
        assert float(iou) == pytest.approx(1 / 3)
        assert float(giou) == pytest.approx(1 / 3)
        _, apart = overlaps(a, centred(torch.tensor([128.0, 128.0, 256.0, 256.0])))
        assert float(apart) == pytest.approx(-0.5)


class TestLoss:
    def make(self) -> tuple[Predictions, Targets, torch.Tensor]:
        boxes = [[20.0, 36.0, 60.0, 76.0], [100.0, 100.0, 140.0, 140.0], [200.0, 200.0, 240.0, 240.0]]
        targets = targets_of(boxes, [ASKED, ASKED, UNSURE], [[True, False], [False, True], [True, False]])
        out = answers(torch.full((1, TOKENS, 4), 0.5), torch.full((1, TOKENS, 2), -8.0))
        tokens = assign(out, targets, 0.0)
        near = distances(targets.boxes)[0]
        for slot in range(2):
            out.boxes[0, near[slot] <= 1.5] = targets.boxes[0, slot]
            out.logits[0, tokens[0, slot], slot] = 8.0
            out.objectness[0] = -8.0
        out.objectness[0, tokens[0, :2]] = 8.0
        return out, targets, tokens

    def test_right_answers_cost_nothing(self) -> None:
        losses = detection_loss(*self.make())
        assert all(float(value) < 1e-3 for value in losses.values()), losses

    @pytest.mark.parametrize("mistake", ["class", "duplicate", "box", "object"])
    def test_control_each_mistake_costs(self, mistake: str) -> None:
        out, targets, tokens = self.make()
        first = int(tokens[0, 0])
        if mistake == "class":
            out.logits[0, first] = out.logits[0, first].flip(0)
        elif mistake == "duplicate":
            out.logits[0, first + 1] = out.logits[0, first]
        elif mistake == "box":
            out.boxes[0, first, 0] += 0.1
        else:
            out.objectness[0, first] = -8.0
        losses = detection_loss(out, targets, tokens)
        expected = "class" if mistake == "duplicate" else mistake
        assert [key for key, value in losses.items() if float(value) > 0.05] == [expected]

    def test_by_an_unsure_object_nothing_is_wrong(self) -> None:
        out, targets, tokens = self.make()
        out.logits[0, distances(targets.boxes)[0, 2] <= 1.5] = 8.0
        assert float(detection_loss(out, targets, tokens)["class"]) < 1e-3
        out.logits[0, distances(targets.boxes)[0, 2] <= 2.5] = 8.0
        assert float(detection_loss(out, targets, tokens)["class"]) > 1


class TestModel:
    def test_start_values(self, model) -> None:
        filters = cosine_patches(48).reshape(48, -1)
        scaled = filters / np.linalg.norm(filters, axis=1, keepdims=True)
        assert np.allclose(scaled @ scaled.T, np.eye(48), atol=1e-5)
        image = generate_scene(0, "train").image
        with torch.no_grad():
            out = predict(model, normalise(torch.from_numpy(image)[None]), torch.randn(5, 128))
        assert float(out.logits.sigmoid().mean()) < 0.05
        assert float(out.features.std()) == pytest.approx(1, abs=0.1)

    def test_training_path_is_the_stock_forward(self, model, tokenizer, tmp_path: Path) -> None:
        """Boxes, logits and objectness as `Owlv2ForObjectDetection` and `Owlv2Processor` give them from the folder."""
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        write_folder(model, tokenizer, tmp_path)
        stock = Owlv2ForObjectDetection.from_pretrained(tmp_path).eval()
        processor = Owlv2Processor.from_pretrained(tmp_path)
        image, classes = generate_scene(1, "heldout").image, ["circle", "a striped square", "nothing known"]
        with torch.no_grad():
            want = stock(**processor(images=image, text=[classes], return_tensors="pt"))
            texts = encode_texts(model, tokenizer, classes)
            got = predict(model, normalise(torch.from_numpy(image)[None]), texts)
        assert torch.allclose(got.logits, want.logits, atol=1e-4)
        assert torch.allclose(got.boxes, want.pred_boxes, atol=1e-5)
        assert torch.allclose(got.objectness, want.objectness_logits, atol=1e-4)
        threshold = float(want.logits.max(-1).values.sigmoid().sort().values[0, 127:129].mean())
        found = processor.post_process_grounded_object_detection(want, threshold, target_sizes=[(256, 256)])[0]
        boxes, scores, labels = TorchDetector(model, tokenizer)(image, classes, threshold)
        order = found["scores"].argsort(descending=True, stable=True)
        assert len(scores) == len(order) > 10
        assert np.allclose(scores, found["scores"][order].numpy(), atol=1e-4)
        assert np.allclose(np.clip(found["boxes"][order].numpy(), 0, 256), boxes, atol=0.05)
        assert np.array_equal(labels, found["labels"][order].numpy())

    def test_phrases_of_a_step(self) -> None:
        batch = make_block(0, 0, 1, IMAGE_SIZE)[0]
        words, state = torch.from_numpy(batch.words), torch.from_numpy(batch.state)
        phrases = ask_phrases(words[state == ASKED], np.random.default_rng(0))
        assert len(set(phrases)) == len(phrases)
        table = matches(words, phrases, 3)
        assert table.shape == (1, 8, len(phrases) + 3)
        assert not table[..., -3:].any()
        for slot in torch.nonzero(state[0] == ASKED)[:, 0].tolist():
            shape = int(words[0, slot, 0])
            true = {phrases[k].text for k in torch.nonzero(table[0, slot])[:, 0].tolist()}
            assert SHAPES[shape] in true
            assert any(text.endswith(SHAPES[shape]) and " " in text for text in true)

    def test_what_is_here_asks_each_token_for_its_own_parts(self) -> None:
        targets = targets_of([[0.0, 0.0, 64.0, 64.0]], [ASKED], [[True]])
        here, features = WhatIsHere(8), torch.zeros(1, TOKENS, 8)
        with torch.no_grad():
            here.head.weight.zero_()
            here.head.bias[-16:] = 20.0  # every part is like the centre
        here.requires_grad_(False)
        targets.owner[0, :16, :16] = 0
        aligned = float(here.loss(features, targets))
        # Two more columns reach into the left half of four tokens, not to their centres: 32 parts are unlike.
        targets.owner[0, :16, 16:18] = 0
        assert float(here.loss(features, targets)) - aligned == pytest.approx(2 * 20 * 32 / (TOKENS * 16), rel=1e-3)


class TestCalibration:
    def test_best_threshold_by_hand(self) -> None:
        scores, hits = np.array([0.9, 0.6, 0.4, 0.2]), np.array([True, True, False, False])
        assert best_threshold(scores, hits, 3) == pytest.approx(0.5)

    def test_scores_move_and_their_order_stays(self, tokenizer) -> None:
        from transformers import Owlv2ForObjectDetection

        torch.manual_seed(1)
        made = Owlv2ForObjectDetection(tiny_config(len(tokenizer), width=48, layers=1, heads=2))
        initialise(made)
        image = generate_scene(1, "heldout").image
        before = TorchDetector(made, tokenizer)(image, ["circle"], 0.0)
        threshold = calibrate(made, tokenizer, scenes=2)
        after = TorchDetector(made, tokenizer)(image, ["circle"], 0.0)
        moved = np.log(after[1] / (1 - after[1])) - np.log(before[1] / (1 - before[1]))
        assert np.median(moved) == pytest.approx(-np.log(threshold / (1 - threshold)), rel=0.1)


class TestAveragePrecision:
    def test_by_hand(self) -> None:
        # Ranks 1 and 3 hit, of three objects: 1/3 at precision 1 and 1/3 at 2/3.
        assert detect_eval.average_precision([0.9, 0.8, 0.7, 0.1], [True, False, True, False], 3) == pytest.approx(
            5 / 9
        )
        assert detect_eval.average_precision([], [], 2) == 0.0

    def test_one_object_is_hit_once_and_doubtful_ones_count_neither_way(self) -> None:
        targets, doubtful = np.array([[0, 0, 10, 10]], np.float32), np.array([[50, 50, 60, 60]], np.float32)
        boxes = np.array([[0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]], np.float32)
        scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
        kept, hits = detect_eval.judge(boxes, scores, targets, doubtful)
        assert np.allclose(kept, [0.9, 0.8, 0.6])
        assert hits == [True, False, False]

    def perfect(self, scene, wrong: str = ""):
        """A detector that knows the scene."""

        def detect(image, classes, threshold):
            known = {phrase.text: phrase for phrase in all_phrases()}
            boxes, labels = [], []
            for obj in scene.objects:
                for k, text in enumerate(classes):
                    if is_evaluated(obj) and known[text].matches(obj):
                        boxes.append([v + (60 if wrong == "box" else 0) for v in obj.box])
                        labels.append((k + (wrong == "label")) % len(classes))
            scores = np.linspace(1, 0.9, len(boxes), dtype=np.float32)
            return np.array(boxes, np.float32).reshape(-1, 4), scores, np.array(labels, np.int64)

        return detect

    def measured(self, wrong: str = "") -> dict[str, detect_eval.Summary]:
        tallies: detect_eval.Tallies = {}
        for seed in range(6):
            scene = generate_scene(seed, "heldout")
            detect_eval.ask(self.perfect(scene, wrong), scene, tallies)
        return detect_eval.summarise(tallies)

    def test_a_perfect_detector_has_everything(self) -> None:
        found = self.measured()
        assert {s.ap50 for s in found.values()} == {1.0}
        assert found["all"].alarm == 0

    @pytest.mark.parametrize("wrong", ["box", "label"])
    def test_control_wrong_boxes_and_wrong_words_are_noticed(self, wrong: str) -> None:
        assert self.measured(wrong)["all"].ap50 < 0.3

    def test_questions_are_fixed_half_absent_and_true(self) -> None:
        for seed in range(20):
            scene = generate_scene(seed, "heldout")
            asked = detect_eval.questions(scene)
            assert asked == detect_eval.questions(scene)
            for question in asked:
                for phrase, absent in zip(question.phrases, question.absent, strict=True):
                    assert phrase.kind == question.kind
                    assert absent != any(phrase.matches(obj) for obj in scene.objects)
                if question.kind != "shape":
                    assert 2 * sum(question.absent) == len(question.absent)
