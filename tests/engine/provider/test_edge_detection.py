"""Detection requests against a fake detector: boxes, names, refusals, timeouts, memory, and a free event loop."""

from __future__ import annotations

import asyncio
from datetime import timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pixano_edge.engine.errors import DeviceMemoryError
from pixano_edge.engine.models.detection.base import MAX_CLASS_LENGTH, Detections
from pixano_edge.engine.provider import (
    EdgeProvider,
    ImageMaskGenerationInput,
    ImageZeroShotDetectionInput,
    InferenceTask,
    InferenceTimeoutError,
    InvalidRequestError,
    ModelBusyError,
    ModelConfig,
    ModelNotFoundError,
    OutOfMemoryError,
    TaskNotSupportedError,
    models,
)
from pixano_edge.engine.provider.detection import read_classes, whole_pixels
from pixano_edge.engine.provider.needs import Declared
from pixano_edge.engine.runtime.memory import MemoryUse

from .fakes import FakeOpener, add_bundle, data_uri, make_provider, png, until

_WIDTH, _HEIGHT = 161, 97  # not square, so that swapped axes show
_IMAGE = data_uri(png(_WIDTH, _HEIGHT))
_DETECTION, _MASKS = "image_zero_shot_detection", "image_mask_generation"
_CONFIG = ModelConfig("owl", _DETECTION)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with a detector of each family and a SAM 2."""
    add_bundle(tmp_path, "alpha")
    add_bundle(tmp_path, "owl", family="owlv2")
    add_bundle(tmp_path, "older", family="owlvit")
    add_bundle(tmp_path, "dino", family="grounding-dino")
    return tmp_path


def _request(**fields: Any) -> ImageZeroShotDetectionInput:
    return ImageZeroShotDetectionInput(**{"image": _IMAGE, "model": "owl", "classes": ["cat", "dog"], **fields})


async def _ask(provider: EdgeProvider, **fields: Any) -> Any:
    return (await provider.image_zero_shot_detection(input_data=_request(**fields), timeout=20)).data


async def test_one_answer(provider: EdgeProvider, opener: FakeOpener) -> None:
    result = await provider.image_zero_shot_detection(_request(box_threshold=0.2, text_threshold=0.1))
    assert (result.status, result.metadata["model_name"], result.metadata["device"]) == ("SUCCESS", "owl", "cpu")
    assert result.metadata["model_class"] == "Owlv2Detector"
    assert result.id
    assert result.timestamp.tzinfo is timezone.utc
    assert 0 < result.processing_time < 20
    # 80.5 rounds to the even neighbour, 24.25 and 72.75 to the nearest
    assert result.data.boxes == [[0, 24, 80, 73], [80, 24, 161, 73]]
    assert {type(v) for box in result.data.boxes for v in box} == {int}
    assert result.data.scores == pytest.approx([0.9, 0.8])
    assert {type(score) for score in result.data.scores} == {float}
    assert result.data.classes == ["cat", "dog"]
    (detector,) = opener.detectors
    assert detector.images[0].shape == (_HEIGHT, _WIDTH, 3)
    assert tuple(detector.images[0][0, 0]) == (10, 20, 30)
    assert detector.asked == [{"classes": ("cat", "dog"), "box": 0.2, "text": 0.1, "nms": None, "limit": None}]


async def test_thresholds_are_pixanos_defaults(provider: EdgeProvider, opener: FakeOpener) -> None:
    await _ask(provider)
    await provider.image_zero_shot_detection(
        SimpleNamespace(image=png(), model="owl", classes=["cat"], box_threshold=None)  # type: ignore[arg-type]
    )
    assert [(a["box"], a["text"]) for a in opener.detectors[0].asked] == [(0.5, 0.5)] * 2


async def test_names_are_those_of_the_boxes(provider: EdgeProvider) -> None:
    data = await _ask(provider, classes=["no cat", "remote control", "no dog", "naïve 猫 🐈"])
    assert data.classes == ["remote control", "naïve 猫 🐈"]
    assert len(data.boxes) == len(data.scores) == 2


async def test_nothing_found(provider: EdgeProvider) -> None:
    data = await _ask(provider, classes=["no cat"])
    assert (data.boxes, data.scores, data.classes) == ([], [], [])


async def test_boxes_stay_within_the_image(
    provider: EdgeProvider, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    await provider.instantiate_model("edge", _CONFIG)
    boxes = np.array([[-3.0, 0.4, 161.6, 97.0], [0.0, 0.0, 161.0, 97.49]], np.float32)
    found = Detections(boxes, np.ones(2, np.float32), np.zeros(2, np.int64), ("cat",))
    monkeypatch.setattr(opener.detectors[0], "detect", lambda *_, **__: found)
    assert (await _ask(provider)).boxes == [[0, 0, 161, 97], [0, 0, 161, 97]]


@pytest.mark.parametrize(
    ("box", "whole"),
    [
        ((10.1, 20.1, 10.4, 30.0), [10, 20, 11, 30]),
        ((10.6, 20.1, 11.4, 30.0), [11, 20, 12, 30]),  # its middle is at 11.0
        ((10.0, 20.6, 30.0, 20.6), [10, 20, 30, 21]),
        ((160.7, 96.8, 161.0, 97.0), [160, 96, 161, 97]),
        ((161.0, 0.0, 161.0, 97.0), [160, 0, 161, 97]),
        ((0.0, 0.0, 0.2, 0.3), [0, 0, 1, 1]),
    ],
)
def test_thin_boxes_keep_a_pixel(box: tuple[float, ...], whole: list[int]) -> None:
    both = np.array([box, (2.0, 3.0, 50.0, 60.0)], np.float32)
    assert whole_pixels(both, (_HEIGHT, _WIDTH)).tolist() == [whole, [2, 3, 50, 60]]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("cat", ("cat",)),
        ("cat. remote control.", ("cat", "remote control")),
        ("cat . dog .", ("cat", "dog")),
        ("cat.dog", ("cat", "dog")),
        ("a 2.5 mm screw. nut", ("a 2.5 mm screw", "nut")),
        ("channel 5.", ("channel 5",)),
        ("cat, remote control", ("cat", "remote control")),
        ("black, shiny car. dog.", ("black, shiny car", "dog")),
        (" , ", ()),
        ("", ()),
        (["a. b", " c "], ("a. b", " c ")),
        (("cat", "cat"), ("cat", "cat")),
        (np.array(["cat", "dog"]), ("cat", "dog")),
    ],
)
def test_classes(given: Any, read: tuple[str, ...]) -> None:
    assert read_classes(given) == read


_BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no classes": ({"classes": []}, InvalidRequestError, "no classes"),
    "empty text": ({"classes": ""}, InvalidRequestError, "no classes"),
    "only dots": ({"classes": " . . "}, InvalidRequestError, "no classes"),
    "none": ({"classes": None}, InvalidRequestError, "NoneType"),
    "number": ({"classes": 3}, InvalidRequestError, "got int"),
    "bytes": ({"classes": b"cat"}, InvalidRequestError, "got bytes"),
    "mapping": ({"classes": {"cat": 1}}, InvalidRequestError, "got dict"),
    "no strings": ({"classes": ["cat", 3]}, InvalidRequestError, "list of strings"),
    "nested": ({"classes": [["cat"]]}, InvalidRequestError, "list of strings"),
    "empty class": ({"classes": ["cat", " "]}, InvalidRequestError, "Class 1 is empty"),
    "long class": ({"classes": ["c" * (MAX_CLASS_LENGTH + 1)]}, InvalidRequestError, "characters"),
    "half a character": ({"classes": ["cat", "\ud83d"]}, InvalidRequestError, "Class 1 .* half a character"),
    "1001 classes": ({"classes": [f"class {i}" for i in range(1001)]}, InvalidRequestError, "1001 classes"),
    "box above 1": ({"box_threshold": 1.01}, InvalidRequestError, "box_threshold must be 0 to 1"),
    "box below 0": ({"box_threshold": -0.1}, InvalidRequestError, "box_threshold must be 0 to 1"),
    "box nan": ({"box_threshold": float("nan")}, InvalidRequestError, "box_threshold must be 0 to 1"),
    "box text": ({"box_threshold": "0.5"}, InvalidRequestError, "box_threshold must be a number"),
    "box bool": ({"box_threshold": True}, InvalidRequestError, "box_threshold must be a number"),
    "text above 1": ({"text_threshold": 25}, InvalidRequestError, "text_threshold must be 0 to 1"),
    "text list": ({"text_threshold": [0.5]}, InvalidRequestError, "text_threshold must be a number"),
    "no image": ({"image": data_uri(b"")}, InvalidRequestError, "0 bytes"),
    "truncated": ({"image": data_uri(png(64, 64)[:-30])}, InvalidRequestError, "truncated or damaged"),
    "no image file": ({"image": data_uri(b"hello")}, InvalidRequestError, "not an image"),
    "12000x9000": ({"image": data_uri(png(12000, 9000, 0, "1"))}, InvalidRequestError, "12000x9000"),
    "url": ({"image": "https://example.org/a.png"}, InvalidRequestError, "not fetched"),
    "image none": ({"image": None}, InvalidRequestError, "NoneType"),
    "unknown model": ({"model": "gamma"}, ModelNotFoundError, "Known: alpha, dino, older, owl"),
    "no model": ({"model": None}, InvalidRequestError, "name of a model"),
    "mask model": ({"model": "alpha"}, TaskNotSupportedError, "'alpha' does image_mask_generation, not"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(_BAD))
async def test_bad_input_gets_one_clear_error_and_the_provider_goes_on(provider: EdgeProvider, case: str) -> None:
    fields, error, message = _BAD[case]
    with pytest.raises(error, match=message) as caught:
        await _ask(provider, **fields)
    assert type(caught.value) is error
    assert caught.value.action  # type: ignore[attr-defined]
    assert len(str(caught.value)) < 500
    assert (await _ask(provider)).classes == ["cat", "dog"]


async def test_bad_classes_cost_no_decoding(provider: EdgeProvider) -> None:
    with pytest.raises(InvalidRequestError, match="no classes"):
        await _ask(provider, classes=[], image=data_uri(b"hello"))


async def test_a_thousand_classes(provider: EdgeProvider) -> None:
    names = [f"class {i}" for i in range(1000)]
    data = await _ask(provider, classes=names)
    assert data.classes == names
    assert len(data.boxes) == 1000


@pytest.mark.parametrize(
    "content", [png(1, 1), png(30, 20, (1, 2, 3, 4), "CMYK", "TIFF"), png(30, 20, 7, "L"), png(30, 20, 40000, "I;16")],
    ids=["1x1", "cmyk", "gray", "16 bit"],
)  # fmt: skip
async def test_unusual_images(provider: EdgeProvider, opener: FakeOpener, content: bytes) -> None:
    data = await _ask(provider, image=data_uri(content), classes=["cat"])
    height, width, channels = opener.detectors[0].images[0].shape
    assert channels == 3
    ((x1, _, x2, y2),) = data.boxes
    assert (x1, x2) == (0, width)
    assert y2 <= height


async def test_foreign_dataclasses_and_the_name_of_later_versions(provider: EdgeProvider) -> None:
    request: Any = SimpleNamespace(image=png(_WIDTH, _HEIGHT), model="dino", classes="cat. dog.", frobnicate=1)
    result = await provider.detection(request, timeout=20)
    assert result.data.classes == ["cat", "dog"]
    assert result.metadata["model_class"] == "GroundingDinoDetector"


async def test_text_is_kept_for_the_same_classes(provider: EdgeProvider, opener: FakeOpener) -> None:
    for classes in (["cat"], ["cat"], ["dog"], ["cat"]):
        assert (await _ask(provider, classes=classes)).classes == classes
    assert opener.detectors[0].text_cache.texts == 2


async def test_listing(provider: EdgeProvider, opener: FakeOpener) -> None:
    listed = [(m.name, m.task, m.model_class) for m in await provider.list_models()]
    detectors = [
        ("dino", _DETECTION, "GroundingDinoDetector"),
        ("older", _DETECTION, "Owlv2Detector"),
        ("owl", _DETECTION, "Owlv2Detector"),
    ]
    assert listed == [("alpha", _MASKS, "Sam2ImagePredictor"), *detectors]
    assert [m.name for m in await provider.list_models(InferenceTask.OBJECT_DETECTION)] == ["dino", "older", "owl"]
    tasks = (await provider.get_capabilities()).tasks
    assert tasks == [InferenceTask.MASK_GENERATION, InferenceTask.OBJECT_DETECTION]
    assert opener.tasks == []
    await _ask(provider)
    again = [(m.name, m.task, m.model_class) for m in await provider.list_models()]
    assert again == listed
    for name in ("dino", "older", "owl"):
        await provider.delete_model(name)
    assert (await provider.get_capabilities()).tasks == [InferenceTask.MASK_GENERATION]


async def test_load_list_and_delete_by_another_name(provider: EdgeProvider, opener: FakeOpener, root: Path) -> None:
    await provider.instantiate_model("edge", ModelConfig("mine", _DETECTION, root / "dino"))
    (info,) = [m for m in await provider.list_models() if m.name == "mine"]
    assert (info.task, info.model_class, info.model_path) == (_DETECTION, "GroundingDinoDetector", "test/dino")
    facts = await provider.get_server_info()
    assert facts.models_to_task["mine"] == _DETECTION
    assert (facts.models_loaded, facts.gpu_info["model_to_device"]) == (1, {"mine": "cpu"})
    assert (await _ask(provider, model="mine")).classes == ["cat", "dog"]
    await provider.delete_model("mine")
    assert opener.detectors[0].closed
    with pytest.raises(ModelNotFoundError):
        await _ask(provider, model="mine")


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("owl", _MASKS, r"\(owlv2\) does image_zero_shot_detection, not image_mask_generation"),
        ("dino", "video_mask_generation", "does image_zero_shot_detection, not video_mask_generation"),
        ("alpha", _DETECTION, "does image_mask_generation, not image_zero_shot_detection"),
    ],
)
async def test_other_tasks_are_refused(provider: EdgeProvider, name: str, task: str, message: str) -> None:
    with pytest.raises(TaskNotSupportedError, match=message):
        await provider.instantiate_model("edge", ModelConfig(name, task))


async def test_a_detector_makes_no_masks_and_no_tracks(provider: EdgeProvider) -> None:
    await provider.instantiate_model("edge", _CONFIG)
    for name in ("owl", "dino"):  # loaded and not
        with pytest.raises(TaskNotSupportedError, match=f"'{name}' does {_DETECTION}") as caught:
            await provider.image_mask_generation(ImageMaskGenerationInput(_IMAGE, name, points=[[[1, 1]]]))
        assert "track" not in caught.value.action
        request: Any = SimpleNamespace(
            video=[_IMAGE], model=name, objects_ids=[1], frame_indexes=[0], points=[[[1, 1]]]
        )
        with pytest.raises(TaskNotSupportedError, match=f"'{name}' does {_DETECTION}"):
            await provider.video_mask_generation(request)


async def test_the_event_loop_stays_free(provider: EdgeProvider, opener: FakeOpener) -> None:
    await provider.instantiate_model("edge", _CONFIG)
    detector = opener.detectors[0]
    detector.gate.clear()
    request = asyncio.create_task(provider.image_zero_shot_detection(_request()))
    # Only this coroutine opens the gate, so a call that blocked the loop would never get past it.
    for _ in range(40):
        await asyncio.sleep(0.005)
    assert detector.entered.is_set()
    assert not request.done()
    assert (await provider.list_models())[0].name == "alpha"
    detector.gate.set()
    await request


async def test_timeout_and_the_answer_after_it(provider: EdgeProvider, opener: FakeOpener) -> None:
    await provider.instantiate_model("edge", _CONFIG)
    detector = opener.detectors[0]
    detector.gate.clear()
    with pytest.raises(InferenceTimeoutError, match=r"Detection with model 'owl' took longer than 0\.05 s"):
        await provider.image_zero_shot_detection(_request(classes=["late"]), timeout=0.05)
    with pytest.raises(InferenceTimeoutError):
        await provider.image_zero_shot_detection(_request(classes=["never"]), timeout=0.02)
    later = asyncio.create_task(provider.image_zero_shot_detection(_request(classes=["cat"])))
    await asyncio.sleep(0.02)
    detector.gate.set()
    assert (await later).data.classes == ["cat"]
    # What left the queue never ran, and what ran stopped at its next step.
    assert [a["classes"] for a in detector.asked] == [("cat",)]


async def test_delete_during_a_request(provider: EdgeProvider, opener: FakeOpener) -> None:
    await provider.instantiate_model("edge", _CONFIG)
    detector = opener.detectors[0]
    detector.gate.clear()
    running = asyncio.create_task(provider.image_zero_shot_detection(_request()))
    await asyncio.to_thread(detector.entered.wait, 10)
    deleting = asyncio.create_task(provider.delete_model("owl"))
    await asyncio.sleep(0.05)
    assert not deleting.done()
    assert not detector.closed
    with pytest.raises(ModelNotFoundError):  # at once, although the store still has it
        await _ask(provider)
    detector.gate.set()
    assert (await running).data.classes == ["cat", "dog"]
    await deleting
    assert detector.closed


async def test_a_full_queue_answers_at_once(root: Path, opener: FakeOpener) -> None:
    provider = make_provider(root, opener, queue_depth=2)
    await provider.instantiate_model("edge", _CONFIG)
    opener.detectors[0].gate.clear()
    waiting = [asyncio.create_task(provider.image_zero_shot_detection(_request())) for _ in range(2)]
    await asyncio.to_thread(opener.detectors[0].entered.wait, 10)
    await asyncio.sleep(0.02)
    with pytest.raises(ModelBusyError, match="2 requests wait"):
        await _ask(provider)
    opener.detectors[0].gate.set()
    await asyncio.gather(*waiting)
    await provider.close()


async def test_all_of_a_models_work_is_on_one_thread(provider: EdgeProvider, opener: FakeOpener) -> None:
    await asyncio.gather(*(_ask(provider) for _ in range(8)))
    assert opener.detectors[0].threads == {"pixano-edge-owl_0"}
    assert len(opener.detectors) == 1


@pytest.mark.parametrize("raised", [MemoryError(), DeviceMemoryError("no room for the image", "use a smaller one")])
async def test_out_of_memory_drops_the_text_and_the_model_goes_on(
    provider: EdgeProvider, opener: FakeOpener, raised: Exception
) -> None:
    await _ask(provider)
    detector = opener.detectors[0]

    def exhausted() -> None:
        raise raised

    detector.on_detect = exhausted
    with pytest.raises(OutOfMemoryError, match="'owl' could not answer"):
        await _ask(provider)
    assert detector.text_cache.cleared == 1
    detector.on_detect = lambda: None
    assert (await _ask(provider)).classes == ["cat", "dog"]
    assert detector.text_cache.texts == 2


async def test_what_it_takes_is_in_the_books_and_it_makes_room(
    root: Path, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bundles of these tests hold no graphs that needs could be read from.
    monkeypatch.setattr(models, "declared", lambda *_: Declared(MemoryUse(weights=10_000_000)))
    provider = make_provider(root, opener, memory_limits={"cpu": 50_000_000}, cache_mb=0)
    await _ask(provider)
    opener.detectors[0].use = MemoryUse(weights=30_000_000, bindings=1000, caches=5)
    await _ask(provider)
    (account,) = [a for a in (await provider.get_server_info()).gpu_info["memory"] if a["device"] == "cpu"]
    (model,) = account["models"]
    assert model["model"] == "owl"
    opener.detectors[0].use = MemoryUse(weights=30_000_000, bindings=49_999_000, caches=5)
    await _ask(provider)
    await _ask(provider, model="dino")
    await asyncio.to_thread(until, lambda: opener.detectors[0].closed)  # it made room for the other
    unloaded = (await provider.get_server_info()).gpu_info["unloaded"]
    assert [u["model"] for u in unloaded] == ["owl"]
    listed = {m.name: (m.task, m.model_class) for m in await provider.list_models()}
    assert listed["owl"] == (_DETECTION, "Owlv2Detector")
    await _ask(provider)  # and comes back
    assert len(opener.detectors) == 3
    await provider.close()
