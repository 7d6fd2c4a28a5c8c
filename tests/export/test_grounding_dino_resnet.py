"""Grounding DINO with a ResNet: its frozen norms, open sizes, other strides; against transformers' model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="exporting needs pixano-edge[export]")

import torch
from transformers import ResNetConfig

from pixano_edge.engine.contracts import grounding_dino as contract
from pixano_edge.engine.errors import ContractError, ExportError
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.grounding_dino import parity, resnet
from pixano_edge.export.grounding_dino.constants import architecture_name, require_supported
from pixano_edge.export.grounding_dino.graphs import modules
from pixano_edge.export.grounding_dino.precision import kept_in_fp32
from pixano_edge.export.operators import check_tensorrt_10_3
from tests.export.test_grounding_dino_graphs import answer, caption_of, clearly_ranked
from tests.support.grounding_dino import Exported, export_model, sharpened, small_config, small_resnet_config

SIZES = [(96, 133), (96, 96), (131, 96), (97, 160), (160, 65)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model = sharpened(small_resnet_config())
    return export_model(model, tmp_path_factory.mktemp("resnet"), shortest_edge=96, longest_edge=160)


@pytest.mark.parametrize("size", SIZES)
def test_every_size(exported: Exported, size: tuple[int, int]) -> None:
    caption = caption_of(exported, 17)
    pixels, wanted = clearly_ranked(exported, size, caption, 0)
    found = answer(exported, pixels, caption)
    agreement = parity.compare(wanted, found.logits, found.boxes)
    assert agreement.passed, (size, agreement)
    assert agreement.swapped == 0
    assert wanted.boxes.std(axis=0).min() > 0.005, "all boxes are alike: the comparison says nothing"


def test_places_are_counted_as_the_model_has_them(exported: Exported) -> None:
    constants = exported.constants
    assert (constants.first_stride, constants.num_levels) == (16, 3)
    ids = torch.tensor([caption_of(exported, 9).ids])
    for height, width in SIZES:
        with torch.no_grad():
            out = exported.model(pixel_values=torch.zeros(1, 3, height, width), input_ids=ids)
        assert out.enc_outputs_class.shape[1] == constants.places(height, width)
    assert constants.places(constants.min_edge, constants.shortest_edge) >= constants.num_queries
    with pytest.raises(ContractError, match="even number"):
        contract.GroundingDinoConstants(first_stride=7)


def test_controls_wrong_norms_are_caught(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    caption = caption_of(exported, 17)
    pixels, wanted = clearly_ranked(exported, SIZES[0], caption, 0)
    inputs = [torch.from_numpy(v) for v in (caption.input_ids, caption.position_ids, caption.mask)]

    def agreement() -> parity.Agreement:
        graphs: dict[str, Any] = modules(exported.model)
        with torch.no_grad():
            features = graphs[contract.TEXT_ENCODER](*inputs)
            logits, boxes, _ = graphs[contract.DETECTOR](torch.from_numpy(pixels), features, *inputs[1:])
        return parity.compare(wanted, logits[0].numpy(), boxes[0].numpy())

    assert agreement().passed
    monkeypatch.setattr(resnet, "EPSILON", 1e-3)
    assert not agreement().passed
    monkeypatch.undo()
    norm = exported.model.model.backbone.conv_encoder.model.embedder.embedder.normalization
    mean = norm.running_mean.clone()
    norm.running_mean.zero_()
    try:
        assert not agreement().passed
    finally:
        norm.running_mean.copy_(mean)


def test_graphs_are_what_tensorrt_takes(exported: Exported) -> None:
    model = onnx.load(exported.files[contract.DETECTOR])
    assert check_tensorrt_10_3(model) == []
    assert not any(n.op_type == "BatchNormalization" for n in model.graph.node)
    kept = kept_in_fp32(contract.DETECTOR, model)
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    free = [n for n in convolutions if n.name not in kept]
    # The stem, six blocks of which three halve the map by a third convolution; the projections stay.
    assert len(free) == 1 + 2 * 5 + 3
    assert len(convolutions) - len(free) == 3


@pytest.mark.skipif(tensorrt_rtx.missing_module() is not None, reason="needs pixano-edge[tensorrt-rtx]")
def test_tensorrt_builds(exported: Exported) -> None:
    built = tensorrt_rtx.check_build(exported.files[contract.DETECTOR], exported.specs[contract.DETECTOR], ("SM89",))
    assert built.engine_bytes > 0


def test_other_resnets_are_refused() -> None:
    config = small_resnet_config()
    require_supported(config)
    assert architecture_name(config) == "grounding-dino-resnet-16-24-32-48-1-2-1-1"
    for change in ({"downsample_in_first_stage": True}, {"out_features": ["stage2", "stage3"]}):
        values = {"depths": [1, 1, 1, 1], "out_features": ["stage3", "stage4"], **change}
        with pytest.raises(ExportError, match="not covered"):
            require_supported(small_resnet_config(backbone_config=ResNetConfig(**values)))
    with pytest.raises(ExportError, match="num_feature_levels is 6"):
        require_supported(small_resnet_config(num_feature_levels=6))
    require_supported(small_config(num_feature_levels=3))


def test_the_norms_cost_nothing_in_onnxruntime(exported: Exported, tmp_path: Path) -> None:
    """Each norm's factor and term are folded into the convolution before it when the graph is loaded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(exported.files[contract.DETECTOR], options, providers=["CPUExecutionProvider"])
    count = {
        kind: sum(n.op_type == kind for n in onnx.load(file).graph.node)
        for kind, file in (("Mul", exported.files[contract.DETECTOR]), ("Conv", tmp_path / "optimised.onnx"))
    }
    after = sum(n.op_type == "Mul" for n in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert count["Conv"] == 17
    assert count["Mul"] - after >= 14


def test_a_saved_folder_keeps_its_statistics(exported: Exported, tmp_path: Path) -> None:
    from pixano_edge.export.grounding_dino import checkpoint

    exported.model.save_pretrained(tmp_path)
    exported.processor.save_pretrained(tmp_path)
    loaded = checkpoint.load(tmp_path)
    for name, value in exported.model.state_dict().items():
        assert np.array_equal(loaded.model.state_dict()[name], value), name
