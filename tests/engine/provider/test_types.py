"""Names, order and defaults of the interface's dataclasses, written out from the contract's table."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from datetime import datetime, timezone

import numpy as np
import pytest

from pixano_edge.engine.provider import types as t
from pixano_edge.engine.provider import video_types as v

_NONE = "required"

_TABLE = {
    t.ModelConfig: [("name", _NONE), ("task", _NONE), ("path", None), ("config", {}), ("processor_config", {})],
    t.ModelInfo: [
        ("name", _NONE),
        ("task", _NONE),
        ("model_path", None),
        ("model_class", None),
        ("provider", None),
        ("status", None),
    ],
    t.ProviderCapabilities: [
        ("tasks", _NONE),
        ("supports_batching", False),
        ("supports_streaming", False),
        ("max_image_size", None),
    ],
    t.CompressedRLEData: [("size", _NONE), ("counts", _NONE)],
    t.NDArrayData: [("values", _NONE), ("shape", _NONE)],
    t.ImageMaskGenerationInput: [
        ("image", _NONE),
        ("model", _NONE),
        ("image_embedding", None),
        ("high_resolution_features", None),
        ("reset_predictor", True),
        ("points", None),
        ("labels", None),
        ("boxes", None),
        ("num_multimask_outputs", 3),
        ("multimask_output", True),
        ("return_image_embedding", False),
    ],
    t.ImageMaskGenerationOutput: [
        ("masks", _NONE),
        ("scores", _NONE),
        ("image_embedding", None),
        ("high_resolution_features", None),
    ],
    t.VideoMaskGenerationInput: [
        ("video", _NONE),
        ("model", _NONE),
        ("objects_ids", _NONE),
        ("frame_indexes", _NONE),
        ("points", None),
        ("labels", None),
        ("boxes", None),
    ],
    t.VideoMaskGenerationOutput: [("objects_ids", _NONE), ("frame_indexes", _NONE), ("masks", _NONE)],
    t.ImageZeroShotDetectionInput: [
        ("image", _NONE),
        ("model", _NONE),
        ("classes", _NONE),
        ("box_threshold", 0.5),
        ("text_threshold", 0.5),
    ],
    t.ImageZeroShotDetectionOutput: [("boxes", _NONE), ("scores", _NONE), ("classes", _NONE)],
    t.UsageInfo: [("prompt_tokens", _NONE), ("completion_tokens", _NONE), ("total_tokens", _NONE)],
    t.TextImageConditionalGenerationInput: [
        ("model", _NONE),
        ("prompt", _NONE),
        ("images", None),
        ("max_new_tokens", 100),
        ("temperature", 1.0),
    ],
    t.TextImageConditionalGenerationOutput: [("generated_text", _NONE), ("usage", _NONE), ("generation_config", {})],
    t.ImageMaskGenerationResult: [
        ("data", _NONE),
        ("timestamp", _NONE),
        ("processing_time", _NONE),
        ("metadata", _NONE),
        ("id", ""),
        ("status", "SUCCESS"),
    ],
    t.VideoMaskGenerationResult: [
        ("data", _NONE),
        ("status", _NONE),
        ("timestamp", _NONE),
        ("processing_time", _NONE),
        ("metadata", _NONE),
        ("id", ""),
    ],
}
_TABLE[t.ImageZeroShotDetectionResult] = _TABLE[t.ImageMaskGenerationResult]
_TABLE[t.TextImageConditionalGenerationResult] = _TABLE[t.ImageMaskGenerationResult]

_SEED_SERVER_INFO = {"version", "models_loaded", "num_gpus", "gpu_info", "models", "models_to_task", "ready"}
_SECOND_SERVER_INFO = {
    "app_name",
    "app_version",
    "app_description",
    "num_cpus",
    "num_gpus",
    "num_nodes",
    "gpus_used",
    "gpu_to_model",
    "models",
    "models_to_task",
}


def _described(cls: type) -> list[tuple[str, object]]:
    out = []
    for f in fields(cls):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        out.append((f.name, _NONE if default is MISSING else default))
    return out


@pytest.mark.parametrize("cls", list(_TABLE), ids=lambda c: c.__name__)
def test_fields(cls: type) -> None:
    assert _described(cls) == _TABLE[cls]


def test_additions_come_last() -> None:
    plain = _TABLE[t.ImageMaskGenerationInput]
    newer = [("mask_input", None), ("return_logits", False)]
    own = [("answer_arrays", False), ("echoed", None), ("embedding_handle", None), ("wants_embedding", None)]
    assert _described(t.EdgeMaskGenerationInput) == [*plain, *newer, *own]
    output = _TABLE[t.ImageMaskGenerationOutput]
    assert _described(t.EdgeMaskGenerationOutput) == [*output, ("mask_logits", None), ("embedding_key", None)]
    video = _TABLE[t.VideoMaskGenerationInput]
    newer = [("propagate", True), ("interval", None), ("keyframes", None)]
    assert _described(v.EdgeVideoMaskGenerationInput) == [*video, *newer]
    assert _described(v.EdgeVideoMaskGenerationOutput) == [*_TABLE[t.VideoMaskGenerationOutput], ("frames", [])]


def test_job_status_is_that_of_pixano_0_8() -> None:
    assert _described(v.VideoMaskGenerationJobStatus) == [
        ("job_id", _NONE), ("status", _NONE), ("detail", None), ("data", None), ("metadata", {}), ("timestamp", None),
        ("processing_time", 0.0),
    ]  # fmt: skip
    assert (v.RUNNING, v.COMPLETED, v.FAILED, v.CANCELED) == ("running", "completed", "failed", "canceled")


def test_tracked_objects_as_json() -> None:
    tracked = v.TrackedObject(3, t.CompressedRLEData([2, 3], b"06"), 0.5, [0.0, 1.0, 2.0, 2.0])
    expected = {
        "track_id": 3, "box": [0.0, 1.0, 2.0, 2.0], "score": 0.5, "class_name": None,
        "mask": {"size": [2, 3], "counts": "06"},
    }  # fmt: skip
    assert json.loads(json.dumps(tracked.to_dict())) == expected
    both = v.EdgeVideoMaskGenerationOutput.of([v.TrackedFrame(7, [tracked, tracked]), v.TrackedFrame(6)])
    assert (both.objects_ids, both.frame_indexes, len(both.masks)) == ([3, 3], [7, 7], 2)


def test_tasks() -> None:
    assert {task.name: task.value for task in t.InferenceTask} == {
        "MASK_GENERATION": "image_mask_generation",
        "VIDEO_MASK_GENERATION": "video_mask_generation",
        "OBJECT_DETECTION": "image_zero_shot_detection",
        "TEXT_GENERATION": "text_image_conditional_generation",
    }
    assert t.InferenceTask("image_mask_generation") == "image_mask_generation"


def test_server_info_is_a_superset_of_both_revisions_with_defaults() -> None:
    names = {f.name for f in fields(t.ServerInfo)}
    assert names >= _SEED_SERVER_INFO | _SECOND_SERVER_INFO
    info = t.ServerInfo(version="1", num_cpus=2)
    assert (info.models, info.gpu_info, info.ready) == ([], {}, False)


def test_model_config_to_dict() -> None:
    from pathlib import Path

    config = t.ModelConfig("a", "image_mask_generation", Path("b/c"), {"device": "cpu"})
    assert config.to_dict() == {
        "name": "a",
        "task": "image_mask_generation",
        "path": "b/c",
        "config": {"device": "cpu"},
        "processor_config": {},
    }
    assert t.ModelConfig("a", "x").config is not t.ModelConfig("a", "x").config


def test_rle_text_and_bytes() -> None:
    rle = t.CompressedRLEData.from_dict({"size": [2, 3], "counts": "15"})
    assert rle.counts == b"15"
    assert rle.to_dict() == {"size": [2, 3], "counts": "15"}
    assert t.CompressedRLEData.from_dict({"size": [2, 3], "counts": b"15"}) == rle


def test_array_round_trip_is_exact_and_in_c_order() -> None:
    # More elements than one conversion step, and not C-contiguous.
    array = np.random.default_rng(0).normal(size=(7, 131, 53)).astype(np.float32).transpose(2, 0, 1)
    data = t.NDArrayData.from_array(array)
    assert type(data.values) is list
    assert type(data.values[0]) is float
    assert data.shape == [53, 7, 131]
    assert data.values[1] == float(array[0, 0, 1])
    back = t.NDArrayData.from_dict(data.to_dict()).to_array()
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(
    ("values", "shape"),
    [([1.0, 2.0], [3]), ([1.0], [-1]), (["x"], [1]), ([[1.0], [2.0]], [2]), ([], [1])],
)
def test_array_refuses_what_does_not_fit(values: list[object], shape: list[int]) -> None:
    with pytest.raises(ValueError, match=r"."):
        t.NDArrayData(values, shape).to_array()  # type: ignore[arg-type]


def test_results_take_positions() -> None:
    now = datetime.now(timezone.utc)
    video = t.VideoMaskGenerationResult(t.VideoMaskGenerationOutput([], [], []), "SUCCESS", now, 0.1, {})
    assert (video.status, video.timestamp, video.id) == ("SUCCESS", now, "")
