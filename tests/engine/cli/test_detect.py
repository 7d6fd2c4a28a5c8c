"""`detect` end to end against a fake detector, and against the demo's SAM 2 for the masks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pixano_edge.engine.cli import detect as command
from pixano_edge.engine.cli.detect import find_boxes, parse_classes
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.models.detection import opening
from pixano_edge.engine.models.detection.base import MAX_CLASS_LENGTH, Detections
from pixano_edge.engine.models.rle import decode_rle
from tests.support.fake_detector import FakeDetector, FakeOneShotDetector

SIZE = (90, 120)


def _invoke(*args: object):
    return CliRunner().invoke(app, ["detect", *(str(a) for a in args)])


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    path = tmp_path / "in" / "photo.png"
    path.parent.mkdir()
    coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC).save(path)
    return path


class _Opened:
    """What `detect` opened: the detectors and how they were asked for."""

    def __init__(self) -> None:
        self.kind: type[FakeDetector] = FakeOneShotDetector
        self.family = "owlv2"
        self.detectors: list[FakeDetector] = []
        self.asked: list[dict[str, Any]] = []

    def __call__(self, bundle: Any, **asked: Any) -> FakeDetector:
        self.asked.append(asked)
        self.detectors.append(self.kind())
        return self.detectors[-1]


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> _Opened:
    """The bundle ``fake``."""
    found = _Opened()
    monkeypatch.setattr(opening, "open_detector", found)
    real = command.open_bundle

    def open_bundle(name: str) -> Any:
        fake = SimpleNamespace(manifest=SimpleNamespace(name="fake", family=found.family))
        return fake if name == "fake" else real(name)

    monkeypatch.setattr(command, "open_bundle", open_bundle)
    return found


def _coco(out: Path) -> dict[str, Any]:
    return json.loads((out / "annotations.json").read_text())


def test_boxes_become_a_picture_and_coco(photo: Path, tmp_path: Path, opened: _Opened) -> None:
    out = tmp_path / "out"
    result = _invoke(photo, "--classes", "cat, no dog,remote control", "--bundle", "fake", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == ["annotations.json", "photo.overlay.png"]
    content = _coco(out)
    names = [(c["id"], c["name"]) for c in content["categories"]]
    assert names == [(1, "cat"), (2, "no dog"), (3, "remote control")]  # as asked, found or not
    first, second = content["annotations"]
    assert (first["category_id"], second["category_id"]) == (1, 3)
    assert (first["bbox"], second["bbox"]) == ([0, 22.5, 60, 45], [60, 22.5, 60, 45])
    assert (first["score"], first["area"], first["segmentation"], first["iscrowd"]) == (0.9, 2700, [], 0)
    assert content["images"] == [{"id": 1, "file_name": "photo.png", "width": 120, "height": 90}]

    report = json.loads(result.stdout)
    assert (report["bundle"], report["classes"], report["failed"]) == ("fake", ["cat", "no dog", "remote control"], [])
    assert [o["class"] for o in report["images"][0]["objects"]] == ["cat", "remote control"]
    assert report["segment_bundle"] is None
    picture, image = (np.asarray(Image.open(p).convert("RGB")) for p in (out / "photo.overlay.png", photo))
    assert picture.shape == (*SIZE, 3)
    changed = (picture != image).any(axis=2)
    assert changed[22, 70:110].all()  # upper line of the second box
    assert not changed[45, 70:110].any()  # its inside
    (detector,) = opened.detectors
    assert detector.closed
    asked = {"device": "auto", "backend": "auto", "precision": "auto", "threads": None, "force": False}
    assert opened.asked == [asked]


def test_coco_can_be_read_by_pycocotools(photo: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    out = tmp_path / "out"
    assert _invoke(photo, "--class", "cat", "--bundle", "fake", "-o", out, "--then-segment").exit_code == 0
    coco = COCO(str(out / "annotations.json"))
    (annotation,) = coco.loadAnns(coco.getAnnIds(catIds=coco.getCatIds(catNms=["cat"])))
    assert int(coco.annToMask(annotation).sum()) == annotation["area"]


@pytest.mark.parametrize(
    ("family", "args", "thresholds"),
    [
        ("owlv2", (), (0.1, 0.1)),
        ("grounding-dino", (), (0.35, 0.25)),
        ("owlvit", ("--box-threshold", "0.4"), (0.4, 0.1)),
        ("grounding-dino", ("--text-threshold", "0"), (0.35, 0.0)),
    ],
)
def test_thresholds(
    photo: Path, tmp_path: Path, opened: _Opened, family: str, args: tuple[str, ...], thresholds: tuple[float, float]
) -> None:
    opened.family = family
    more = ("--nms", "0.5", "--limit", "1")
    result = _invoke(photo, "--class", "a, b", "--class", "c", "--bundle", "fake", "-o", tmp_path / "o", *args, *more)
    assert result.exit_code == 0, result.output
    assert opened.detectors[0].asked == [
        {"classes": ("a, b", "c"), "box": thresholds[0], "text": thresholds[1], "nms": 0.5, "limit": 1}
    ]
    assert len(_coco(tmp_path / "o")["annotations"]) == 1


def test_then_segment_writes_the_masks_of_the_boxes(photo: Path, tmp_path: Path) -> None:
    from pixano_edge.engine.cli.options import open_bundle
    from pixano_edge.engine.models.images import decode_image
    from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
    from pixano_edge.engine.models.sam2.prompts import Prompt

    out = tmp_path / "out"
    args = ("--classes", "left, right", "--bundle", "fake", "--then-segment", "-o", out, "--json")
    result = _invoke(photo, *args)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == ["annotations.json", "photo.mask.png", "photo.overlay.png"]
    with Sam2ImagePredictor.open(open_bundle("sam2-demo")) as predictor:
        boxes = [[0, 22.5, 60, 67.5], [60, 22.5, 120, 67.5]]
        answer = predictor.predict(decode_image(photo), [Prompt(box=np.array(b)) for b in boxes], multimask=False)
    annotations = _coco(out)["annotations"]
    for index, annotation in enumerate(annotations):
        rle = annotation["segmentation"]
        mask = decode_rle({**rle, "counts": rle["counts"].encode()})
        assert (mask == answer.masks[index, 0]).all()
        assert annotation["area"] == int(mask.sum())
        assert annotation["mask_score"] == pytest.approx(float(answer.scores[index, 0]), abs=1e-5)
        assert annotation["bbox"] == [boxes[index][0], 22.5, 60, 45]  # the detector's
    report = json.loads(result.stdout)
    assert report["segment_bundle"] == "sam2-demo"
    assert report["segment_engine"]["precision"] == "fp32"
    assert report["images"][0]["mask_files"] == ["photo.mask.png"]
    assert "mask_score" in report["images"][0]["objects"][0]


def test_masks_in_groups_are_the_same(photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--classes", "a,b,c,d,e", "--bundle", "fake", "--then-segment")
    decoded, real = [], command.BoxMask.decode
    monkeypatch.setattr(command.BoxMask, "decode", lambda mask: (decoded.append(mask), real(mask))[1])
    assert _invoke(photo, *args, "-o", tmp_path / "whole").exit_code == 0
    assert len(decoded) == 2 * 5  # a mask is decoded for the numbers of the pixels, and for its contour
    monkeypatch.setattr(command, "_MASK_BYTES", 2 * SIZE[0] * SIZE[1])
    assert _invoke(photo, *args, "-o", tmp_path / "parts").exit_code == 0
    assert _coco(tmp_path / "whole") == _coco(tmp_path / "parts")


def test_nothing_found(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _invoke(photo, "--class", "no cat", "--bundle", "fake", "--then-segment", "-o", out)
    assert result.exit_code == 0, result.output
    assert _coco(out)["annotations"] == []
    assert not np.asarray(Image.open(out / "photo.mask.png")).any()
    assert (np.asarray(Image.open(out / "photo.overlay.png")) == np.asarray(Image.open(photo))).all()


def test_table(photo: Path, tmp_path: Path) -> None:
    result = _invoke(photo, "--classes", "cat,dog", "--bundle", "fake", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.startswith("photo.png"))
    assert "120x90" in line
    assert "0.900" in line
    assert line.endswith("cat 1, dog 1")
    assert "masks in" not in result.stdout


def test_one_shot(photo: Path, tmp_path: Path, opened: _Opened) -> None:
    example = tmp_path / "mug.png"
    Image.new("RGB", (30, 20), (1, 2, 3)).save(example)
    args = ("--bundle", "fake", "--json", "-o")
    result = _invoke(photo, "--like", example, "--like-box", "1,2,20,15", *args, tmp_path / "one")
    assert result.exit_code == 0, result.output
    ((image, box),) = opened.detectors[0].likes
    assert image.shape == (20, 30, 3)
    assert tuple(box) == (1, 2, 20, 15)
    assert [c["name"] for c in _coco(tmp_path / "one")["categories"]] == ["mug"]
    assert json.loads(result.stdout)["images"][0]["objects"][0]["class"] == "mug"

    assert _invoke(photo, "--like", example, "--class", "blue mug", *args, tmp_path / "two").exit_code == 0
    assert opened.detectors[1].likes[0][1] is None
    assert [c["name"] for c in _coco(tmp_path / "two")["categories"]] == ["blue mug"]


def test_without_a_bundle_the_demo_that_suits_the_question_is_taken(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    real = command.open_bundle

    def open_bundle(name: str) -> Any:
        names.append(name)
        return real("fake")

    monkeypatch.setattr(command, "open_bundle", open_bundle)
    assert _invoke(photo, "--class", "cat", "-o", tmp_path / "name").exit_code == 0
    assert _invoke(photo, "--like", photo, "-o", tmp_path / "example").exit_code == 0
    assert names == ["grounding-dino-demo", "owlv2-demo"]


def test_one_shot_needs_a_model_that_can(photo: Path, tmp_path: Path, opened: _Opened) -> None:
    opened.kind = FakeDetector
    result = _invoke(photo, "--like", photo, "--bundle", "fake", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "cannot look for an example" in result.stderr
    assert "OWLv2" in result.stderr
    assert opened.detectors[0].closed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Say what to look for"),
        (("--classes", " , "), "Say what to look for"),
        (("--class", "cat", "--like-box", "1,2,3,4"), "--like-box says where"),
        (("--like", "@photo", "--classes", "a,b"), "at most one --class"),
        (("--like", "@photo", "--like-box", "5,5,1,1"), "x1 > x0"),
        (("--like", "@photo", "--like-box", "5,5"), "takes x0,y0,x1,y1"),
        (("--class", "cat", "--box-threshold", "1.5"), "--box-threshold"),
        (("--class", "cat", "--limit", "0"), "--limit"),
        (("--class", "cat", "-o", "@folder"), "must not be the folder"),
        (("--like", "@photo", "--text-threshold", "0.5"), "has no meaning there"),
        (("--class", "cat", "--segment-bundle", "sam2-demo"), "give both"),
    ],
)
def test_refused_arguments(photo: Path, tmp_path: Path, opened: _Opened, args: tuple[str, ...], message: str) -> None:
    paths = {"@photo": photo, "@folder": photo.parent}
    out = () if "-o" in args else ("-o", tmp_path / "out")
    result = _invoke(photo, "--bundle", "fake", *(paths.get(a, a) for a in args), *out)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert opened.detectors == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--class", ""), "Class 0 is empty"),
        (("--class", "c" * (MAX_CLASS_LENGTH + 1)), "characters"),
        (("--classes", ",".join(f"c{i}" for i in range(1001))), "1001 classes"),
        (("--like", "absent.png"), "cannot be read"),
        (("--class", "cat", "--bundle", "no-such-bundle"), "no bundle 'no-such-bundle'"),
        (("--class", "cat", "--then-segment", "--segment-bundle", "no-such-bundle"), "no bundle 'no-such-bundle'"),
    ],
)
def test_errors_before_anything_is_opened(
    photo: Path, tmp_path: Path, opened: _Opened, args: tuple[str, ...], message: str
) -> None:
    bundle = () if "--bundle" in args else ("--bundle", "fake")
    result = _invoke(photo, *args, *bundle, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert message in result.stderr
    assert opened.detectors == []
    assert not (tmp_path / "out").exists()


def test_broken_files_in_a_folder_are_named_and_the_rest_is_written(photo: Path, tmp_path: Path) -> None:
    folder, out = photo.parent, tmp_path / "out"
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes(photo.read_bytes()[:200])
    (folder / "zoo.png").write_bytes(photo.read_bytes())
    result = _invoke(folder, "--bundle", "fake", "--class", "cat", "-o", out)
    assert result.exit_code == 1
    assert "Skipped empty.png" in result.stderr
    assert "2 of 4 file(s)" in result.stderr
    assert [i["file_name"] for i in _coco(out)["images"]] == ["photo.png", "zoo.png"]
    assert [a["image_id"] for a in _coco(out)["annotations"]] == [1, 2]
    assert (out / "zoo.overlay.png").is_file()


def test_boxes_outside_the_image_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = FakeDetector()
    boxes = np.array([[5, 5, 5, 9], [0, 0, 4, 4], [3, 0, 9, 0], [1, 1, 2, 2]], np.float32)
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    found = Detections(boxes, scores, np.array([0, 1, 0, 0]), ("a", "b"))
    monkeypatch.setattr(detector, "detect", lambda *_, **__: found)
    kept = find_boxes(detector, np.zeros((9, 9, 3), np.uint8), command.Query(("a", "b"), 0.1, 0.1))
    assert kept.boxes.tolist() == [[0, 0, 4, 4], [1, 1, 2, 2]]
    assert kept.names() == ["b", "a"]


def test_class_names() -> None:
    assert parse_classes("cat, remote control,cat,,", ["a, b", " dog "]) == ("cat", "remote control", "a, b", "dog")
    assert parse_classes(None, []) == ()
