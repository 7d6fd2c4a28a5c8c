"""Training of the demo's memory: its maths is the stock model's, it learns, and image answers do not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="training needs pixano-edge[export]")
pytest.importorskip("skimage", reason="clips use the photographs of the scikit-image wheel")

import torch

from pixano_edge.engine.contracts.sam2 import Sam2Constants
from pixano_edge.export.demo import clip_batches, memory_path, memory_start, train_memory
from pixano_edge.export.demo.clips import first_prompts, generate_clip
from pixano_edge.export.demo.sam2_model import Decoded, Features, is_memory
from pixano_edge.export.demo.track_eval import encode_frames
from pixano_edge.export.sam2.video_reference import VideoReference

FRAMES = 20  # more than the bank holds and more than the pointers reach back
TOLERANCE = 2e-4  # as in the tracker's parity test


@pytest.fixture(scope="module")
def model(tiny_graphs: tuple[Any, Path, Any, Any]) -> Any:
    return tiny_graphs[0]


@pytest.fixture(scope="module")
def clip() -> Any:
    return generate_clip(1, "train", FRAMES, 128)


def follow(model: Any, clip: Any, kind: str) -> tuple[list[Any], list[list[Any]]]:
    """Answers of the training path for all objects at once, and of the stock model for each: frames, then objects."""
    path = memory_path.MemoryPath(model)
    prompts = first_prompts(clip)
    assert len(prompts) >= 2
    masks = [clip.labels[0] == p.index for p in prompts]
    with torch.no_grad():
        features = encode_frames(model, torch.from_numpy(clip.images))
        owner = torch.zeros(len(prompts), dtype=torch.long)
        own = memory_path.of_objects(features[0], owner)
        if kind == "mask":
            first = path.given(own, torch.from_numpy(np.stack(masks)).float())
        elif kind == "click":
            points = torch.tensor([p.click for p in prompts], dtype=torch.float32)[:, None]
            first = path.prompted(own, points, torch.ones(len(prompts), 1, dtype=torch.long))
        else:
            corners = torch.tensor([p.box for p in prompts], dtype=torch.float32).reshape(-1, 2, 2)
            first = path.prompted(own, corners, torch.tensor([2, 3]).expand(len(prompts), 2))
    answers = memory_path.track(path, features, owner, first)
    reference = VideoReference(model, list(clip.images), Sam2Constants(image_size=128, hidden_dim=128))
    for number, (prompt, mask) in enumerate(zip(prompts, masks, strict=True)):
        if kind == "mask":
            reference.mask(number, 0, mask)
        elif kind == "click":
            reference.prompt(number, 0, np.array([prompt.click], np.float32), np.array([1], np.int32))
        else:
            reference.prompt(number, 0, box=np.array(prompt.box, np.float32))
    wanted = [[found[i] for i in range(len(prompts))] for _, found in reference.propagate(0, FRAMES - 1)]
    return answers, wanted


def worst(answers: list[Any], wanted: list[list[Any]]) -> float:
    """Largest error of the logits, relative to the largest, and of the object score, over frames and objects."""
    error = 0.0
    for answer, frame in zip(answers, wanted, strict=True):
        for row, (logits, score) in enumerate(frame):
            own = answer.logits[row].numpy()
            error = max(error, float(np.abs(own - logits).max() / np.abs(logits).max()))
            error = max(error, abs(float(answer.score[row]) - score) / max(abs(score), 1.0))
    return error


@pytest.mark.parametrize("kind", ["click", "box", "mask"])
def test_the_trained_path_is_the_stock_model(model: Any, clip: Any, kind: str) -> None:
    assert worst(*follow(model, clip, kind)) < TOLERANCE


def test_control_stale_embeddings_are_caught(model: Any, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddings that the export modules hold as constants must follow the model's parameters."""
    answers, wanted = follow(model, clip, "click")
    monkeypatch.setattr(memory_path.MemoryPath, "refresh", lambda self: None)
    saved = model.memory_temporal_positional_encoding.detach().clone()
    try:
        stale = memory_path.MemoryPath(model)
        with torch.no_grad():
            model.memory_temporal_positional_encoding.mul_(-1)
        monkeypatch.setattr(memory_path, "MemoryPath", lambda _: stale)
        answers, wanted = follow(model, clip, "click")
        assert worst(answers, wanted) > 10 * TOLERANCE
    finally:
        with torch.no_grad():
            model.memory_temporal_positional_encoding.copy_(saved)


