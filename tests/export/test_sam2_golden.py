"""Golden samples: readable without torch, small, and equal to what the graphs answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.contracts import sam2 as contract
from pixano_edge.export.photos import Photo
from pixano_edge.export.sam2 import parity, reference


def test_golden_samples_are_complete_and_small(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    samples = bundle.golden()
    assert len(samples) == 2
    for sample in samples:
        arrays = bundle.load_npz(sample.tensors)
        height, width = arrays["original_size"]
        with Image.open(bundle.file(sample.image)) as image:
            assert image.size == (width, height)
            assert image.format == "PNG"
        prompts = len(arrays["points"])
        assert arrays["low_res_logits"].shape == (prompts, 4, 32, 32)
        assert arrays["iou_scores"].shape == (prompts, 4)
        assert arrays["object_score_logits"].shape == (prompts, 1)
        assert arrays["mask_input"].shape == (prompts, 32, 32)
        assert np.isnan(arrays["boxes"][0]).all()
        assert np.isfinite(arrays["boxes"][1]).all()
        assert arrays["has_mask_input"].tolist() == [0, 1]
        assert all(a.dtype in (np.float32, np.int32, np.int64) for a in arrays.values())
        size = sum(bundle.file(f).stat().st_size for f in (sample.image, sample.tensors))
        assert size < 300_000


@pytest.mark.parametrize("index", [0, 1])
def test_golden_answers_match_the_graphs(index: int, tiny_bundle: Path, run: parity.Runner) -> None:
    """Recomputes a sample from its stored picture and prompts alone, as `verify` does on a box without torch."""
    bundle = Bundle.open(tiny_bundle)
    constants = contract.Sam2Constants.from_dict(bundle.manifest.constants)
    sample = bundle.golden()[index]
    arrays = bundle.load_npz(sample.tensors)
    with Image.open(bundle.file(sample.image)) as image:
        photo = Photo(sample.name, np.asarray(image.convert("RGB")))
    pixels = reference.preprocess(photo.pixels, constants).numpy()
    features = run(contract.IMAGE_ENCODER, {contract.PIXEL_VALUES: pixels})
    for name, value in {contract.PIXEL_VALUES: pixels, **features}.items():
        want = arrays[f"{name}_values"]
        got = value.reshape(-1)[arrays[f"{name}_index"]]
        assert np.abs(got - want).max() <= parity.FP32_MAX_REL * np.abs(want).max()
    for row in range(len(arrays["points"])):
        used = arrays["labels"][row] >= 0
        box = arrays["boxes"][row]
        case = reference.PromptCase(
            "golden",
            arrays["points"][row][used],
            arrays["labels"][row][used],
            None if np.isnan(box).any() else box,
            arrays["mask_input"][row] if arrays["has_mask_input"][row] else None,
        )
        feeds = reference.decoder_feeds([case], photo.size, constants)
        got = run(contract.MASK_DECODER, {**features, **feeds})
        for key, name in (
            ("low_res_logits", contract.MASKS),
            ("iou_scores", contract.IOU_SCORES),
            ("object_score_logits", contract.OBJECT_SCORE_LOGITS),
        ):
            want = arrays[key][row : row + 1]
            assert np.abs(got[name] - want).max() <= parity.FP32_MAX_REL * np.abs(want).max()
