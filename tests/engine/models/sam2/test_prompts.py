"""Prompts: layout of points, corners and padding, grouping, and every malformed one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.contracts.sam2 import MAX_POINTS, Sam2Constants
from pixano_edge.engine.errors import PromptError
from pixano_edge.engine.models.sam2.prompts import Prompt, build_prompts

CONSTANTS = Sam2Constants(image_size=128, hidden_dim=32)
SIZE = (161, 97)  # height, width: a swap shows
MASK = np.ones((32, 32), np.float32)


def one(prompt: Prompt) -> tuple[list[list[float]], list[int]]:
    (batch,) = build_prompts([prompt], SIZE, CONSTANTS)
    assert batch.point_coords.dtype == np.float32
    assert batch.point_labels.dtype == np.int32
    assert batch.sizes == {"P": 1, "N": batch.point_labels.shape[1]}
    return batch.point_coords[0].tolist(), batch.point_labels[0].tolist()


def test_points_are_scaled_and_padded() -> None:
    coords, labels = one(Prompt(points=[[97, 161], [48.5, 0]], labels=[1, 0]))
    assert coords == [[128, 128], [64, 0], [0, 0]]
    assert labels == [1, 0, -1]


def test_labels_default_to_foreground() -> None:
    assert one(Prompt(points=[[1, 2], [3, 4]]))[1] == [1, 1, -1]


def test_labels_may_be_truth_values() -> None:
    assert one(Prompt(points=[[1, 2], [3, 4]], labels=[True, False]))[1] == [1, 0, -1]


def test_box_is_two_corners() -> None:
    coords, labels = one(Prompt(box=[0, 0, 97, 80.5]))
    assert coords == [[0, 0], [128, 64], [0, 0]]
    assert labels == [2, 3, -1]


def test_points_and_box_combine() -> None:
    coords, labels = one(Prompt(points=[[97, 0]], labels=[0], box=[0, 0, 97, 161]))
    assert coords == [[128, 0], [0, 0], [128, 128], [0, 0]]
    assert labels == [0, 2, 3, -1]


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(),
        Prompt(points=[], labels=[]),
        Prompt(points=[], box=[]),
        Prompt(points=np.empty((0, 2))),
        Prompt(mask_input=MASK),
    ],
)
def test_no_prompt_is_two_padding_points(prompt: Prompt) -> None:
    assert one(prompt) == ([[0, 0], [0, 0]], [-1, -1])


def test_grouped_by_number_of_points_in_bounded_batches() -> None:
    prompts = [Prompt(points=[[i, 0]] * (1 + i % 3)) for i in range(20)]
    batches = build_prompts(prompts, (1, 128), CONSTANTS, max_batch=3)
    assert sorted(i for b in batches for i in b.indices) == list(range(20))
    assert max(len(b.indices) for b in batches) == 3
    assert len(batches) == 8  # 7, 7 and 6 prompts with 1, 2 and 3 points
    for batch in batches:
        assert batch.point_labels.shape[1] == 2 + batch.indices[0] % 3
        assert batch.point_coords[:, 0, 0].tolist() == batch.indices
        assert (batch.point_labels[:, -1] == -1).all()
        assert (batch.point_labels[:, :-1] == 1).all()


def test_masks_keep_their_prompt() -> None:
    prompts = [Prompt(points=[[0, 0]]), Prompt(points=[[0, 0]], mask_input=MASK[None] * 2)]
    (batch,) = build_prompts(prompts, SIZE, CONSTANTS)
    assert batch.masks[0] is None
    assert batch.masks[1] is not None
    assert batch.masks[1].shape == (32, 32)
    assert batch.masks[1][0, 0] == 2


def test_points_up_to_one_image_size_outside_pass_unchanged() -> None:
    assert one(Prompt(points=[[-97, 322]]))[0][0] == [-128, 256]


def test_most_points() -> None:
    assert len(one(Prompt(points=[[0, 0]] * (MAX_POINTS - 1)))[1]) == MAX_POINTS


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(points=[[1, 2], [3, 4]], labels=[1]), "2 points but labels"),
        (Prompt(points=[[1, 2]], labels=[1, 0]), "1 points but labels"),
        (Prompt(points=[[1, 2]], labels=[]), "1 points but labels"),
        (Prompt(labels=[1]), "0 points but labels"),
        (Prompt(points=[[1, 2]], labels=[[1]]), "1 points but labels"),
        (Prompt(points=[[1, 2]], labels=[2]), "must be 1"),
        (Prompt(points=[[1, 2]], labels=[-1]), "must be 1"),
        (Prompt(points=[[1, 2]], labels=[0.5]), "must be 1"),
        (Prompt(points=[[1, 2]], labels=[NAN]), "NaN"),
        (Prompt(points=[[1, NAN]]), "NaN"),
        (Prompt(points=[[INF, 2]]), "infinity"),
        (Prompt(points=[1, 2]), "shape"),
        (Prompt(points=[[1, 2, 3]]), "shape"),
        (Prompt(points=[[1, 2], [3]]), "numbers"),
        (Prompt(points=[["a", "b"]]), "numbers"),
        (Prompt(points=[[None, 2]]), "numbers"),
        (Prompt(points=[["1", "2"]]), "not numbers"),
        (Prompt(points=[["1", 2]]), "not numbers"),
        (Prompt(points=[[b"1", b"2"]]), "not numbers"),
        (Prompt(points=[[True, False]]), "not numbers"),
        (Prompt(points=[[1j, 2]]), "not numbers"),
        (Prompt(points=[[1, 2]], labels=["1"]), "not numbers"),
        (Prompt(box=["1", "2", "3", "4"]), "not numbers"),
        (Prompt(box="1234"), "not numbers"),
        (Prompt(points=[[98 * 2, 0]]), "far outside"),
        (Prompt(points=[[0, -162]]), "far outside"),
        (Prompt(points=[[1e30, 1]]), "far outside"),
        (Prompt(points=[[0, 0]] * MAX_POINTS), "decoder takes"),
        (Prompt(box=[1, 2, 3]), "shape"),
        (Prompt(box=[[1, 2, 3, 4]]), "shape"),
        (Prompt(box=[3, 2, 3, 4]), "no area"),
        (Prompt(box=[1, 4, 3, 2]), "no area"),
        (Prompt(box=[1, 2, 3, NAN]), "NaN"),
        (Prompt(box=[0, 0, 97, 400]), "far outside"),
        (Prompt(mask_input=np.ones((31, 32), np.float32)), "mask_input"),
        (Prompt(mask_input=np.ones((2, 32, 32), np.float32)), "mask_input"),
        (Prompt(mask_input=np.ones((32, 32), np.float64)), "mask_input"),  # type: ignore[arg-type]
        (Prompt(mask_input=[[1.0]]), "mask_input"),  # type: ignore[arg-type]
        (Prompt(mask_input=MASK * np.float32(NAN)), "NaN"),
        (Prompt(mask_input=MASK * np.float32(INF)), "NaN or infinity"),
    ],
)
def test_malformed(prompt: Prompt, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        build_prompts([prompt], SIZE, CONSTANTS)
    assert caught.value.action


def test_the_message_names_the_prompt() -> None:
    with pytest.raises(PromptError, match="Prompt 1:"):
        build_prompts([Prompt(), Prompt(box=[0, 0, 0, 0])], SIZE, CONSTANTS)


@pytest.mark.parametrize(("prompts", "batch"), [([], 64), ([Prompt()], 0), ([Prompt()], 257)])
def test_no_prompts_and_bad_batches(prompts: Any, batch: int) -> None:
    with pytest.raises(PromptError):
        build_prompts(prompts, SIZE, CONSTANTS, batch)
