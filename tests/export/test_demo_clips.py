"""Synthetic clips: deterministic, moving, crossing and hiding, with masks that belong to their frames."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("skimage", reason="clips use the photographs of the scikit-image wheel")

from pixano_edge.export.demo import clips, scenes, textures, track_baselines

COUNT = 16


@pytest.fixture(scope="module")
def held_out() -> list[clips.Clip]:
    return [clips.generate_clip(seed, "heldout") for seed in range(COUNT)]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_same_seed_same_clip(split: textures.Split) -> None:
    a, b = (clips.generate_clip(5, split, length=4) for _ in range(2))
    assert a.images.tobytes() == b.images.tobytes()
    assert a.labels.tobytes() == b.labels.tobytes()


def test_seeds_and_splits_differ() -> None:
    frames = {clips.generate_clip(s, split, 1).images.tobytes() for s in (0, 1) for split in ("train", "heldout")}
    assert len(frames) == 4


def test_a_frame_does_not_depend_on_the_others(held_out: list[clips.Clip]) -> None:
    clip = held_out[3]
    image, labels = clip.script.render(41)
    assert (image == clip.images[41]).all()
    assert (labels == clip.labels[41]).all()
    assert (clip.script.labels(41) == labels).all()
    assert (clips.render(clip.script, [41, 7]).images[1] == clip.images[7]).all()


def test_textures_stay_in_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    load, noise = textures.load_photo, textures.noise_field
    monkeypatch.setattr(textures, "load_photo", lambda name: (seen.add(name), load(name))[1])
    monkeypatch.setattr(textures, "noise_field", lambda rng, kind, h, w: (seen.add(kind), noise(rng, kind, h, w))[1])
    for seed in range(60):
        clips.make_script(seed, "heldout")
    allowed = {*textures.PHOTOS["heldout"], *textures.NOISES["heldout"]}
    assert seen <= allowed
    assert len(seen) > len(allowed) // 2


def test_shapes_and_dtypes(held_out: list[clips.Clip]) -> None:
    clip = held_out[0]
    assert clip.images.shape == (clips.LENGTH, scenes.SIZE, scenes.SIZE, 3)
    assert clip.images.dtype == np.uint8
    assert clip.labels.shape == clip.images.shape[:3]
    assert clip.labels.max() < len(clip.script.actors)
    assert (clip.visible(0) == (clip.labels == 0)).all()


def test_labels_belong_to_the_picture() -> None:
    """Where a plain object shows, the picture has about its colour; in the neighbouring frames' masks less so."""
    found = 0
    for seed in range(40):
        script = clips.make_script(seed, "train")
        plain = [i for i, a in enumerate(script.actors) if a.pattern == "plain"]
        if not plain:
            continue
        (image, labels), (_, later) = script.render(0), script.render(12)
        for index in plain:
            colour = script.actors[index].texture.mean((0, 1))
            here, there = labels == index, (later == index) & (labels != index)
            if here.sum() < 400 or there.sum() < 400:
                continue
            found += 1
            wrong = [np.abs(image[mask].astype(float) - colour).mean() for mask in (here, there)]
            assert wrong[0] < 60, (seed, index, wrong)
            assert wrong[0] < wrong[1], (seed, index, wrong)
    assert found > 5


def test_clips_are_difficult(held_out: list[clips.Clip]) -> None:
    tracks = [clip.visible(p.index) for clip in held_out for p in clips.first_prompts(clip)]
    assert len(tracks) > 2 * COUNT
    areas = np.array([t.sum((1, 2)) for t in tracks])
    stay = [(t[0] & t[-1]).sum() / max((t[0] | t[-1]).sum(), 1) for t in tracks]
    assert np.median(stay) < 0.3  # they move away from where they were
    assert (areas.min(1) < 0.5 * areas.max(1)).mean() > 0.4  # and are partly hidden, or turn up from behind another
    gone = [(a == 0) & (np.arange(len(a)) > 0) for a in areas]
    assert sum(g.sum() >= 3 for g in gone) >= 2  # some hidden entirely, for a while
    assert any(g.any() and a[-1] > 0 for g, a in zip(gone, areas))  # and seen again
    panning = [clip.script.pan != (0.0, 0.0) for clip in held_out]
    assert 0 < sum(panning) < COUNT


def test_steps_are_small(held_out: list[clips.Clip]) -> None:
    """A course has no jumps, also where it bounces and where it meets another."""
    for clip in held_out:
        for actor in clip.script.actors:
            places = [actor.course.at(t, scenes.SIZE) for t in range(clips.LENGTH)]
            steps = [np.hypot(b.x - a.x, b.y - a.y) for a, b in itertools.pairwise(places)]
            assert max(steps) < 7
            assert all(0 < p.x < scenes.SIZE and 0 < p.y < scenes.SIZE for p in places)


def test_bounce_folds() -> None:
    assert [clips.bounce(x, 0, 10) for x in (3, 10, 12, 20, 23, -4)] == [3, 10, 8, 0, 3, 4]


def test_prompts_lie_on_their_objects(held_out: list[clips.Clip]) -> None:
    for clip in held_out:
        prompts = clips.first_prompts(clip)
        assert prompts == clips.first_prompts(clip)
        for prompt in prompts:
            mask = clip.labels[0] == prompt.index
            x, y = prompt.click
            assert mask[y, x]
            assert prompt.box == scenes.mask_box(mask)
            assert mask.sum() >= scenes.MIN_VISIBLE_PIXELS


def test_size_scales_the_clip() -> None:
    small, large = (clips.make_script(3, "train", size=size) for size in (128, 256))
    a, b = small.actors[0].course.at(9, 128), large.actors[0].course.at(9, 256)
    assert (2 * a.x, 2 * a.y, 2 * a.half_width) == pytest.approx((b.x, b.y, b.half_width))


def test_flow_follows_what_moves_and_a_copy_does_not() -> None:
    rng = np.random.default_rng(0)
    surface = (rng.random((24, 24, 3)) * 255).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    frames, truth = [], []
    for t in range(12):
        frame = np.full((160, 240, 3), 90, np.uint8)
        frame[30:90, 20 + 4 * t : 80 + 4 * t] = surface[:60, :60]
        frames.append(frame)
        mask = np.zeros((160, 240), bool)
        mask[30:90, 20 + 4 * t : 80 + 4 * t] = True
        truth.append(mask)
    flow = track_baselines.warped(truth[0], track_baselines.flow_maps(frames))
    kept = track_baselines.copies(truth[0], len(frames))
    assert len(flow) == len(kept) == len(frames)

    def last(masks: list[np.ndarray]) -> float:
        return float((masks[-1] & truth[-1]).sum() / (masks[-1] | truth[-1]).sum())

    assert (flow[0] == truth[0]).all()
    assert last(flow) > 0.85
    assert last(kept) < 0.3
