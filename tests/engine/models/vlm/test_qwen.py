"""Qwen2.5-VL through the same decoder session: its processor, positions in three directions, transformers' tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts.decoder import DecoderConstants
from pixano_edge.engine.contracts.qwen2_5_vl import QwenVlConstants
from pixano_edge.engine.errors import ImageError, PromptError
from pixano_edge.engine.models.decoder.base import GenerationOptions
from pixano_edge.engine.models.decoder.opening import open_vlm
from pixano_edge.engine.models.qwen2_5_vl import preprocess
from pixano_edge.engine.models.qwen2_5_vl.model import Qwen2_5VlModel
from pixano_edge.engine.models.qwen2_5_vl.preprocess import patches, resized_size, rope_positions, windows
from pixano_edge.engine.models.smolvlm.preprocess import Normaliser
from pixano_edge.engine.models.text.messages import read_conversation
from tests.support.vlm import picture

TOKENS = 64
BAR = 1e-3
SIZES = [(1, 1), (1, 150), (37, 91), (300, 301), (480, 640), (1000, 7), (1023, 511)]


def constants(patch: int, least: int, most: int) -> QwenVlConstants:
    decoder = DecoderConstants(2, 4, 2, 16, 64, 400, 512, "mrope", (1,))
    means = ((0.48, 0.45, 0.40), (0.26, 0.26, 0.27))
    return QwenVlConstants(decoder, patch, 2, 2, 4, least, most, "bicubic", 1 / 255, *means, "<x>", 3)


@pytest.mark.parametrize("c", [constants(14, 56 * 56, 1280 * 28 * 28), constants(4, 64, 4096)])
@pytest.mark.parametrize("size", SIZES)
def test_patches_are_those_of_transformers(c: QwenVlConstants, size: tuple[int, int]) -> None:
    from transformers import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": c.min_pixels, "longest_edge": c.max_pixels}, patch_size=c.patch_size,
        image_mean=list(c.mean), image_std=list(c.std),
    )  # fmt: skip
    image = picture(*size)
    want = processor([image], return_tensors="np", input_data_format="channels_last")
    normaliser = Normaliser(c.mean, c.std, c.rescale)
    np.testing.assert_array_equal(patches(image, c, normaliser).reshape(-1, c.patch_channels), want["pixel_values"])
    made = windows(image, c, normaliser)
    ordered = made.pixels.reshape(-1, 4, c.patch_channels)[made.order].reshape(-1, c.patch_channels)
    np.testing.assert_array_equal(ordered, want["pixel_values"])
    _, high, wide = want["image_grid_thw"][0]
    assert resized_size(*size, c) == (high * c.patch_size, wide * c.patch_size)
    positions = made.positions.reshape(-1, 4, 2)[made.order].reshape(-1, 2)
    assert len({tuple(p) for p in positions.tolist()}) == high * wide
    assert made.valid.sum() == high * wide
    assert not made.pixels[made.valid == 0].any()


def test_too_thin() -> None:
    with pytest.raises(ImageError, match="too thin"):
        resized_size(1, 201, constants(14, 3136, 1003520))


def test_positions_are_those_of_transformers() -> None:
    from types import SimpleNamespace

    import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    fake = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    fake.get_vision_position_ids = lambda *a, **k: Qwen2_5_VLModel.get_vision_position_ids(fake, *a, **k)
    grids, starts = [(3, 5), (1, 1), (7, 2)], [4, 21, 23]
    length = starts[-1] + 14 + 6
    kinds = torch.zeros(1, length, dtype=torch.int)
    for start, (rows, columns) in zip(starts, grids):
        kinds[0, start : start + rows * columns] = 1
    sizes = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
    want, delta = Qwen2_5_VLModel.get_rope_index(fake, torch.zeros(1, length, dtype=torch.long), kinds, sizes)
    got, following = rope_positions(length, starts, grids)
    np.testing.assert_array_equal(got, want[:, 0].numpy())
    assert following == length + int(delta)
    got, following = rope_positions(5, [], [])
    np.testing.assert_array_equal(got, np.arange(5)[None].repeat(3, 0))
    assert following == 5


@pytest.fixture
def model(qwen_bundle: Path) -> Iterator[Any]:
    with open_vlm(qwen_bundle, device="cpu", threads=1) as found:
        assert isinstance(found, Qwen2_5VlModel)
        yield found


@pytest.fixture(scope="module")
def ask(qwen_folder: Path) -> Any:
    """Answers of transformers: prompt ids, answer ids, logits of each step."""
    import torch

    from pixano_edge.export.qwen2_5_vl.checkpoint import load

    loaded = load(qwen_folder)

    def run(question: str, images: list[np.ndarray], tokens: int) -> Any:
        said = [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": question}]}]
        text = loaded.text.apply_chat_template(
            said, chat_template=loaded.template, add_generation_prompt=True, tokenize=False
        )
        c, given = loaded.constants, {}
        if images:
            made = loaded.images(images, return_tensors="pt", input_data_format="channels_last")
            parts = text.split(c.image_token)
            counts = [int(grid.prod()) // c.merge_size**2 for grid in made["image_grid_thw"]]
            text = "".join(part + c.image_token * count for part, count in zip(parts, [*counts, 0]))
            given = dict(made)
        ids = torch.tensor([loaded.text(text)["input_ids"]])
        if images:
            given["mm_token_type_ids"] = (ids == c.image_token_id).int()
        loaded.model.model.rope_deltas = None
        with torch.no_grad():
            found = loaded.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True, **given,
            )  # fmt: skip
        return ids[0].numpy(), found.sequences[0, -tokens:].numpy(), torch.cat(found.logits).float().numpy()

    return run


def worst(model: Any, conversation: Any, images: Any, tokens: Any, logits: Any) -> float:
    found = list(model.logits(conversation, images, tokens[:-1].tolist()))
    return max(float(np.abs(got - want).max() / np.abs(want).max()) for got, want in zip(found, logits))


@pytest.mark.parametrize("sizes", [[], [(50, 97)], [(70, 40), (33, 33)], [(5, 120)]])
def test_tokens_and_logits_are_those_of_transformers(model: Any, ask: Any, sizes: list[tuple[int, int]]) -> None:
    images = [picture(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    conversation = read_conversation("What is on this image?", images)
    ids, tokens, logits = ask("What is on this image?", images, TOKENS)
    np.testing.assert_array_equal(model.prepare(conversation, images).ids, ids)
    assert len(set(tokens.tolist())) > 5, "the answer repeats itself, which would hide mistakes"
    got = list(model.logits(conversation, images, tokens[:-1].tolist()))
    assert [int(step.argmax()) for step in got] == tokens.tolist()
    assert max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, logits)) < BAR
    answer = model.generate(conversation, images, GenerationOptions(TOKENS, go_on=True))
    assert answer.text == model.tokenizer.decode(tokens.tolist())


def test_a_kept_prefix_changes_nothing(qwen_bundle: Path, model: Any) -> None:
    images = [picture(50, 97), picture(30, 30, 1)]
    first = model.generate(read_conversation("What is it?", images), images, GenerationOptions(20))
    second = model.generate(read_conversation("Where is it?", images), images, GenerationOptions(20))
    assert (first.images_encoded, second.images_encoded) == (2, 0)
    assert second.usage.reused > 40
    with open_vlm(qwen_bundle, device="cpu", threads=1) as fresh:
        again = fresh.generate(read_conversation("Where is it?", images), images, GenerationOptions(20))
    assert again.text == second.text
    assert again.usage.reused == 0


def test_wrong_positions_show(model: Any, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(50, 97)]
    conversation = read_conversation("What?", images)
    _, tokens, logits = ask("What?", images, 6)
    assert worst(model, conversation, images, tokens, logits) < BAR

    def plain(length: int, starts: Any, grids: Any) -> Any:
        return rope_positions(length, [], [])

    def swapped(length: int, starts: Any, grids: Any) -> Any:
        found, following = rope_positions(length, starts, grids)
        return np.ascontiguousarray(found[[0, 2, 1]]), following

    def late(length: int, starts: Any, grids: Any) -> Any:
        found, _ = rope_positions(length, starts, grids)
        return found, length  # the answer at its slots

    for wrong in (plain, swapped, late):
        monkeypatch.setattr("pixano_edge.engine.models.qwen2_5_vl.model.rope_positions", wrong)
        assert worst(model, conversation, images, tokens, logits) > 3 * BAR, wrong.__name__


def test_swapped_units_show(model: Any, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(50, 97)]
    conversation = read_conversation("What?", images)
    _, tokens, logits = ask("What?", images, 6)

    def swapped(*args: Any) -> Any:
        found = patches(*args)
        return np.concatenate([found[1:2], found[:1], found[2:]])

    monkeypatch.setattr(preprocess, "patches", swapped)
    assert worst(model, conversation, images, tokens, logits) > 10 * BAR


def test_bad_input(model: Any) -> None:
    with pytest.raises(ImageError, match="too thin"):
        model.generate(read_conversation("x", ["a"]), [np.zeros((1, 300, 3), np.uint8)])
    with pytest.raises(PromptError, match="context"):
        model.generate(read_conversation("x", ["a"] * 20), [picture(64, 64)] * 20, GenerationOptions(5))
