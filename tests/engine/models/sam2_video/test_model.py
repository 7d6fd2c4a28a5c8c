"""A bundle opened for tracking: what it shares with the image predictor, what it refuses, what closing does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pixano_edge.engine.bundle import Bundle, BundleStore
from pixano_edge.engine.contracts import sam2, sam2_video
from pixano_edge.engine.errors import BundleError, CancelledError, DeviceError, PromptError
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import VIDEO_GRAPHS, Sam2VideoModel
from pixano_edge.engine.runtime.memory import graph_bytes
from tests.engine.bundle.sample import make_bundle
from tests.support.tracking import moving_squares

CLICK = Prompt(points=[[25, 35]])


def test_tracks_and_answers_clicks_with_one_encoder(tracking_bundle: Path) -> None:
    frames = moving_squares(6)
    with Sam2VideoModel.open(tracking_bundle, "cpu", threads=1) as model, model.track(frames) as tracker:
        first = tracker.add_prompt(1, 0, CLICK)
        results = list(tracker.propagate())
        assert [r.frame for r in results] == list(range(6))
        assert np.array_equal(results[0].objects[0].mask, first.mask)
        assert model.runs == {
            sam2.IMAGE_ENCODER: 6,
            sam2.MASK_DECODER: 0,
            sam2_video.MEMORY_ATTENTION: 5,
            sam2_video.TRACK_DECODER: 6,
            sam2_video.MEMORY_ENCODER: 6,
        }
        answer = model.predictor.predict(frames[0], [CLICK])
        assert model.runs[sam2.IMAGE_ENCODER] == 6, "the prompted frame is in the shared cache"
        with Sam2ImagePredictor.open(tracking_bundle, device="cpu", threads=1) as alone:
            assert np.array_equal(alone.predict(frames[0], [CLICK]).masks, answer.masks)
        info = json.loads(json.dumps(model.info()))
    assert set(VIDEO_GRAPHS) <= set(info)
    assert info["tracks"] is True
    assert "checked at export" in info["precision_reason"]
    with pytest.raises(DeviceError, match="closed"):
        model.predictor.encode(frames[0])


def test_a_pass_does_not_drive_images_out_of_the_cache(tracking_bundle: Path) -> None:
    with Sam2VideoModel.open(tracking_bundle, "cpu", threads=1) as model, model.track(moving_squares(8)) as tracker:
        tracker.add_prompt(1, 0, CLICK)
        list(tracker.propagate())
        assert model.predictor.cache.stats().entries == 1


def test_memory_counts_all_graphs(tracking_bundle: Path) -> None:
    with Sam2VideoModel.open(tracking_bundle, "cpu", threads=1) as model:
        bundle = Bundle.open(tracking_bundle)
        fitted = {name: bundle.file(entry.file) for name, entry in bundle.manifest.cpu_graphs.items()}

        def loaded(path: Path) -> int:
            return bundle.weight_bytes(path) or graph_bytes(path)

        clicks = [loaded(path) for name, path in fitted.items() if name not in bundle.manifest.graphs]
        weights = {name: loaded(fitted.get(name, bundle.graph_path(name))) for name in bundle.manifest.graphs}
        assert (len(weights), len(clicks)) == (5, 3)
        images = sum(clicks) + weights[sam2.IMAGE_ENCODER] + weights[sam2.MASK_DECODER]
        assert model.predictor.memory().weights == images
        others = [size for name, size in weights.items() if name not in (sam2.IMAGE_ENCODER, sam2.MASK_DECODER)]
        assert model.memory().weights == images + sum(others)


def test_weights_that_lie_in_other_graphs_files_count() -> None:
    bundle = Bundle.open(BundleStore().path("sam2-demo"))
    with Sam2ImagePredictor.open(bundle, device="cpu", threads=1) as predictor:
        used = predictor.memory().weights or 0
        files = [predictor.info()[name]["file"] for name in (sam2.IMAGE_ENCODER, sam2.MASK_DECODER)]
    held = {v.file: v for graph in bundle.manifest.graphs.values() for v in graph.variants.values()}
    held |= {v.file: v for v in bundle.manifest.cpu_graphs.values()}
    stored = sum(bundle.file(f"graphs/{name}").stat().st_size for name in files)
    assert used >= 4 * sum(held[f"graphs/{name}"].parameters for name in files) > 2 * stored


def test_an_image_bundle_says_to_export_again(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no graphs for video") as caught:
        Sam2VideoModel.open(make_bundle(tmp_path / "images"), "cpu")
    assert "export sam2" in caught.value.action


def test_opening_can_be_stopped(tracking_bundle: Path) -> None:
    def stop() -> None:
        raise CancelledError("stopped", "")

    with pytest.raises(CancelledError):
        Sam2VideoModel.open(tracking_bundle, "cpu", check=stop)


def test_options_of_a_tracker_are_checked(tracking_bundle: Path) -> None:
    frames = moving_squares(3)
    with Sam2VideoModel.open(tracking_bundle, "cpu", threads=1) as model:
        for cap in (0, -2):
            with pytest.raises(PromptError, match="conditioning"):
                model.track(frames, max_cond_frames=cap)
        with pytest.raises(PromptError, match="corrections"):
            model.track(frames, corrections="other")  # type: ignore[arg-type]


def test_after_closing(tracking_bundle: Path) -> None:
    model = Sam2VideoModel.open(tracking_bundle, "cpu", threads=1)
    tracker = model.track(moving_squares(4))
    tracker.add_prompt(1, 0, CLICK)
    model.close()
    model.close()
    with pytest.raises(DeviceError, match="closed"):
        list(tracker.propagate())
    tracker.close()
