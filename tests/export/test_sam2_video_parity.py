"""The gate of the video graphs: passes on what is exported, and every planted mistake makes it fail."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.models.sam2_video.clip import bfloat16_distance, moving_clip
from pixano_edge.export.photos import default_photos
from pixano_edge.export.sam2 import checkpoint, parity, video_parity
from pixano_edge.export.sam2.checkpoint import Checkpoint
from pixano_edge.export.sam2.video_parity import VideoSuite

ATTENTION, ENCODER, DECODER = sam2_video.MEMORY_ATTENTION, sam2_video.MEMORY_ENCODER, sam2_video.TRACK_DECODER


@pytest.fixture(scope="module")
def tracking(tracking_checkpoint: Path) -> Checkpoint:
    return checkpoint.load(tracking_checkpoint)


@pytest.fixture(scope="module")
def video_suite(tracking: Checkpoint) -> VideoSuite:
    assert tracking.video is not None
    return video_parity.build_suite(tracking.video_model, default_photos(), tracking.constants, tracking.video)


@pytest.fixture(scope="module")
def graphs(tracking_bundle: Path) -> dict[str, Path]:
    bundle = Bundle.open(tracking_bundle)
    return {name: bundle.graph_path(name) for name in bundle.specs}


@pytest.fixture(scope="module")
def image_suite(tracking: Checkpoint) -> parity.Suite:
    return parity.build_suite(tracking.model, default_photos()[:1], tracking.constants)


def measured(files: dict[str, Path], suite: VideoSuite) -> parity.VariantParity:
    tensors = video_parity.compare_tensors(parity.onnx_runner(files, threads=1), suite, "fp32")
    return parity.VariantParity(tensors, clip=video_parity.compare_clip(files, suite, "fp32", threads=1))


def test_exported_graphs_pass(graphs: dict[str, Path], video_suite: VideoSuite) -> None:
    found = measured(graphs, video_suite)
    assert found.problems() == []
    assert found.clip is not None
    assert (found.clip.objects, found.clip.frames) == (2, 12)  # 8 frames, and 4 again after the correction


def test_every_output_and_many_sizes_are_compared(video_suite: VideoSuite) -> None:
    specs = sam2_video.graphs(video_suite.constants, video_suite.video)
    sizes: dict[str, set[tuple[int, ...]]] = {name: set() for name in specs}
    for case in video_suite.cases:
        spec = specs[case.graph]
        assert set(case.feeds) == {t.name for t in spec.inputs}
        assert set(case.want) == {t.name for t in spec.outputs}
        for tensor in (*spec.inputs, *spec.outputs):
            tensor.check({**case.feeds, **case.want}[tensor.name])
        if case.graph == ATTENTION:
            sizes[case.graph].add((*case.feeds["memory"].shape[:2], case.feeds["pointers"].shape[1]))
        elif case.graph == DECODER:
            sizes[case.graph].add(case.feeds["point_coords"].shape[:2])
        else:
            sizes[case.graph].add((case.feeds["mask_logits"].shape[0], case.feeds["mask_logits"].shape[2]))
    assert sizes[ATTENTION] >= {(1, 1, 0), (1, 7, 16), (2, 3, 5), (3, 2, 2)}
    assert sizes[DECODER] >= {(1, 2), (2, 2), (3, 3)}
    assert sizes[ENCODER] == {(1, 32), (3, 32), (1, 128), (2, 128)}
    encoder = [case.feeds for case in video_suite.cases if case.graph == ENCODER]
    assert {float(v) for feeds in encoder for v in feeds["binarize"]} == {0, 1}
    assert len({bool(v > 0) for feeds in encoder for v in feeds["object_score_logits"].ravel()}) == 2


def test_the_clip_has_masks_that_change(video_suite: VideoSuite) -> None:
    """Empty masks, or the same one in all frames, would compare nothing."""
    for number in video_suite.clip.objects:
        masks = [answers[number].mask for answers in video_suite.answers]
        areas = [float(mask.mean()) for mask in masks]
        assert sum(0.02 < area < 0.98 for area in areas) >= 0.8 * len(areas)
        assert all((first != second).any() for first, second in itertools.pairwise(masks))
        assert max(answers[number].undecided.mean() for answers in video_suite.answers) < 0.05


# --- negative controls: mistakes planted in the files ---


def prepend(model: ModelProto, name: str, op: str, *inputs: np.ndarray, **attributes: Any) -> None:
    """Every reader of a graph input reads `op` of it instead."""
    constants = [numpy_helper.from_array(v, f"planted_{name}_{i}") for i, v in enumerate(inputs)]
    model.graph.initializer.extend(constants)
    for node in model.graph.node:
        for index, source in enumerate(node.input):
            if source == name:
                node.input[index] = f"planted_{name}"
    made = helper.make_node(op, [name, *(c.name for c in constants)], [f"planted_{name}"], **attributes)
    nodes = [made, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def change(
    model: ModelProto, find: Callable[[str, np.ndarray], bool], make: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Replaces the initialisers that `find` picks."""
    found = [t for t in model.graph.initializer if find(t.name, numpy_helper.to_array(t))]
    assert found
    for tensor in found:
        tensor.CopyFrom(numpy_helper.from_array(make(numpy_helper.to_array(tensor)), tensor.name))


