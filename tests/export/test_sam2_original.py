"""Original ``.pt`` checkpoints: names, sizes, round trip, and files that must be refused."""

from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Sam2Model, Sam2VideoConfig, Sam2VideoModel

from pixano_edge.engine.errors import ExportError
from pixano_edge.export.sam2 import checkpoint, original, sizes
from tests.support.tiny import make_original_pt, make_tiny_model, original_state_dict, tiny_config

Shapes = dict[str, tuple[int, ...]]


def upstream_shapes(size: sizes.Size, generation: str = "sam2.1") -> Shapes:
    """Every tensor of an upstream checkpoint, written from the modules in ``sam2/modeling``, not from our table."""
    found: Shapes = {}

    def layer(name: str, *shape: int, bias: int | None = None) -> None:
        found[f"{name}.weight"] = shape
        found[f"{name}.bias"] = (shape[0] if bias is None else bias,)

    def mlp(name: str, *widths: int) -> None:
        for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
            layer(f"{name}.layers.{i}", outer, inner)

    def attention(name: str, width: int, inner: int, kv: int | None = None) -> None:
        layer(f"{name}.q_proj", inner, width)
        layer(f"{name}.k_proj", inner, kv or width)
        layer(f"{name}.v_proj", inner, kv or width)
        layer(f"{name}.out_proj", width, inner)

    trunk, d = "image_encoder.trunk", 256
    found[f"{trunk}.pos_embed"] = (1, size.width, size.background, size.background)
    found[f"{trunk}.pos_embed_window"] = (1, size.width, size.windows[0], size.windows[0])
    layer(f"{trunk}.patch_embed.proj", size.width, 3, 7, 7)
    index, width = 0, size.width
    for stage, blocks in enumerate(size.blocks):
        out = size.width * 2**stage
        for _ in range(blocks):
            block = f"{trunk}.blocks.{index}"
            layer(f"{block}.norm1", width)
            layer(f"{block}.attn.qkv", 3 * out, width)
            layer(f"{block}.attn.proj", out, out)
            layer(f"{block}.norm2", out)
            mlp(f"{block}.mlp", out, 4 * out, out)
            if width != out:
                layer(f"{block}.proj", out, width)
            index, width = index + 1, out
    for i in range(4):
        layer(f"image_encoder.neck.convs.{i}.conv", d, size.width * 2 ** (3 - i), 1, 1)

    prompt = "sam_prompt_encoder"
    found[f"{prompt}.pe_layer.positional_encoding_gaussian_matrix"] = (2, d // 2)
    for i in range(4):
        found[f"{prompt}.point_embeddings.{i}.weight"] = (1, d)
    found[f"{prompt}.not_a_point_embed.weight"] = found[f"{prompt}.no_mask_embed.weight"] = (1, d)
    layer(f"{prompt}.mask_downscaling.0", 4, 1, 2, 2)
    layer(f"{prompt}.mask_downscaling.1", 4)
    layer(f"{prompt}.mask_downscaling.3", 16, 4, 2, 2)
    layer(f"{prompt}.mask_downscaling.4", 16)
    layer(f"{prompt}.mask_downscaling.6", d, 16, 1, 1)

    decoder = "sam_mask_decoder"
    for i in range(2):
        two_way = f"{decoder}.transformer.layers.{i}"
        attention(f"{two_way}.self_attn", d, d)
        attention(f"{two_way}.cross_attn_token_to_image", d, d // 2)
        attention(f"{two_way}.cross_attn_image_to_token", d, d // 2)
        mlp(f"{two_way}.mlp", d, 2048, d)
        for n in range(1, 5):
            layer(f"{two_way}.norm{n}", d)
    attention(f"{decoder}.transformer.final_attn_token_to_image", d, d // 2)
    layer(f"{decoder}.transformer.norm_final_attn", d)
    found[f"{decoder}.iou_token.weight"] = found[f"{decoder}.obj_score_token.weight"] = (1, d)
    found[f"{decoder}.mask_tokens.weight"] = (4, d)
    layer(f"{decoder}.output_upscaling.0", d, d // 4, 2, 2, bias=d // 4)
    layer(f"{decoder}.output_upscaling.1", d // 4)
    layer(f"{decoder}.output_upscaling.3", d // 4, d // 8, 2, 2, bias=d // 8)
    layer(f"{decoder}.conv_s0", d // 8, d, 1, 1)
    layer(f"{decoder}.conv_s1", d // 4, d, 1, 1)
    for i in range(4):
        mlp(f"{decoder}.output_hypernetworks_mlps.{i}", d, d, d, d // 8)
    mlp(f"{decoder}.iou_prediction_head", d, d, d, 4)
    mlp(f"{decoder}.pred_obj_score_head", d, d, d, 1)

    for i in range(4):
        block = f"memory_attention.layers.{i}"
        attention(f"{block}.self_attn", d, d)
        attention(f"{block}.cross_attn_image", d, d, kv=64)
        layer(f"{block}.linear1", 2048, d)
        layer(f"{block}.linear2", d, 2048)
        for n in range(1, 4):
            layer(f"{block}.norm{n}", d)
    layer("memory_attention.norm", d)
    channels = 1
    for i in range(4):
        layer(f"memory_encoder.mask_downsampler.encoder.{3 * i}", 4 * channels, channels, 3, 3)
        channels *= 4
        layer(f"memory_encoder.mask_downsampler.encoder.{3 * i + 1}", channels)
    layer("memory_encoder.mask_downsampler.encoder.12", d, channels, 1, 1)
    layer("memory_encoder.pix_feat_proj", d, d, 1, 1)
    for i in range(2):
        block = f"memory_encoder.fuser.layers.{i}"
        layer(f"{block}.dwconv", d, 1, 7, 7)
        layer(f"{block}.norm", d)
        layer(f"{block}.pwconv1", 4 * d, d)
        layer(f"{block}.pwconv2", d, 4 * d)
        found[f"{block}.gamma"] = (d,)
    layer("memory_encoder.out_proj", 64, d, 1, 1)
    found["maskmem_tpos_enc"] = (7, 1, 1, 64)
    found["no_mem_embed"] = found["no_mem_pos_enc"] = (1, 1, d)
    found["no_obj_ptr"] = (1, d)
    layer("mask_downsample", 1, 1, 4, 4)
    mlp("obj_ptr_proj", d, d, d, d)
    if generation == "sam2.1":
        layer("obj_ptr_tpos_proj", 64, d)
        found["no_obj_embed_spatial"] = (1, 64)
    return found


@pytest.fixture(params=sizes.SIZES, ids=lambda s: s.name)
def size(request: pytest.FixtureRequest) -> Any:
    return request.param


# Millions of parameters as upstream's README gives them.
PUBLISHED = {"hiera-tiny": 38.9, "hiera-small": 46.0, "hiera-base-plus": 80.8, "hiera-large": 224.4}


def test_upstream_list_is_complete(size: sizes.Size) -> None:
    """The hand-written list has the published number of parameters (the Fourier matrix is a buffer)."""
    total = 0
    for name, shape in upstream_shapes(size).items():
        if "gaussian" not in name:
            total += int(torch.tensor(shape).prod())
    assert total / 1e6 == pytest.approx(PUBLISHED[size.name], abs=0.1)


@pytest.mark.parametrize("generation", ["sam2", "sam2.1"])
def test_real_names_and_shapes_fit_the_model(size: sizes.Size, generation: str) -> None:
    """Every upstream tensor is mapped, and together they fill `Sam2VideoModel` exactly. Meta tensors only."""
    shapes = upstream_shapes(size, generation)
    assert sizes.detect(shapes) is size
    assert original.generation(set(shapes)) == generation
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        model, image = Sam2VideoModel(size.video_config(generation)), Sam2Model(size.config())
    converted = original.convert(state)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert {k: v.shape for k, v in image.state_dict().items()}.items() <= {
        k: v.shape for k, v in converted.items()
    }.items()


def test_inverse_mapping_of_the_tests_gives_the_real_names(size: sizes.Size) -> None:
    with torch.device("meta"):
        model = Sam2VideoModel(size.video_config("sam2.1"))
    found = {name: tuple(value.shape) for name, value in original_state_dict(model).items()}
    assert found == upstream_shapes(size)


@pytest.fixture(scope="module")
def video_model() -> Any:
    return make_tiny_model()


@pytest.fixture(scope="module")
def config() -> Sam2VideoConfig:
    """The tiny trunk, which is none of the four sizes."""
    return tiny_config()


def test_round_trip_gives_the_same_weights_and_masks(
    video_model: Any, config: Sam2VideoConfig, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = make_original_pt(video_model, tmp_path / "tiny.pt", epoch=3)
    held = original.load(path, config)
    assert held.generation == "sam2.1"
    stock = checkpoint.load(tiny_checkpoint, image_only=True).model
    model = held.model
    for got, wanted in ((model, stock), (held.video_model, video_model)):
        expected = wanted.state_dict()
        assert set(got.state_dict()) == set(expected)
        for name, value in got.state_dict().items():
            assert torch.equal(value, expected[name]), name
    # One copy of the weights for both, and the tables that no checkpoint holds are made.
    weight = "vision_encoder.neck.convs.0.weight"
    assert model.get_parameter(weight).data_ptr() == held.video_model.get_parameter(weight).data_ptr()
    assert torch.equal(held.video_model.memory_attention.position_ids, video_model.memory_attention.position_ids)
    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    prompt = {"input_points": torch.tensor([[[[40.0, 60.0]]]]), "input_labels": torch.tensor([[[1]]])}
    with torch.no_grad():
        got, want = (m(pixel_values=pixels, **prompt).pred_masks for m in (model, stock))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_round_trip_notices_a_wrong_name(video_model: Any, config: Sam2VideoConfig, tmp_path: Path) -> None:
    """Negative control: two tensors of equal shape exchanged load without complaint, and only weights show it."""
    state = original_state_dict(video_model)
    first = "sam_mask_decoder.transformer.layers.0.norm1.weight"
    second = "sam_mask_decoder.transformer.layers.0.norm2.weight"
    state[first], state[second] = state[second], state[first]
    torch.save({"model": state}, tmp_path / "swapped.pt")
    model = original.load(tmp_path / "swapped.pt", config).model
    name = "mask_decoder.transformer.layers.0.layer_norm1.weight"
    assert not torch.equal(model.state_dict()[name], video_model.state_dict()[name])


def test_bare_state_dict_and_half_precision_are_taken(
    video_model: Any, config: Sam2VideoConfig, tmp_path: Path
) -> None:
    torch.save({k: v.half() for k, v in original_state_dict(video_model).items()}, tmp_path / "bare.pth")
    held = original.load(tmp_path / "bare.pth", config)
    for model in (held.model, held.video_model):
        assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_generation_2_is_recognised(video_model: Any, config: Sam2VideoConfig, tmp_path: Path) -> None:
    only_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj")
    state = {k: v for k, v in original_state_dict(video_model).items() if not k.startswith(only_2_1)}
    torch.save({"model": state}, tmp_path / "sam2.pt")
    older = tiny_config()
    older.enable_occlusion_spatial_embedding = older.enable_temporal_pos_encoding_for_object_pointers = False
    held = original.load(tmp_path / "sam2.pt", older)
    assert held.generation == "sam2"
    assert held.video_model.occlusion_spatial_embedding_parameter is None


def test_images_alone(video_model: Any, config: Sam2VideoConfig, tmp_path: Path) -> None:
    state = original_state_dict(video_model)
    torch.save({"model": state}, tmp_path / "whole.pt")
    held = original.load(tmp_path / "whole.pt", config, video=False)
    assert held.video_model is None
    assert held.has_memory
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith(original.MEMORY)}}, tmp_path / "image.pt")
    held = original.load(tmp_path / "image.pt", config)
    assert held.video_model is None
    assert not held.has_memory
    torch.save({"model": {k: v for k, v in state.items() if k != "no_obj_ptr"}}, tmp_path / "partial.pt")
    with pytest.raises(ExportError, match="no_object_pointer"):
        original.load(tmp_path / "partial.pt", config)


class _Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_pickle_with_code_is_refused_and_not_run(video_model: Any, tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    path = make_original_pt(video_model, tmp_path / "bomb.pt", extra=_Bomb(str(marker)))
    with pytest.raises(ExportError, match="more than tensors") as error:
        checkpoint.load(path)
    assert not marker.exists()
    assert "weights_only" not in str(error.value), "the message must not teach how to switch the safety off"
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps({"model": _Bomb(str(marker))}))
    with pytest.raises(ExportError):
        checkpoint.load(plain)
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 10, 500, 0.5, 0.98])
def test_truncated_file_is_refused(keep: float, video_model: Any, tmp_path: Path) -> None:
    path = make_original_pt(video_model, tmp_path / "whole.pt")
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(ExportError):
        checkpoint.load(path)


def test_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<html>404 not found</html>")
    with pytest.raises(ExportError):
        checkpoint.load(tmp_path / "page.pt")


def test_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pt")
    with pytest.raises(ExportError, match="no state dict"):
        checkpoint.load(tmp_path / "numbers.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ExportError, match="no state dict"):
        checkpoint.load(tmp_path / "list.pt")


def test_another_model_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"backbone.0.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(ExportError, match="image encoder of SAM 2"):
        checkpoint.load(tmp_path / "other.pt")


def test_unknown_trunk_names_the_known_sizes(video_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="hiera-base-plus"):
        checkpoint.load(make_original_pt(video_model, tmp_path / "tiny.pt"))


def test_missing_and_extra_tensors_are_named(video_model: Any, config: Sam2VideoConfig, tmp_path: Path) -> None:
    state = original_state_dict(video_model)
    torch.save({"model": {k: v for k, v in state.items() if k != "no_mem_embed"}}, tmp_path / "missing.pt")
    with pytest.raises(ExportError, match="no_memory_embedding"):
        original.load(tmp_path / "missing.pt", config)
    without = {k: v for k, v in state.items() if k != "sam_prompt_encoder.point_embeddings.2.weight"}
    torch.save({"model": without}, tmp_path / "points.pt")
    with pytest.raises(ExportError, match="point embeddings"):
        original.load(tmp_path / "points.pt", config)
    torch.save({"model": {**state, "image_encoder.adapter.weight": torch.zeros(2)}}, tmp_path / "extra.pt")
    with pytest.raises(ExportError, match=r"image_encoder\.adapter\.weight"):
        original.load(tmp_path / "extra.pt", config)


def test_wrong_shape_is_refused(video_model: Any, config: Sam2VideoConfig, tmp_path: Path) -> None:
    state = original_state_dict(video_model)
    torch.save({"model": {**state, "no_mem_embed": torch.zeros(1, 1, 5)}}, tmp_path / "shape.pt")
    with pytest.raises(ExportError, match="do not fit SAM 2"):
        original.load(tmp_path / "shape.pt", config)