def test_the_embedding_first_comes_out_as_it_went_in() -> None:
    samples = torch.randn(4, 128, 8, 8, generator=torch.Generator().manual_seed(0)) * 2
    samples = samples + torch.linspace(-3, 3, 128)[:, None, None]
    norm = torch.nn.LayerNorm(128)
    memory_start.fit_norm(norm, samples)
    out = norm(samples.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    before = torch.nn.functional.layer_norm(samples.permute(0, 2, 3, 1), (128,)).permute(0, 3, 1, 2)
    error = (out - samples).square().mean() / samples.var()
    assert error < 0.05 * (before - samples).square().mean() / samples.var()


def test_short_clips_are_pure_and_have_gaps() -> None:
    a, b = (clip_batches.make_short_clip(3, 0, 4, 0.5, 64) for _ in range(2))
    assert a.images.tobytes() == b.images.tobytes()
    assert a.times == b.times
    many = [clip_batches.make_short_clip(i, 1, 4, 0.5, 64) for i in range(12)]
    assert {c.times[0] for c in many} == {0}
    assert 0 < sum(c.times[1] > 1 for c in many) < 12
    assert all(c.times[2:] == (c.times[1] + 1, c.times[1] + 2) for c in many)
    assert all(c.objects[0] for c in many)


def _encoded(number: int, times: tuple[int, ...]) -> train_memory.Encoded:
    """A clip whose features say which frame of which clip they are of, and object 1 is a pixel that tells the frame."""
    frames = len(times)
    labels = np.full((frames, 8, 8), -1, np.int8)
    for t in range(frames):
        labels[t, t, number] = 1
    clip = clip_batches.ShortClip(np.zeros((frames, 8, 8, 3), np.uint8), labels, times, ((1,), (1,)))
    code = (10.0 * number + torch.arange(frames)).reshape(-1, 1, 1, 1)
    return train_memory.Encoded(clip, Features(code, code, code, torch.zeros(1, 1, 1, 1)))


def test_clips_side_by_side_keep_features_and_masks_together() -> None:
    seen = set()
    for seed in range(20):
        clips = [_encoded(0, (0, 1, 2)), _encoded(1, (0, 7, 8))]
        tracks = train_memory.gather(clips, np.random.default_rng(seed), 3)
        assert tracks.times == (0, 7, 8)
        assert tracks.owner.tolist() == [0, 1]
        for step in range(3):
            for row, owner in enumerate(tracks.owner):
                number, frame = divmod(int(tracks.features[step].top[owner]), 10)
                assert number == owner
                assert tracks.masks[step, row].nonzero().tolist() == [[frame, number]]
        order = [int(f.top[0]) for f in tracks.features]
        assert order in ([0, 1, 2], [2, 1, 0])
        assert [int(f.top[1]) for f in tracks.features] == [10, 11, 12]  # a gap is not turned round
        seen.add(tuple(order))
    assert len(seen) == 2


def _answer(logits: torch.Tensor, score: float) -> memory_path.Answer:
    """An answer whose four candidates are all `logits` (n, h, w)."""
    n = len(logits)
    iou, scores = torch.ones(n, 1, 4), torch.full((n, 1), score)
    out = Decoded(logits[:, None, None].expand(-1, 1, 4, -1, -1), iou, scores, torch.zeros(n, 1, 4, 8))
    return memory_path.Answer(
        logits, scores[:, 0], out.tokens[:, 0, 0], scores[:, 0], all=out, chosen=torch.ones(n, dtype=torch.long)
    )


def test_the_loss_wants_the_mask_and_the_presence() -> None:
    target = torch.zeros(1, 32, 32)
    target[:, 8:24, 8:24] = 1
    small = (torch.nn.functional.avg_pool2d(target, 2) - 0.5) * 20
    here, away = torch.ones(1), torch.zeros(1)

    def loss(logits: torch.Tensor, score: float, present: torch.Tensor) -> float:
        return float(
            train_memory.answer_loss(_answer(logits, score), target, present, torch.Generator().manual_seed(0))
        )

    right = loss(small, 9.0, here)
    assert right < 0.2
    assert loss(-small, 9.0, here) > right + 2
    assert loss(small, -9.0, here) > right + 2
    assert loss(-small, -9.0, away) < 0.01  # nothing to find: the mask does not matter
    assert loss(-small, 9.0, away) > 2


def test_no_loss_counts_for_more_than_the_bound() -> None:
    losses = torch.tensor([0.5, 30.0], requires_grad=True)
    bounded = train_memory.bounded(losses, 3.0)
    assert bounded.tolist() == pytest.approx([0.5, 3.0])
    bounded.sum().backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx([1.0, 0.1])


def test_taught_objects_are_remembered_as_they_are() -> None:
    target = torch.zeros(2, 8, 8)
    target[0, :4] = 1
    present = torch.tensor([1.0, 0.0])
    answer = _answer(torch.full((2, 4, 4), -3.0), 1.0)
    kept = train_memory.taught(answer, target, present, torch.tensor([False, False]))
    assert (kept.logits == answer.logits).all()
    assert kept.score.tolist() == [1.0, 1.0]
    both = train_memory.taught(answer, target, present, torch.tensor([True, True]))
    assert both.logits[0, 0, 0] == 10
    assert both.logits[0, 3, 0] == -10
    assert both.score.tolist() == both.pointer_score.tolist() == [10.0, -10.0]


@pytest.mark.slow
def test_a_short_run_learns_resumes_and_leaves_the_image_part_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import Sam2VideoModel

    checkpoint = Path(train_memory.__file__).parent / "checkpoints" / "sam2-demo"
    options = ["--checkpoint", str(checkpoint), "--out", str(tmp_path), "--workers", "1", "--watch", "0"]
    options += ["--frames", "4", "--again", "0", "--steps", "4"]

    def run(*more: str) -> None:
        try:
            train_memory.train(0, train_memory.parse([*options, *more]))
        finally:
            torch.distributed.destroy_process_group()

    run("--stop", "2")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    run("--resume")
    resumed = load_file(tmp_path / "final" / "model.safetensors")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 4
    before = load_file(checkpoint / "model.safetensors")
    assert resumed.keys() == before.keys()
    frozen = [name for name in before if not is_memory(name)]
    assert len(frozen) > 100
    assert all(torch.equal(before[name], resumed[name]) for name in frozen)
    changed = {name for name in before if is_memory(name) and not torch.equal(before[name], resumed[name])}
    for part in ("memory_attention", "memory_encoder", "memory_temporal", "object_pointer_proj", "temporal_"):
        assert any(name.startswith(part) for name in changed), part
    assert json.loads((tmp_path / "final" / "config.json").read_text())["model_type"] == "sam2_video"
    Sam2VideoModel.from_pretrained(tmp_path / "final")
    run()  # without a stop: the same weights
    whole = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-5) for name in whole)
