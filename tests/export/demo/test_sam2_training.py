"""Training of the demo's SAM 2 on pictures of half the side: the same prompts, the same targets, only fewer cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")
torch = pytest.importorskip("torch", reason="training needs pixano-edge[export]")
pytest.importorskip("transformers", reason="training needs pixano-edge[export]")

from transformers import Sam2VideoModel  # noqa: E402

from pixano_edge.export.demo import sam2_model as small  # noqa: E402
from pixano_edge.export.demo import train_sam2 as training  # noqa: E402
from pixano_edge.export.demo.prompts import make_batch  # noqa: E402
from pixano_edge.export.demo.surroundings import Surroundings  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = Sam2VideoModel(small.tiny_config())
    small.initialise(made)
    return made.train()


@pytest.mark.parametrize("shrink", [1, 2])
def test_a_step_has_finite_gradients_in_either_size(model: Any, shrink: int) -> None:
    surroundings = Surroundings()
    batch = make_batch(0, 0, 2, 3, small.IMAGE_SIZE)
    model.zero_grad()
    loss = training.step_loss(model, surroundings, batch, 2, 0.0, torch.Generator().manual_seed(0), shrink)
    loss.backward()
    assert torch.isfinite(loss)
    trained = {name: p for name, p in model.named_parameters() if not small.is_memory(name)}
    unused = [name for name, p in trained.items() if p.grad is None]
    assert not [name for name in unused if "neck" not in name], unused
    assert all(torch.isfinite(p.grad).all() for p in trained.values() if p.grad is not None)


def test_features_of_small_pictures_have_cells_twice_as_large(model: Any) -> None:
    pixels = torch.randn(1, 3, small.IMAGE_SIZE, small.IMAGE_SIZE)
    with torch.no_grad():
        whole = small.encode(model, pixels)
        half = small.encode(model, torch.nn.functional.avg_pool2d(pixels, 2))
        again = small.encode(model, pixels)
    assert whole.top.shape[-1] == 2 * half.top.shape[-1] == small.IMAGE_SIZE // 16
    assert half.position.shape[-2:] == half.top.shape[-2:]
    assert torch.equal(whole.position, again.position)
    # A cell's code is that of the point between the four it stands for.
    inner = whole.position.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
    alike = torch.nn.functional.cosine_similarity(inner, half.position, dim=1)
    turned = torch.nn.functional.cosine_similarity(inner, half.position.flip(3), dim=1)
    assert float(alike.mean()) > float(turned.mean()) + 0.3


@pytest.mark.parametrize("cells", [32, 64])
def test_corrections_fall_on_what_is_wrong_in_pixels_of_the_whole_picture(cells: int) -> None:
    wanted = torch.zeros(1, 1, cells, cells)
    wanted[..., cells // 2 :, :] = 1
    logits = torch.where(wanted > 0, 1.0, -1.0)
    logits[..., : cells // 4, : cells // 4] = 1.0  # too much, above on the left
    points, labels = training.correction(logits, wanted, torch.Generator().manual_seed(0))
    x, y = points[0, 0, 0].tolist()
    assert labels.item() == 0
    assert min(x, y) >= -0.5
    assert max(x, y) < small.IMAGE_SIZE / 4


def test_the_loss_of_a_mask_does_not_depend_on_the_size_of_the_picture() -> None:
    y, x = np.mgrid[:128, :128]
    disc = torch.from_numpy((np.hypot(x - 60, y - 60) < 30).astype(np.float32))[None, None]
    logits = 4 * (torch.roll(disc, 6, 3) - 0.5)
    pool = torch.nn.functional.avg_pool2d
    whole, half = training.mask_loss(logits, disc), training.mask_loss(pool(logits, 2), pool(disc, 2))
    assert float(whole) == pytest.approx(float(half), rel=0.1)