def zeroed_memory(model: ModelProto) -> None:
    prepend(model, "memory", "Mul", np.array(0, np.float32))


def wrong_temporal_row(model: ModelProto) -> None:
    change(model, lambda name, _: name == "time_table", lambda table: np.roll(table, 1, axis=0))


def dropped_pointers(model: ModelProto) -> None:
    for name in ("pointers", "pointer_time"):
        prepend(model, name, "Slice", *(np.array([v]) for v in (0, 0, 1)))


def wrong_pointer_time(model: ModelProto) -> None:
    prepend(model, "pointer_time", "Add", np.array(1 / 15, np.float32))


def wrong_scale(model: ModelProto) -> None:
    change(model, lambda _, v: v.size == 1 and float(v.reshape(-1)[0]) == 20.0, lambda v: v / 2)


def wrong_bias(model: ModelProto) -> None:
    change(model, lambda _, v: v.size == 1 and float(v.reshape(-1)[0]) == -10.0, lambda v: v * 0)


def borders_not_sharp(model: ModelProto) -> None:
    prepend(model, "binarize", "Mul", np.array(0, np.float32))


def absence_not_marked(model: ModelProto) -> None:
    change(model, lambda name, _: name == "occlusion", np.zeros_like)


def not_rounded(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.BFLOAT16:
            node.attribute[0].i = TensorProto.FLOAT


def no_memory_kept(model: ModelProto) -> None:
    prepend(model, "skip_no_memory", "Mul", np.array(0, np.float32))


def wrong_token(model: ModelProto) -> None:
    """The tokens of the masks come in another order."""
    outputs = [o.name for o in model.graph.output]
    assert outputs[-1] == "mask_tokens"
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "mask_tokens":
                node.output[index] = "unturned"
        for index, name in enumerate(node.input):
            if name == "mask_tokens":
                node.input[index] = "unturned"
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 0, 2, 3]), "turned"))
    model.graph.node.append(helper.make_node("Gather", ["unturned", "turned"], ["mask_tokens"], axis=1))


MISTAKES: dict[str, tuple[str, Callable[[ModelProto], None]]] = {
    "zeroed memory": (ATTENTION, zeroed_memory),
    "wrong temporal row": (ATTENTION, wrong_temporal_row),
    "dropped pointers": (ATTENTION, dropped_pointers),
    "wrong pointer time": (ATTENTION, wrong_pointer_time),
    "wrong scale before the memory encoder": (ENCODER, wrong_scale),
    "wrong bias before the memory encoder": (ENCODER, wrong_bias),
    "borders not sharp": (ENCODER, borders_not_sharp),
    "absence not marked": (ENCODER, absence_not_marked),
    "memories not rounded": (ENCODER, not_rounded),
    "no-memory embedding kept": (DECODER, no_memory_kept),
    "tokens in another order": (DECODER, wrong_token),
}
# The clip has no absent object and no given mask; and rounding moves masks by less than a pixel.
NOT_IN_THE_CLIP = ("absence not marked", "memories not rounded", "no-memory embedding kept")


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_caught(
    name: str, graphs: dict[str, Path], video_suite: VideoSuite, image_suite: parity.Suite, tmp_path: Path
) -> None:
    graph, plant = MISTAKES[name]
    model = onnx.load(graphs[graph])
    plant(model)
    onnx.save(model, tmp_path / "wrong.onnx")
    found = measured({**graphs, graph: tmp_path / "wrong.onnx"}, video_suite)
    worst = max(t.max_rel for t in found.tensors if t.graph == graph)
    assert worst > 20 * parity.FP32_MAX_REL, worst
    assert all(t.max_rel < parity.FP32_MAX_REL for t in found.tensors if t.graph != graph)
    assert found.clip is not None
    if name not in NOT_IN_THE_CLIP:
        assert found.clip.min_iou < parity.FP32_MIN_IOU, found.clip
    with pytest.raises(parity.ParityError, match=graph):
        parity.require(image_suite, [found])


