"""Exported graphs against the stock forward, and proof that the comparison notices mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.export import fp16
from pixano_edge.export.differences import Worst
from pixano_edge.export.sam2 import graphs, parity, reference
from pixano_edge.export.sam2.checkpoint import Checkpoint

from .conftest import torch_runner

OUTPUTS = (contract.MASKS, contract.IOU_SCORES, contract.OBJECT_SCORE_LOGITS)


def relative(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def cases_for(
    kind: str, prompts: int, points: int, size: tuple[int, int], constants: contract.Sam2Constants
) -> list[reference.PromptCase]:
    """Seeded prompts; masks are given to every other prompt so that one call mixes both."""
    rng = np.random.default_rng(prompts * 10 + points)
    side = constants.mask_size

    def one(index: int) -> reference.PromptCase:
        coords = (rng.uniform(0, 1, (points, 2)) * (size[1], size[0])).astype(np.float32)
        labels = rng.integers(0, 2, points).astype(np.int32)
        x, y = np.sort(rng.uniform(0, 1, (2, 2)), axis=1) * np.array([[size[1]], [size[0]]])
        box = np.array([x[0], y[0], x[1], y[1]], np.float32)
        mask = rng.normal(0, 6, (side, side)).astype(np.float32)
        return reference.PromptCase(
            kind,
            coords if "points" in kind else np.zeros((0, 2), np.float32),
            labels if "points" in kind else np.zeros(0, np.int32),
            box if "box" in kind else None,
            mask if "mask" in kind and index % 2 == 0 else None,
        )

    return [one(i) for i in range(prompts)]


@pytest.mark.parametrize("points", [1, 2, 3, 4])
@pytest.mark.parametrize("prompts", [1, 2, 5])
@pytest.mark.parametrize("kind", ["points", "points mask"])
def test_decoder_matches_stock_for_every_shape(
    kind: str, prompts: int, points: int, loaded: Checkpoint, suite: parity.Suite, run: parity.Runner
) -> None:
    _compare_decoder(kind, prompts, points, loaded, suite, run)


@pytest.mark.parametrize("kind", ["box", "box points", "box mask", "box points mask", "mask"])
def test_decoder_matches_stock_for_every_kind_of_prompt(
    kind: str, loaded: Checkpoint, suite: parity.Suite, run: parity.Runner
) -> None:
    # A mask alone: with two prompts the second one has nothing at all, which the stock forward takes too.
    _compare_decoder(kind, 2, 2, loaded, suite, run)


def _compare_decoder(
    kind: str, prompts: int, points: int, loaded: Checkpoint, suite: parity.Suite, run: parity.Runner
) -> None:
    case = suite.cases[0]
    cases = cases_for(kind, prompts, points, case.photo.size, loaded.constants)
    feeds = reference.decoder_feeds(cases, case.photo.size, loaded.constants)
    got = run(contract.MASK_DECODER, {**case.features.arrays, **feeds})
    for index, prompt in enumerate(cases):
        want = reference.answer(loaded.model, case.features, prompt, case.photo.size, loaded.constants)
        for name in OUTPUTS:
            value = getattr(want, name)
            assert got[name][index : index + 1].shape == value.shape
            assert relative(got[name][index : index + 1], value) < parity.FP32_MAX_REL, (name, index)


def test_stock_answers_come_from_pixels_in_one_call(loaded: Checkpoint, suite: parity.Suite) -> None:
    """The reference splits the stock forward in two; one whole call on pixels must give the same masks."""
    case = suite.cases[0]
    prompt, want = case.prompts[0], case.answers[0]
    scale = torch.tensor([loaded.constants.image_size / s for s in case.photo.size[::-1]])
    with torch.no_grad():
        stock = loaded.model(
            pixel_values=torch.from_numpy(case.features.pixel_values),
            input_points=(torch.from_numpy(prompt.points) * scale)[None, None],
            input_labels=torch.from_numpy(prompt.labels)[None, None],
            multimask_output=True,
        )
    assert relative(stock.pred_masks[0].numpy(), want.masks[:, 1:]) < 1e-6
    assert relative(stock.iou_scores[0].numpy(), want.iou_scores[:, 1:]) < 1e-6


def test_reference_leaves_the_model_as_it_was(loaded: Checkpoint, suite: parity.Suite) -> None:
    assert loaded.model.mask_decoder.dynamic_multimask_via_stability is True


def test_wrappers_match_stock_in_torch(loaded: Checkpoint, suite: parity.Suite, modules: dict[str, Any]) -> None:
    assert not parity.compare(torch_runner(modules, loaded.constants), suite, "fp32").problems()


def test_fp32_passes(suite: parity.Suite, run: parity.Runner) -> None:
    result = parity.compare(run, suite, "fp32")
    assert result.problems() == []
    assert result.masks is not None
    assert result.masks.images == 2
    assert {case.prompts[0].name for case in suite.cases} >= {"click", "box", "box and click", "mask", "clicks"}


def test_fp16_cost_is_measured_as_a_gpu_computes(
    suite: parity.Suite, files: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    copies = {graph: tmp_path / f"{graph}.onnx" for graph in files("fp16")}
    for graph, file in files("fp16").items():
        onnx.save(fp16.rounded(onnx.load(file)), copies[graph])
    gpu = parity.compare(parity.onnx_runner(copies, threads=1, optimise=False), suite, parity.FP16)
    cpu = parity.compare(parity.onnx_runner(files("fp16"), threads=1), suite, parity.FP16_CPU)
    assert gpu.problems() == cpu.problems() == []
    assert gpu.masks is not None
    assert 0.99 <= gpu.masks.mean_iou < 1.0
    # ONNX Runtime's CPU provider must not be what the fp16 figure rests on. One largest error alone is noisy.
    errors = [{t.tensor: t.max_rel for t in v.tensors if t.graph == contract.IMAGE_ENCODER} for v in (gpu, cpu)]
    ratios = [errors[0][name] / errors[1][name] for name in errors[0]]
    assert len(ratios) == 3
    assert min(ratios) > 1.1
    assert float(np.mean(ratios)) > 1.25
    assert min(errors[0].values()) > parity.FP32_MAX_REL


# --- negative controls: each deliberate mistake must be far outside the bar ---

Mistake = Callable[[str, parity.Arrays, contract.Sam2Constants], parity.Arrays]


def wrong_label(graph: str, feeds: parity.Arrays, constants: contract.Sam2Constants) -> parity.Arrays:
    if graph == contract.MASK_DECODER:
        labels = feeds[contract.POINT_LABELS]
        return {**feeds, contract.POINT_LABELS: np.where(labels == 1, 0, labels).astype(np.int32)}
    return feeds


def swapped_corners(graph: str, feeds: parity.Arrays, constants: contract.Sam2Constants) -> parity.Arrays:
    if graph == contract.MASK_DECODER:
        labels = feeds[contract.POINT_LABELS]
        swapped = np.where(labels == 2, 3, np.where(labels == 3, 2, labels)).astype(np.int32)
        return {**feeds, contract.POINT_LABELS: swapped}
    return feeds


def no_padding_point(graph: str, feeds: parity.Arrays, constants: contract.Sam2Constants) -> parity.Arrays:
    if graph == contract.MASK_DECODER:
        coords, labels = feeds[contract.POINT_COORDS], feeds[contract.POINT_LABELS]
        return {**feeds, contract.POINT_COORDS: coords[:, :-1], contract.POINT_LABELS: labels[:, :-1]}
    return feeds


def half_pixel(graph: str, feeds: parity.Arrays, constants: contract.Sam2Constants) -> parity.Arrays:
    if graph == contract.MASK_DECODER:
        return {**feeds, contract.POINT_COORDS: feeds[contract.POINT_COORDS] + np.float32(0.5)}
    return feeds


def swapped_xy(graph: str, feeds: parity.Arrays, constants: contract.Sam2Constants) -> parity.Arrays:
    if graph == contract.MASK_DECODER:
        return {**feeds, contract.POINT_COORDS: np.ascontiguousarray(feeds[contract.POINT_COORDS][..., ::-1])}
    return feeds


def wrong_has_mask(graph: str, feeds: parity.Arrays, constants: contract.Sam2Constants) -> parity.Arrays:
    if graph == contract.MASK_DECODER:
        return {**feeds, contract.HAS_MASK_INPUT: 1 - feeds[contract.HAS_MASK_INPUT]}
    return feeds


def bgr(graph: str, feeds: parity.Arrays, constants: contract.Sam2Constants) -> parity.Arrays:
    if graph == contract.IMAGE_ENCODER:
        mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (constants.mean, constants.std))
        colours = (feeds[contract.PIXEL_VALUES] * std + mean)[:, ::-1]
        return {contract.PIXEL_VALUES: np.ascontiguousarray((colours - mean) / std)}
    return feeds


def transposed_high_res(graph: str, feeds: parity.Arrays, constants: contract.Sam2Constants) -> parity.Arrays:
    if graph == contract.MASK_DECODER:
        names = (contract.HIGH_RES_0, contract.HIGH_RES_1)
        return {**feeds, **{n: np.ascontiguousarray(feeds[n].swapaxes(2, 3)) for n in names}}
    return feeds


@pytest.mark.parametrize(
    "mistake",
    [
        wrong_label, swapped_corners, no_padding_point, half_pixel, swapped_xy, wrong_has_mask, bgr,
        transposed_high_res,
    ],
)  # fmt: skip
def test_mistake_in_the_inputs_is_caught(
    mistake: Mistake, loaded: Checkpoint, suite: parity.Suite, run: parity.Runner
) -> None:
    def wrong(graph: str, feeds: parity.Arrays) -> parity.Arrays:
        return run(graph, mistake(graph, feeds, loaded.constants))

    _assert_caught(parity.compare(wrong, suite, "fp32"), suite)


def test_missing_no_memory_embedding_is_caught(
    loaded: Checkpoint, suite: parity.Suite, modules: dict[str, Any]
) -> None:
    modules[contract.IMAGE_ENCODER].no_memory.zero_()
    _assert_caught(parity.compare(torch_runner(modules, loaded.constants), suite, "fp32"), suite)


def test_swapped_high_res_features_are_caught(loaded: Checkpoint, suite: parity.Suite, modules: dict[str, Any]) -> None:
    class Swapped(graphs.ImageEncoder):
        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            embed, high_0, high_1 = super().forward(pixel_values)
            # Right shapes, wrong levels: each made from the other one's grid.
            resize = torch.nn.functional.interpolate
            coarse = resize(high_1[:, : high_0.shape[1]], size=high_0.shape[2:])
            fine = resize(high_0.repeat(1, 2, 1, 1), size=high_1.shape[2:])
            return embed, coarse, fine

    modules[contract.IMAGE_ENCODER] = Swapped(loaded.model).eval()
    _assert_caught(parity.compare(torch_runner(modules, loaded.constants), suite, "fp32"), suite)


def test_mask_order_is_caught(suite: parity.Suite, run: parity.Runner) -> None:
    def wrong(graph: str, feeds: parity.Arrays) -> parity.Arrays:
        outputs = run(graph, feeds)
        return {n: v[:, [1, 0, 2, 3]] if n == contract.MASKS else v for n, v in outputs.items()}

    _assert_caught(parity.compare(wrong, suite, "fp32"), suite)


def _assert_caught(result: parity.VariantParity, suite: parity.Suite) -> None:
    worst = max(t.max_rel for t in result.tensors)
    assert worst > 20 * parity.FP32_MAX_REL, "the mistake hardly shows: sharpen the weights"
    assert result.masks is not None
    assert result.masks.min_iou < parity.FP32_MIN_IOU
    with pytest.raises(parity.ParityError, match="do not match PyTorch") as caught:
        parity.require(suite, [result])
    assert caught.value.report.passed is False


def test_nan_and_wrong_shape_are_caught(suite: parity.Suite, run: parity.Runner) -> None:
    def nan(graph: str, feeds: parity.Arrays) -> parity.Arrays:
        return {n: np.where(v == v.max(), np.nan, v).astype(np.float32) for n, v in run(graph, feeds).items()}

    result = parity.compare(nan, suite, "fp16")
    assert any("not finite" in p for p in result.problems())
    worst = Worst()
    worst.add(np.zeros((1, 3)), np.zeros((1, 4)))
    assert worst.relative == float("inf")


def test_mask_iou_at_picture_size() -> None:
    constants = contract.Sam2Constants(image_size=128, hidden_dim=32)
    left = np.full((1, 32, 32), -1, np.float32)
    left[:, :, :16] = 1
    assert parity.mask_ious(left, left, (201, 255), constants) == [1.0]
    assert parity.mask_ious(left, -left, (201, 255), constants)[0] < 0.02
    empty = np.full((1, 32, 32), -1, np.float32)
    assert parity.mask_ious(empty, empty, (10, 10), constants) == [1.0]
