"""All four sizes through export, with tracking: each one's own windows, heads, stage transitions and global blocks.

Only the width and the number of windowed blocks between the others are reduced. At 256 pixels the grids of the stages
(64, 32, 16, 8) meet the windows as they do at 1024: 14 and 7 need padding, 16 and 8 do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch
from PIL import Image
from transformers import Sam2VideoConfig

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.engine.contracts.base import GraphSpec
from pixano_edge.export import tensorrt_rtx
from pixano_edge.export.onnx_graph import export_graph
from pixano_edge.export.operators import check_tensorrt_10_3
from pixano_edge.export.photos import default_photos
from pixano_edge.export.sam2 import export_sam2
from pixano_edge.export.sam2.sizes import SIZES, Size
from tests.support.tiny import make_tracking_model, tiny_config

SIDE, HIDDEN = 256, 128  # the video part of transformers needs a width of more than 64
# Blocks per stage and global blocks. As in the real sizes the global blocks lie in the third stage at equal
# distances, with windowed blocks between them, the last one at the stage's end.
SHORT = {
    "hiera-tiny": ((1, 2, 7, 2), (5, 7, 9)),
    "hiera-small": ((1, 2, 8, 2), (4, 7, 10)),
    "hiera-base-plus": ((2, 3, 10, 3), (6, 10, 14)),
    "hiera-large": ((2, 6, 8, 4), (9, 12, 15)),
}


def narrow(size: Size) -> Size:
    """The size with 16 channels per head in the first stage, and with fewer blocks in the third."""
    blocks, global_blocks = SHORT[size.name]
    return replace(size, width=16 * size.heads, blocks=blocks, global_blocks=global_blocks)


def narrow_config(size: Size) -> Sam2VideoConfig:
    """`Size.video_config` of the narrow size at `SIDE` pixels; all but the trunk as in the tiny checkpoint."""
    full, tiny = narrow(size).video_config("sam2.1").vision_config, tiny_config(SIDE, HIDDEN)
    assert full is not None
    vision = {
        **full.to_dict(),
        "backbone_config": {**full.backbone_config.to_dict(), "image_size": [SIDE, SIDE]},
        "backbone_feature_sizes": tiny.vision_config.backbone_feature_sizes,
        "fpn_hidden_size": HIDDEN,
    }
    return Sam2VideoConfig(**{**tiny.to_dict(), "vision_config": vision})


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Bundle]]:
    """The bundle of a size by name, exported once from sharpened weights.

    To save time: one photo; fp32 alone but for base-plus; and, since only the image encoder depends on the size, the
    other graphs with the same weights for all, traced once (parity of each size would show if that were wrong).
    """
    made: dict[str, Bundle] = {}
    traced: dict[str, bytes] = {}
    weights: dict[str, torch.Tensor] = {}

    def export_once(module: Any, spec: GraphSpec, example: Any) -> onnx.ModelProto:
        if spec.name == contract.IMAGE_ENCODER:
            return export_graph(module, spec, example)
        if spec.name not in traced:
            traced[spec.name] = export_graph(module, spec, example).SerializeToString()
        return onnx.load_from_string(traced[spec.name])

    def make(name: str) -> Bundle:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            config = narrow_config(next(s for s in SIZES if s.name == name))
            model = make_tracking_model(SIDE, seed=6, vision_config=config.vision_config)
            model.load_state_dict(weights, strict=False)
            weights.update({n: v for n, v in model.state_dict().items() if not n.startswith("vision_encoder.")})
            model.save_pretrained(folder / "checkpoint")
            photo = default_photos()[1]
            Image.fromarray(photo.pixels).save(folder / f"{photo.name}.png")
            exported = export_sam2(
                folder / "checkpoint",
                folder / "bundle",
                variants=("fp32", "fp16") if name == "hiera-base-plus" else ("fp32",),
                photos=[folder / f"{photo.name}.png"],
                threads=1,
            )
            made[name] = Bundle.open(exported)
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixano_edge.export.pipeline.export_graph", export_once)
        yield make


@pytest.mark.parametrize("size", SIZES, ids=lambda s: s.name)
def test_narrow_size_keeps_what_tells_the_sizes_apart(size: Size) -> None:
    backbone = narrow_config(size).vision_config.backbone_config
    assert tuple(backbone.window_size_per_stage) == size.windows
    assert list(backbone.window_positional_embedding_background_size) == [size.background] * 2
    assert list(backbone.num_attention_heads_per_stage) == [size.heads * 2**i for i in range(4)]
    blocks, global_blocks = SHORT[size.name]
    assert (blocks[0], blocks[1], blocks[3]) == (size.blocks[0], size.blocks[1], size.blocks[3])
    for kept, indices in ((blocks, global_blocks), (size.blocks, size.global_blocks)):
        start, end = sum(kept[:2]), sum(kept[:3])
        assert start < indices[0]
        assert indices[2] == end - 1
        assert indices[1] - indices[0] == indices[2] - indices[1] > 1


@pytest.mark.parametrize("size", SIZES, ids=lambda s: s.name)
def test_every_size_matches_pytorch_and_suits_tensorrt(size: Size, bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of(size.name)
    report = bundle.manifest.parity
    assert report is not None
    assert report.passed
    assert max(t.max_rel for t in report.tensors if t.variant == "fp32") < 1e-4
    assert {t.graph for t in report.tensors} == set(bundle.specs)
    assert len(bundle.specs) == 5
    assert {c.variant: c.min_iou >= 0.999 for c in report.clips if c.variant == "fp32"} == {"fp32": True}
    for variant in bundle.variants():
        for graph in bundle.manifest.graphs:
            assert check_tensorrt_10_3(onnx.load(bundle.graph_path(graph, variant))) == []


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
def test_base_plus_builds_for_tensorrt(variant: str, bundle_of: Callable[[str], Bundle]) -> None:
    if tensorrt_rtx.missing_module():
        pytest.skip(f"{tensorrt_rtx.missing_module()} is not installed: pip install 'pixano-edge[tensorrt-rtx]'")
    spec = contract.graphs(contract.Sam2Constants(image_size=SIDE, hidden_dim=HIDDEN))[contract.IMAGE_ENCODER]
    path = bundle_of("hiera-base-plus").graph_path(contract.IMAGE_ENCODER, variant)
    assert tensorrt_rtx.check_build(path, spec, ("SM86", "SM89")).engine_bytes > 10_000