def test_a_clip_alone_can_fail_the_gate(image_suite: parity.Suite, video_suite: VideoSuite) -> None:
    """Masks of one frame shifted by a frame: no tensor would tell."""
    masks = [{n: a.mask for n, a in answers.items()} for answers in video_suite.answers]
    right = video_parity.clip_parity(masks, video_suite, "fp32")
    assert right.min_iou == 1.0
    wrong = video_parity.clip_parity([masks[1], *masks[1:]], video_suite, "fp32")
    assert right.mean_iou > wrong.mean_iou > wrong.min_iou
    with pytest.raises(parity.ParityError, match="fp32 clip: lowest IoU"):
        parity.require(image_suite, [parity.VariantParity(clip=wrong)])
    fp16 = wrong.model_copy(update={"variant": "fp16", "mean_iou": 0.98})
    with pytest.raises(parity.ParityError, match="fp16 clip: mean IoU") as caught:
        parity.require(image_suite, [parity.VariantParity(clip=fp16)])
    assert "--variants fp32" in caught.value.action


@pytest.mark.parametrize("variant", ["fp32", "fp16", "fp16-tensorrt"])
def test_other_variants_are_in_the_report(variant: str, tracking_bundle: Path) -> None:
    report = Bundle.open(tracking_bundle).manifest.parity
    assert report is not None
    assert report.passed
    tensors = {(t.graph, t.tensor): t.max_rel for t in report.tensors if t.variant == variant}
    (clip,) = [c for c in report.clips if c.variant == variant]
    if variant.startswith("fp32"):
        assert max(tensors.values()) < parity.FP32_MAX_REL
        assert clip.min_iou >= parity.FP32_MIN_IOU
    else:
        assert 1e-5 < min(tensors.values()) < max(tensors.values()) < 0.02
        assert clip.mean_iou >= parity.FP16_MEAN_IOU


# --- parts ---


def test_bfloat16_distance() -> None:
    import torch

    rng = np.random.default_rng(0)
    exact = rng.standard_normal(5000).astype(np.float32)
    exact[:3] = (0.0, -0.0, 1e-30)

    def rounded(values: np.ndarray) -> np.ndarray:
        return torch.from_numpy(values).to(torch.bfloat16).float().numpy()

    assert bfloat16_distance(rounded(exact), exact).max() == 0
    moved = exact + np.float32(1e-4)
    distance = bfloat16_distance(rounded(moved), exact)
    assert 0.5e-4 < distance.max() <= 1.01e-4
    assert (distance > 0).mean() < 0.5  # most are rounded to the same number
    assert bfloat16_distance(exact, exact).max() > 0.01  # values that were not rounded at all
    assert np.isinf(bfloat16_distance(np.array([np.nan, np.inf], np.float32), exact[:2])).all()


def test_windows_must_fit_the_picture() -> None:
    clip = moving_clip((60, 90), 4)
    frames = clip.frames(np.zeros((60, 90, 3), np.uint8))
    assert [frame.shape for frame in frames] == [(45, 67, 3)] * 4
    assert clip.order == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    with pytest.raises(ValueError, match="do not fit"):
        clip.frames(np.zeros((50, 90, 3), np.uint8))


def test_the_tracking_decoder_has_no_weights_of_its_own(tracking_bundle: Path) -> None:
    """It is the mask decoder with other inputs, so both are stored once."""
    bundle = Bundle.open(tracking_bundle)
    for variant in ("fp32", "fp16"):
        shared, lender = (bundle.manifest.graphs[g].variants[variant] for g in (DECODER, sam2.MASK_DECODER))
        sizes = [bundle.manifest.files[v.file].size for v in (shared, lender)]
        assert sizes[0] < 0.2 * sizes[1]
        assert shared.weight_bytes is not None
        assert shared.weight_bytes > 0.9 * (sizes[1] - 100_000)
        assert lender.weight_bytes is None  # ordinary weights: nothing is stored in another way


def test_it_moves_with_its_folder(tracking_bundle: Path, tmp_path: Path) -> None:
    moved = Bundle.open(shutil.copytree(tracking_bundle, tmp_path / "elsewhere"))
    run = parity.onnx_runner({DECODER: moved.graph_path(DECODER)}, threads=1)
    constants = sam2.Sam2Constants.from_dict(moved.manifest.constants)
    video = sam2_video.constants_of(moved.manifest.constants)
    assert video is not None
    from pixano_edge.export.sam2.feeds import random_feeds

    outputs = run(DECODER, random_feeds(sam2_video.graphs(constants, video)[DECODER], {"P": 1, "N": 2}, 0))
    assert all(np.isfinite(v).all() for v in outputs.values())
