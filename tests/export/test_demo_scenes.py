"""Synthetic scenes: deterministic, split by texture, difficult in the stated ways, and consistent with their masks."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("skimage", reason="scenes use the photographs of the scikit-image wheel")

from pixano_edge.export.demo import baselines, scenes, textures

COUNT = 40


@pytest.fixture(scope="module")
def held_out() -> list[scenes.Scene]:
    return [scenes.generate_scene(seed, "heldout") for seed in range(COUNT)]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_same_seed_same_scene(split: textures.Split) -> None:
    a, b = scenes.generate_scene(11, split), scenes.generate_scene(11, split)
    assert a.image.tobytes() == b.image.tobytes()
    assert [(o.shape, o.color, o.pattern, o.box) for o in a.objects] == [
        (o.shape, o.color, o.pattern, o.box) for o in b.objects
    ]
    assert all((p.visible == q.visible).all() for p, q in zip(a.objects, b.objects))


def test_seeds_and_splits_differ() -> None:
    images = [scenes.generate_scene(s, split).image.tobytes() for s in (0, 1) for split in ("train", "heldout")]
    assert len(set(images)) == 4


def test_splits_share_no_photograph_and_no_noise() -> None:
    for table in (textures.PHOTOS, textures.NOISES):
        assert not set(table["train"]) & set(table["heldout"])


def test_textures_stay_in_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    load, noise = textures.load_photo, textures.noise_field
    monkeypatch.setattr(textures, "load_photo", lambda name: (seen.add(name), load(name))[1])
    monkeypatch.setattr(textures, "noise_field", lambda rng, kind, h, w: (seen.add(kind), noise(rng, kind, h, w))[1])
    for seed in range(COUNT):
        scenes.generate_scene(seed, "heldout")
    allowed = {*textures.PHOTOS["heldout"], *textures.NOISES["heldout"]}
    assert seen <= allowed
    assert len(seen) > len(allowed) // 2


def test_masks_agree_with_boxes_and_each_other(held_out: list[scenes.Scene]) -> None:
    for scene in held_out:
        assert scene.image.shape == (scenes.SIZE, scenes.SIZE, 3)
        assert scene.image.dtype == np.uint8
        total = np.zeros(scene.image.shape[:2], int)
        for obj in scene.objects:
            assert not (obj.visible & ~obj.amodal).any()
            total += obj.visible
            if obj.visible.any():
                ys, xs = np.nonzero(obj.visible)
                assert obj.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            else:
                assert obj.box == (0, 0, 0, 0)
        assert total.max() <= 1
        assert (scene.objects[-1].visible == scene.objects[-1].amodal).all()


def test_scenes_are_difficult(held_out: list[scenes.Scene]) -> None:
    objects = [o for s in held_out for o in s.objects]
    occluded = [o for o in objects if 0 < o.visible.sum() < 0.9 * o.amodal.sum()]
    assert len(occluded) > 0.1 * len(objects)
    alike = sum(
        any((a.color, a.pattern) == (b.color, b.pattern) and _touch(a, b) for b in s.objects[:i])
        for s in held_out
        for i, a in enumerate(s.objects)
    )
    assert alike > 0.05 * len(objects)
    assert {o.shape for o in objects} == set(scenes.SHAPES)
    assert {o.pattern for o in objects} == set(textures.PATTERNS)
    assert {o.color for o in objects} == set(textures.COLORS)
    evaluated = [s.objects[p.index] for s in held_out for p in scenes.held_out_prompts(s)]
    assert sum(o.visible.mean() < 0.015 for o in evaluated) > 0.05 * len(evaluated)
    assert sum(o.shape == "bar" for o in evaluated) > 0.03 * len(evaluated)


def _touch(a: scenes.SceneObject, b: scenes.SceneObject) -> bool:
    ax0, ay0, ax1, ay1 = a.box
    bx0, by0, bx1, by1 = b.box
    return ax0 <= bx1 and bx0 <= ax1 and ay0 <= by1 and by0 <= ay1


def test_prompts_lie_on_their_objects(held_out: list[scenes.Scene]) -> None:
    for scene in held_out:
        prompts = scenes.held_out_prompts(scene)
        assert prompts == scenes.held_out_prompts(scene)
        for prompt in prompts:
            obj = scene.objects[prompt.index]
            x, y = prompt.click
            assert obj.visible[y, x]
            assert prompt.box == obj.box
            assert obj.visible.sum() >= scenes.MIN_VISIBLE_PIXELS
        skipped = set(range(len(scene.objects))) - {p.index for p in prompts}
        assert all(not scenes.is_evaluated(scene.objects[i]) for i in skipped)


def test_centre_click_of_a_rectangle_is_its_middle() -> None:
    mask = np.zeros((40, 60), bool)
    mask[10:21, 20:51] = True
    x, y = scenes.centre_click(mask)
    assert y == 15
    assert 25 <= x <= 45


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_shape_covers_its_place(shape: str) -> None:
    place = scenes.Placement(x=64, y=64, half_width=40, half_height=40)
    coverage = scenes.rasterise(shape, place, 128, 128)
    x0, y0, x1, y1 = scenes.mask_box(coverage > 127)
    assert 20 <= x0 <= 40
    assert 88 <= x1 <= 108
    assert 20 <= y0 <= 40
    assert 88 <= y1 <= 108
    assert 0 < (coverage > 0).sum() - (coverage == 255).sum() < 0.4 * (coverage > 0).sum()


def test_shape_turns_with_its_placement() -> None:
    bar = scenes.Placement(x=64, y=64, half_width=40, half_height=4)
    turned = scenes.Placement(x=64, y=64, half_width=40, half_height=4, angle=np.pi / 2)
    flat, upright = (scenes.rasterise("bar", p, 128, 128) > 127 for p in (bar, turned))
    assert (flat.T & upright).sum() / (flat.T | upright).sum() > 0.85


def test_size_scales_the_scene() -> None:
    scene = scenes.generate_scene(3, "train", size=128)
    assert scene.image.shape == (128, 128, 3)
    assert scene.objects[0].visible.shape == (128, 128)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape"):
        scenes.shape_contours("spiral")
    with pytest.raises(ValueError, match="unknown noise"):
        textures.noise_field(np.random.default_rng(0), "static", 8, 8)


@pytest.mark.parametrize("method", [baselines.flood_fill, baselines.grabcut])
def test_baselines_solve_an_easy_picture(method: object) -> None:
    image = np.full((192, 192, 3), 40, np.uint8)
    image[60:120, 72:140] = (220, 60, 50)
    wanted = np.zeros((192, 192), bool)
    wanted[60:120, 72:140] = True
    for prompt in ({"click": (104, 90)}, {"box": (68, 56, 144, 124)}):
        mask = method(image, **prompt)  # type: ignore[operator]
        assert mask.dtype == bool
        assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9
    with pytest.raises(ValueError, match="exactly one"):
        method(image)  # type: ignore[operator]
