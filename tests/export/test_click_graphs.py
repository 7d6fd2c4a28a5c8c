"""The graphs of clicks in PyTorch against the mask decoder's wrapper, which parity holds against the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pixano_edge.export.sam2 import checkpoint, click_graphs
from pixano_edge.export.sam2.graphs import MaskDecoder


@pytest.fixture(scope="module")
def decoder(loaded: checkpoint.Checkpoint) -> MaskDecoder:
    return MaskDecoder(loaded.model).eval()


@pytest.fixture(scope="module")
def parts(loaded: checkpoint.Checkpoint) -> dict[str, Any]:
    return {name: module for name, (module, _) in click_graphs.parts(loaded.model, loaded.constants).items()}


@pytest.fixture(scope="module")
def features(loaded: checkpoint.Checkpoint) -> tuple[Tensor, Tensor, Tensor]:
    d, grid = loaded.constants.hidden_dim, loaded.constants.embed_size
    draw = torch.Generator().manual_seed(0)
    sides = ((d, grid), (d // 8, 4 * grid), (d // 4, 2 * grid))
    first, second, third = (torch.randn(1, c, s, s, generator=draw) for c, s in sides)
    return first, second, third


def points(prompts: int, count: int, side: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(count)
    coords = torch.rand(prompts, count, 2, generator=draw) * side
    return coords, torch.randint(-1, 4, (prompts, count), generator=draw, dtype=torch.int32)


def error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("prompts", "count"), [(1, 1), (1, 2), (3, 5), (2, 12)])
def test_clicks_give_the_mask_decoders_answers(
    prompts: int, count: int, decoder: MaskDecoder, parts: dict[str, Any], features: tuple[Tensor, Tensor, Tensor]
) -> None:
    side = decoder.image_size
    coords, labels = points(prompts, count, side)
    blank, none = torch.zeros(prompts, 1, side // 4, side // 4), torch.zeros(prompts)
    want = decoder(*features, coords, labels, blank, none)
    prepared = parts["image_prepare"](*features)
    assert error(parts["click_decoder"](*prepared, coords, labels), want) < 1e-5
    # What was prepared counts, each tensor of it.
    for index in range(len(prepared)):
        wrong = [t.flip(1) if i == index else t for i, t in enumerate(prepared)]
        assert error(parts["click_decoder"](*wrong, coords, labels), want) > 1e-3


@torch.no_grad()
def test_a_mask_prompt_changes_what_was_prepared(
    decoder: MaskDecoder, parts: dict[str, Any], features: tuple[Tensor, Tensor, Tensor]
) -> None:
    side = decoder.image_size
    coords, labels = points(1, 2, side)
    mask = torch.randn(1, 1, side // 4, side // 4, generator=torch.Generator().manual_seed(1)) * 8
    want = decoder(*features, coords, labels, mask, torch.ones(1))
    image = parts["image_prepare"](*features)
    masked = (*parts["mask_prepare"](*image[:4], mask), *image[4:])
    assert error(parts["click_decoder"](*masked, coords, labels), want) < 1e-5
    assert error(parts["click_decoder"](*image, coords, labels), want) > 1e-3


def test_rows_of_one_head_see_no_other() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    spread = click_graphs.spread(x, 4)
    assert spread.shape == (2, 8, 12)
    for head in range(4):
        own = spread[:, 2 * head : 2 * head + 2, 3 * head : 3 * head + 3]
        assert torch.equal(own, x[..., 2 * head : 2 * head + 2].transpose(1, 2))
    assert int((spread != 0).sum()) == x.numel()
    assert torch.equal(click_graphs.collect(spread.transpose(1, 2), 4), x)
