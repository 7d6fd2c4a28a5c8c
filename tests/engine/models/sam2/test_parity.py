"""The whole pipeline, file to mask, against transformers' stock `Sam2Model` on real photos.

The reference shares nothing with the engine: torch's own antialiased resize, the stock forward with its boxes, its
padding and its stability fallback, torch's upscaling. Weights are random but sharpened, so that every input matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.rle import encode_rle
from pixano_edge.engine.models.sam2.postprocess import LOGIT_CLAMP
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor, Sam2Prediction
from pixano_edge.engine.models.sam2.prompts import Prompt, PromptBatch, build_prompts
from tests.support.make_preprocess_reference import torch_reference

torch = pytest.importorskip("torch", reason="parity needs PyTorch")

REL = 1e-4
IOU = 0.999

# Views of the photo: as it is, portrait (161 x 97), odd sizes, a single row, smaller than the mask.
VIEWS = {
    "960x540": (slice(None), slice(None)),
    "97x161": (slice(200, 361), slice(300, 397)),
    "601x333": (slice(50, 383), slice(101, 702)),
    "61x23": (slice(300, 323), slice(400, 461)),
    "300x1": (slice(300, 301), slice(400, 700)),
}


@dataclass(frozen=True)
class Stock:
    """What the stock model answers to one prompt: masks (M, H, W) bool, scores (M,), logits (M, m, m)."""

    masks: Any
    scores: Any
    logits: Any


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    from transformers import Sam2Model

    torch.set_num_threads(1)
    return Sam2Model.from_pretrained(tiny_checkpoint).eval()


@pytest.fixture(scope="module")
def predictor(tiny_bundle: Path) -> Iterator[Sam2ImagePredictor]:
    with Sam2ImagePredictor.open(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def photo(bedroom: Path) -> Any:
    return decode_image(bedroom / "00000.jpg")


def view(photo: Any, name: str) -> Any:
    return np.ascontiguousarray(photo[VIEWS[name]])


def prompts_for(image: Any, mask: Any) -> dict[str, Prompt]:
    h, w = image.shape[:2]
    click, other, third = [0.31 * w, 0.62 * h], [0.71 * w, 0.43 * h], [0.55 * w, 0.12 * h]
    box = [0.15 * w, 0.2 * h, 0.8 * w, 0.9 * h]
    return {
        "click": Prompt(points=[click]),
        "background click": Prompt(points=[click], labels=[0]),
        "three clicks": Prompt(points=[click, other, third], labels=[1, 0, 1]),
        "outside": Prompt(points=[[-0.2 * w, 1.3 * h]]),
        "box": Prompt(box=box),
        "box and clicks": Prompt(points=[click, other], labels=[1, 0], box=box),
        "mask and click": Prompt(points=[other], mask_input=mask),
        "mask": Prompt(mask_input=mask[None]),
        "nothing": Prompt(),
    }


def logits_like(side: int) -> Any:
    y, x = np.mgrid[:side, :side] / side
    return (20 * np.sin(5 * x + 3 * y * y)).astype(np.float32)


@torch.no_grad()
def stock_features(model: Any, image: Any, constants: Any) -> list[Any]:
    pixels = torch.from_numpy(torch_reference(image, constants.image_size, constants.mean, constants.std))
    return model(pixel_values=pixels).image_embeddings


@torch.no_grad()
def ask_stock(model: Any, features: list[Any], prompt: Prompt, size: tuple[int, int], multimask: bool) -> Stock:
    side = model.prompt_encoder.input_image_size
    scale = torch.tensor([side / size[1], side / size[0]])
    inputs: dict[str, Any] = {}
    if prompt.points is not None:
        inputs["input_points"] = (torch.tensor(prompt.points) * scale)[None, None]
        if prompt.labels is not None:
            inputs["input_labels"] = torch.tensor(prompt.labels)[None, None]
    if prompt.box is not None:
        inputs["input_boxes"] = (torch.tensor(prompt.box).reshape(2, 2) * scale).reshape(1, 1, 4)
    if prompt.mask_input is not None:
        inputs["input_masks"] = torch.from_numpy(prompt.mask_input.reshape(1, 1, side // 4, side // 4))
    out = model(image_embeddings=list(features), multimask_output=multimask, **inputs)
    large = torch.nn.functional.interpolate(out.pred_masks[0], size, mode="bilinear", align_corners=False)
    return Stock((large > 0)[0].numpy(), out.iou_scores[0, 0].numpy(), out.pred_masks[0, 0].numpy())


def relative(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def iou(a: Any, b: Any) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def differences(got: Sam2Prediction, want: Stock) -> tuple[float, float, float]:
    """Relative error of the logits and of the scores, and the worst mask IoU."""
    assert got.low_res_logits is not None
    clamped = np.clip(want.logits, -LOGIT_CLAMP, LOGIT_CLAMP)
    worst = min(iou(a, b) for a, b in zip(got.masks[0], want.masks, strict=True))
    return relative(got.low_res_logits[0], clamped), relative(got.scores[0], want.scores), worst


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("multimask", [True, False])
def test_matches_the_stock_model(
    predictor: Sam2ImagePredictor, model: Any, photo: Any, name: str, multimask: bool
) -> None:
    image = view(photo, name)
    size = image.shape[:2]
    features = stock_features(model, image, predictor.constants)
    seen = 0
    for what, prompt in prompts_for(image, logits_like(predictor.constants.mask_size)).items():
        got = predictor.predict(image, [prompt], multimask=multimask, return_logits=True)
        want = ask_stock(model, features, prompt, size, multimask)
        logits, scores, worst = differences(got, want)
        assert logits <= REL, what
        assert scores <= REL, what
        assert worst >= IOU, what
        assert got.masks.shape == (1, 3 if multimask else 1, *size)
        seen += bool(0.01 < want.masks.mean() < 0.99)
    assert seen >= 4  # empty or full masks would agree whatever the engine did


def test_the_fallback_is_exercised(predictor: Sam2ImagePredictor, photo: Any) -> None:
    image = view(photo, "960x540")
    prompts = list(prompts_for(image, logits_like(predictor.constants.mask_size)).values())
    picks = predictor.predict(image, prompts, multimask=False).mask_indices
    assert (picks > 0).any()


def test_controls_would_be_caught(predictor: Sam2ImagePredictor, model: Any, photo: Any) -> None:
    image = view(photo, "97x161")
    h, w = size = image.shape[:2]
    side = predictor.constants.image_size
    half = np.array([0.5 * w / side, 0.5 * h / side])
    points = np.array([[0.31 * w, 0.62 * h], [0.71 * w, 0.43 * h]])
    prompt = Prompt(points=points.tolist(), labels=[1, 0])
    want = ask_stock(model, stock_features(model, image, predictor.constants), prompt, size, True)
    embedding = predictor.encode(image)
    embed, high = embedding.image_embed, list(embedding.high_res)
    transposed = np.ascontiguousarray(image.transpose(1, 0, 2))
    mistakes: dict[str, tuple[Any, Prompt]] = {
        "BGR": (image[:, :, ::-1], prompt),
        "half a model pixel off": (image, Prompt(points=points + half, labels=[1, 0])),
        "labels flipped": (image, Prompt(points=points, labels=[0, 1])),
        "x and y swapped": (image, Prompt(points=points[:, ::-1].copy(), labels=[1, 0])),
        "one pixel to the right": (np.roll(image, 1, axis=1), prompt),
        "second point dropped": (image, Prompt(points=points[:1], labels=[1])),
        "no high-resolution features": (
            predictor.embedding_from_arrays(embed, [high[0] * 0, high[1] * 0], size),
            prompt,
        ),
        # The two maps have different shapes, so what can be swapped is the order within each.
        "high-resolution channels reversed": (
            predictor.embedding_from_arrays(embed, [f[:, ::-1] for f in high], size),
            prompt,
        ),
        "high-resolution rows and columns swapped": (
            predictor.embedding_from_arrays(embed, [f.transpose(0, 1, 3, 2) for f in high], size),
            prompt,
        ),
        "no no-memory embedding": (
            predictor.embedding_from_arrays(
                embed - model.no_memory_embedding.detach().numpy()[..., None].reshape(1, -1, 1, 1), high, size
            ),
            prompt,
        ),
    }
    right = differences(predictor.predict(image, [prompt], return_logits=True), want)
    assert right[0] <= REL
    for what, (source, wrong) in mistakes.items():
        logits, _, worst = differences(predictor.predict(source, [wrong], return_logits=True), want)
        assert logits > 10 * REL, what
        assert worst < IOU, what  # each one is visible in the masks too, not in the logits alone
    sideways = predictor.predict(transposed, [Prompt(points=points[:, ::-1].copy(), labels=[1, 0])])
    assert iou(sideways.masks[0, 0].T, want.masks[0]) < IOU


def test_portrait_masks_survive_run_length_encoding(predictor: Sam2ImagePredictor, model: Any, photo: Any) -> None:
    image = view(photo, "97x161")
    prompt = Prompt(points=[[30.0, 100.0]])
    want = ask_stock(model, stock_features(model, image, predictor.constants), prompt, (161, 97), True)
    for got, expected in zip(predictor.predict(image, [prompt]).masks[0], want.masks):
        rle = encode_rle(got)
        assert rle["size"] == [161, 97]
        assert iou(coco.decode(rle).astype(bool), expected) >= IOU


def test_batched_and_ragged_prompts_equal_prompts_alone(predictor: Sam2ImagePredictor, photo: Any) -> None:
    image = view(photo, "960x540")
    prompts = list(prompts_for(image, logits_like(predictor.constants.mask_size)).values())
    together = predictor.predict(image, prompts, return_logits=True)
    assert together.low_res_logits is not None
    for index, prompt in enumerate(prompts):
        alone = predictor.predict(image, [prompt], return_logits=True)
        assert alone.low_res_logits is not None
        assert relative(together.low_res_logits[index], alone.low_res_logits[0]) <= REL
        assert np.abs(together.scores[index] - alone.scores[0]).max() <= REL


def test_padding_a_ragged_batch_would_change_the_answer(predictor: Sam2ImagePredictor, photo: Any) -> None:
    """Why prompts are grouped by their number of points: a padding point is a token, not a blank."""
    embedding = predictor.encode(view(photo, "960x540"))
    (batch,) = build_prompts([Prompt(points=[[300, 200]])], embedding.original_size, predictor.constants)
    padded = PromptBatch(
        batch.indices,
        np.concatenate([batch.point_coords, np.zeros((1, 1, 2), np.float32)], axis=1),
        np.concatenate([batch.point_labels, np.full((1, 1), -1, np.int32)], axis=1),
        batch.masks,
    )
    with predictor.decode(embedding, batch) as raw:
        plain = raw.masks.copy()
    with predictor.decode(embedding, padded) as raw:
        assert relative(raw.masks, plain) > 10 * REL


def test_upstream_order_of_box_and_points_gives_the_same(predictor: Sam2ImagePredictor, photo: Any) -> None:
    """Upstream puts the corners first, transformers the points: the decoder does not care."""
    embedding = predictor.encode(view(photo, "960x540"))
    prompt = Prompt(points=[[300, 200]], box=[100, 100, 700, 400])
    (batch,) = build_prompts([prompt], embedding.original_size, predictor.constants)
    order = [1, 2, 0, 3]
    moved = PromptBatch(
        batch.indices,
        np.ascontiguousarray(batch.point_coords[:, order]),
        np.ascontiguousarray(batch.point_labels[:, order]),
        batch.masks,
    )
    with predictor.decode(embedding, batch) as raw:
        plain = raw.masks.copy()
    with predictor.decode(embedding, moved) as raw:
        assert relative(raw.masks, plain) <= REL


def test_logits_as_the_next_mask_input(predictor: Sam2ImagePredictor, model: Any, photo: Any) -> None:
    """A second click with the first answer's logits, as the labelling tool sends it."""
    image = view(photo, "601x333")
    size = image.shape[:2]
    first = predictor.predict(image, [Prompt(points=[[200.0, 150.0]])], return_logits=True)
    assert first.low_res_logits is not None
    best = first.low_res_logits[0, int(first.scores[0].argmax())]
    prompt = Prompt(points=[[200.0, 150.0], [400.0, 100.0]], labels=[1, 0], mask_input=best)
    got = predictor.predict(image, [prompt], multimask=False, return_logits=True)
    want = ask_stock(model, stock_features(model, image, predictor.constants), prompt, size, False)
    logits, _, worst = differences(got, want)
    assert logits <= REL
    assert worst >= IOU
