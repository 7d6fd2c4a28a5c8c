"""`segment`, `demo`, `info` and `verify` end to end on the tiny bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pixano_edge.engine.bundle import Bundle
from pixano_edge.engine.cli.auto_options import FLAGS
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.cli.segment import find_masks, output_stems
from pixano_edge.engine.models.images import decode_image
from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.models.sam2.automatic import AutomaticOptions, generate_masks
from pixano_edge.engine.models.sam2.predictor import Sam2ImagePredictor
from pixano_edge.engine.models.sam2.prompts import Prompt

SIZE = (90, 120)


def _invoke(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    path = tmp_path / "in" / "photo.png"
    path.parent.mkdir()
    coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC).save(path)
    return path


def _masks(out: Path) -> list[np.ndarray]:
    coco = json.loads((out / "annotations.json").read_text())
    return [
        decode_rle({**a["segmentation"], "counts": a["segmentation"]["counts"].encode()}) for a in coco["annotations"]
    ]


def test_one_click_writes_what_the_predictor_answers(photo: Path, tiny_bundle: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = _invoke("segment", photo, "--bundle", tiny_bundle, "--point", "60,40", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    with Sam2ImagePredictor.open(tiny_bundle) as predictor:
        answer = predictor.predict(decode_image(photo), [Prompt(points=[(60, 40)], labels=[1])], multimask=True)
    best = int(answer.scores[0].argmax())
    (mask,) = _masks(out)
    assert (mask == answer.masks[0, best]).all()
    stored = np.asarray(Image.open(out / "photo.mask.png"))
    assert (stored == mask * np.uint8(255)).all()
    overlay = np.asarray(Image.open(out / "photo.overlay.png"))
    assert overlay.shape == (*SIZE, 3)
    report = json.loads(result.stdout)
    (image,) = report["images"]
    assert image["masks"][0]["area"] == int(mask.sum())
    assert image["masks"][0]["score"] == pytest.approx(float(answer.scores[0, best]), abs=1e-5)
    assert report["failed"] == []
    assert sorted(p.name for p in out.iterdir()) == ["annotations.json", "photo.mask.png", "photo.overlay.png"]


def test_box_and_several_points_get_the_single_mask_output(photo: Path, tiny_bundle: Path):
    from pixano_edge.engine.cli.prompts import parse_prompts

    image = decode_image(photo)
    prompts = parse_prompts([], [], ["60,40", "10,10,80,70", "60,40 5,5,0"])
    with Sam2ImagePredictor.open(tiny_bundle) as predictor:
        found = find_masks(predictor, image, prompts)
        assert [f.prompt for f in found] == [0, 1, 2]
        asked = [p.to_prompt() for p in prompts]
        single = predictor.predict(image, asked, multimask=False)
        several = predictor.predict(image, asked, multimask=True)
        candidates = find_masks(predictor, image, prompts, multimask=True)
    assert (found[0].mask == several.masks[0, several.scores[0].argmax()]).all()
    assert (found[1].mask == single.masks[1, 0]).all()
    assert (found[2].mask == single.masks[2, 0]).all()
    assert [f.prompt for f in candidates] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for i in range(3):
        scores = [f.score for f in candidates if f.prompt == i]
        assert scores == sorted(scores, reverse=True)


def test_several_objects_become_an_index_image(photo: Path, tiny_bundle: Path, tmp_path: Path):
    out = tmp_path / "out"
    boxes = ("--box", "0,0,50,60", "--box", "60,20,110,80")
    assert _invoke("segment", photo, "--bundle", tiny_bundle, *boxes, "-o", out).exit_code == 0
    masks = _masks(out)
    assert len(masks) == 2
    with Image.open(out / "photo.mask.png") as picture:
        assert picture.mode == "P"
        index = np.asarray(picture)
    assert ((index > 0) == (masks[0] | masks[1])).all()


def test_multimask_writes_a_file_per_candidate(photo: Path, tiny_bundle: Path, tmp_path: Path):
    out = tmp_path / "out"
    args = ("--point", "60,40", "--multimask", "-o", out)
    assert _invoke("segment", photo, "--bundle", tiny_bundle, *args).exit_code == 0
    for number, mask in enumerate(_masks(out), 1):
        assert (np.asarray(Image.open(out / f"photo.mask-{number}.png")) == mask * np.uint8(255)).all()
    assert len(_masks(out)) == 3


# Random weights are never sure of anything: let everything pass.
EVERYTHING = ("--pred-iou", "0", "--stability", "0")


def test_automatic(photo: Path, demo_bundle: Path, tmp_path: Path):
    out = tmp_path / "out"
    args = ("--auto", "--points-per-side", "3", *EVERYTHING, "--crop-layers", "1", "-o", out, "--json")
    result = _invoke("segment", photo, "--bundle", demo_bundle, *args)
    assert result.exit_code == 0, result.output
    (image,) = json.loads(result.stdout)["images"]
    assert image["masks"]
    assert all(m["prompt"] is None for m in image["masks"])
    masks = _masks(out)
    assert len(masks) == len(image["masks"])
    annotations = json.loads((out / "annotations.json").read_text())["annotations"]
    options = AutomaticOptions(points_per_side=3, pred_iou_thresh=0, stability_score_thresh=0, crop_n_layers=1)
    with Sam2ImagePredictor.open(demo_bundle) as predictor:
        found = generate_masks(predictor, decode_image(photo), options)
    assert len(found) == len(masks)
    for one, mask, told, annotation in zip(found, masks, image["masks"], annotations):
        assert (one.mask == mask).all()
        record = one.record()
        for key in ("area", "bbox", "predicted_iou", "stability_score", "point_coords", "crop_box"):
            np.testing.assert_allclose(annotation[key], record[key], atol=1e-5)
            assert told[key] == annotation[key]
        assert told["score"] == pytest.approx(one.score, abs=1e-5)
        assert annotation["iscrowd"] == 0


def test_automatic_options_reach_the_model(
    photo: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from pixano_edge.engine.models.sam2 import automatic

    seen = []
    monkeypatch.setattr(automatic, "generate_masks", lambda *args, **kwargs: seen.append(args[2]) or [])
    given = {
        "points_per_side": 5,
        "points_per_batch": 7,
        "pred_iou_thresh": 0.1,
        "stability_score_thresh": 0.2,
        "stability_score_offset": 0.3,
        "mask_threshold": -0.4,
        "box_nms_thresh": 0.5,
        "crop_n_layers": 1,
        "crop_nms_thresh": 0.6,
        "crop_overlap_ratio": 0.15,
        "crop_n_points_downscale_factor": 2,
        "min_mask_region_area": 11,
        "min_area": 12,
        "use_m2m": True,
        "multimask_output": False,
    }
    flags = [v for k, value in given.items() for v in ([FLAGS[k]] if isinstance(value, bool) else [FLAGS[k], value])]
    for extra in ((), flags):
        out = tmp_path / f"out{len(extra)}"
        result = _invoke("segment", photo, "--bundle", tiny_bundle, "--auto", "-o", out, *extra)
        assert result.exit_code == 0, result.output
        assert "no mask passed the filters; lower --stability" in result.stderr
    assert vars(seen[0]) == vars(AutomaticOptions())
    assert vars(seen[1]) == vars(AutomaticOptions(**given))


def test_automatic_shows_its_clicks(photo: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from contextlib import contextmanager

    from pixano_edge.engine.cli import segment
    from pixano_edge.engine.cli.output import Steps

    steps: list[int] = []
    totals: list[tuple[int, bool]] = []

    @contextmanager
    def bar(label: str, total: int, enabled: bool = True):
        totals.append((total, enabled))
        yield Steps(advance=steps.append)

    monkeypatch.setattr(segment, "progress", bar)
    (photo.parent / "broken.png").touch()
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(photo.parent / "dot.png")
    args = ("--auto", "--points-per-side", "2", "--points-per-batch", "3", "--crop-layers", "1")
    result = _invoke("segment", photo.parent, "--bundle", tiny_bundle, *args, "-o", tmp_path / "out")
    assert result.exit_code == 1
    # Three files of 20 clicks each; one cannot be read, and the one of a pixel has no crops.
    assert totals == [(60, True)]
    assert sum(steps) == 60
    assert len(steps) > 10


def test_broken_files_in_a_folder_are_named_and_the_rest_is_written(photo: Path, tiny_bundle: Path, tmp_path: Path):
    folder, out = photo.parent, tmp_path / "out"
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes(photo.read_bytes()[:200])
    (folder / "notes.txt").write_text("not an image")
    shutil.copy(photo, folder / "zoo.png")
    result = _invoke("segment", folder, "--bundle", tiny_bundle, "--point", "60,40", "-o", out)
    assert result.exit_code == 1
    assert "empty.png" in result.stderr
    assert "cut.jpg" in result.stderr
    assert "2 of 4 file(s)" in result.stderr
    coco = json.loads((out / "annotations.json").read_text())
    assert [i["file_name"] for i in coco["images"]] == ["photo.png", "zoo.png"]
    assert (out / "zoo.overlay.png").is_file()


def test_one_bad_image_ends_with_1(tiny_bundle: Path, tmp_path: Path):
    (tmp_path / "empty.png").touch()
    args = ("--bundle", tiny_bundle, "--point", "1,1", "-o", tmp_path / "out", "--json")
    result = _invoke("segment", tmp_path / "empty.png", *args)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failed"][0]["file"] == "empty.png"


def test_equal_stems_get_their_suffix_back():
    files = [Path("a.jpg"), Path("a.png"), Path("b.png")]
    assert output_stems(files) == ["a.jpg", "a.png", "b"]
    files.append(Path("a.jpg.png"))  # without suffix it would be another's name
    assert output_stems(files) == ["a.jpg", "a.png", "b", "a.jpg.png"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((), "Say what to segment"),
        (("--auto", "--point", "1,1"), "--auto takes no"),
        (("--point", "1,1", "--crop-layers", "1", "--refine"), "--crop-layers, --refine works with --auto only"),
        (("--auto", "--pred-iou", "2"), "--pred-iou must be 0 to 1, got 2.0. Choose another value."),
        (("--auto", "--points-per-side", "0"), "--points-per-side must be a whole number, 1 to 256, got 0."),
        (("--auto", "--crop-layers", "9"), "--crop-layers must be a whole number, 0 to 4"),
        (
            ("--auto", "--points-per-side", "2", "--crop-layers", "2", "--crop-points-downscale", "2"),
            "Take more points, a smaller factor, or fewer crop layers.",
        ),
        (("--point", "1"), "x,y"),
    ],
)
def test_usage_errors(photo: Path, tiny_bundle: Path, tmp_path: Path, args: tuple[str, ...], text: str):
    result = _invoke("segment", photo, "--bundle", tiny_bundle, "-o", tmp_path / "out", *args)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_the_folder_of_the_images_is_not_written_to(photo: Path, tiny_bundle: Path):
    result = _invoke("segment", photo.parent, "--bundle", tiny_bundle, "--point", "1,1", "-o", photo.parent)
    assert result.exit_code == 2
    assert [p.name for p in photo.parent.iterdir()] == ["photo.png"]


def test_unknown_bundle_and_unknown_device(photo: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path))
    args = ("--point", "1,1", "-o", tmp_path / "out", "--json")
    result = _invoke("segment", photo, "--bundle", "nope", *args)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "BundleError"
    result = _invoke("segment", photo, "--bundle", tiny_bundle, "--device", "tpu", *args)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "DeviceError"


def test_segments_with_torch_blocked(photo: Path, tiny_bundle: Path, tmp_path: Path):
    argv = ["segment", str(photo), "--bundle", str(tiny_bundle), "--point", "60,40", "-o", str(tmp_path / "out")]
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'optimum', 'onnx', 'skimage'):\n    sys.modules[name] = None\n"
        "from pixano_edge.engine.cli.main import app\n"
        f"app({argv!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "photo.overlay.png").is_file()


def test_demo_writes_pictures_and_times(tiny_bundle: Path, tmp_path: Path):
    out = tmp_path / "demo"
    result = _invoke("demo", "--bundle", tiny_bundle, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    for picture in report["pictures"]:
        assert picture["objects"] >= 3
        assert picture["click_seconds"] > 0
        assert 0 <= picture["click_iou"] <= 1
        for name in picture["files"]:
            assert np.asarray(Image.open(out / name)).ndim == 3
    assert report["clip"] is None
    assert [w["picture"] for w in report["words"]] == [p["picture"] for p in report["pictures"]]
    for words in report["words"]:
        assert 0 <= words["found"] <= words["objects"]
        assert np.asarray(Image.open(out / words["file"])).ndim == 3
    assert len(report["answers"]) == 3 * 6  # five types of question and a caption
    assert all(a["exact"] == (a["answer"] == a["right"]) for a in report["answers"])
    assert sum(a["exact"] for a in report["answers"]) > 9  # no type's usual answer comes near
    table = _invoke("demo", "--bundle", tiny_bundle, "-o", out)
    assert "one click" in table.stdout
    for text in (report["clip_skipped"], table.stdout):
        assert "holds no graphs for video" in " ".join(text.split())
    assert str(out) in table.stdout.replace("\n", "")


def test_demo_pictures_are_the_generated_ones(tmp_path: Path):
    pytest.importorskip("skimage", reason="making scenes needs pixano-edge[benchmarks]")
    from pixano_edge.engine.cli.demo import demo_folder
    from pixano_edge.export.demo.pictures import make_pictures

    made = make_pictures(tmp_path)
    shipped = demo_folder()
    assert json.loads((tmp_path / "demo.json").read_text()) == json.loads((shipped / "demo.json").read_text())
    for path in made:
        new, old = np.asarray(Image.open(path), np.int16), np.asarray(Image.open(shipped / path.name), np.int16)
        # OpenCV versions round differently; other scenes would differ by tens of levels.
        assert np.abs(new - old).mean() < 0.5


def test_demo_tracks_its_clip(tracking_bundle: Path, tmp_path: Path):
    out = tmp_path / "demo"
    result = _invoke("demo", "--bundle", tracking_bundle, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    clip = json.loads(result.stdout)["clip"]
    assert clip["objects"] >= 3
    assert clip["fps"] > 0
    assert 0 <= clip["mean_iou"] <= 1
    strip = np.asarray(Image.open(out / "clip.strip.png"))
    assert strip.shape == (256, 6 * 256, 3)
    video, strip_name = clip["files"]
    assert (out / strip_name).is_file()
    written = cv2.VideoCapture(str(out / video))
    assert int(written.get(cv2.CAP_PROP_FRAME_COUNT)) == clip["frames"] == 40
    assert "frames per second" in _invoke("demo", "--bundle", tracking_bundle, "-o", out).stdout.replace("\n", " ")


def test_demo_without_its_clip_says_so(tracking_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pixano_edge.engine.cli import demo

    monkeypatch.setattr(demo, "read_clip", lambda folder: None)
    report = json.loads(_invoke("demo", "--bundle", tracking_bundle, "-o", tmp_path, "--json").stdout)
    assert report["clip"] is None
    assert "not in this installation" in report["clip_skipped"]


def test_demo_without_tokenizers_says_what_to_install(
    tracking_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    report = json.loads(_invoke("demo", "--bundle", tracking_bundle, "-o", tmp_path, "--json").stdout)
    assert report["words"] == []
    assert "pixano-edge[detection]" in report["words_skipped"]
    assert report["answers"] == []
    assert "pixano-edge[vlm]" in report["answers_skipped"]
    assert report["clip"] is not None


def test_demo_clip_is_the_generated_one():
    pytest.importorskip("skimage", reason="making clips needs pixano-edge[benchmarks]")
    from pixano_edge.engine.cli.demo import demo_folder
    from pixano_edge.engine.cli.demo_clip import read_clip
    from pixano_edge.engine.models.sam2_video.frames import open_frames
    from pixano_edge.export.demo.clips import first_prompts, generate_clip
    from pixano_edge.export.demo.demo_clip import LENGTH, suits

    shipped = read_clip(demo_folder())
    assert shipped is not None
    path, _, objects = shipped
    assert path.stat().st_size < 600_000
    seed = json.loads((demo_folder() / "clip.json").read_text())["seed"]
    clip = generate_clip(seed, "heldout", LENGTH)
    assert suits(clip)
    for made, kept in zip(first_prompts(clip), objects, strict=True):
        assert made.click == kept.click
        assert (clip.visible(made.index) == kept.truth).mean() > 0.999  # OpenCV versions round differently
    frames = open_frames(path)
    assert len(frames) == LENGTH
    for number in (0, LENGTH // 2, LENGTH - 1):
        # A lossy video of noisy frames; those of its neighbours differ by more.
        error, other = (
            np.abs(frames[number].astype(int) - clip.images[n]).mean() for n in (number, (number + 5) % LENGTH)
        )
        assert error < 8
        assert error < other


def test_demo_model_is_good_on_its_pictures(demo_bundle: Path, tmp_path: Path):
    start = time.process_time()
    report = json.loads(_invoke("demo", "--bundle", demo_bundle, "-o", tmp_path / "demo", "--json").stdout)
    # Processor time: the bar of 20 s is for a quiet machine, which a test cannot ask for.
    assert time.process_time() - start < 20
    assert np.mean([p["click_iou"] for p in report["pictures"]]) > 0.7
    assert np.mean([p["box_iou"] for p in report["pictures"]]) > 0.8


def test_verify_passes_and_fails(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    result = _invoke("verify", tiny_bundle, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["min_iou"] >= 0.999
    assert "Passed" in _invoke("verify", tiny_bundle).stdout

    # Negative control: a decoder that puts clicks elsewhere is caught.
    from pixano_edge.engine.models.sam2 import verify

    real = verify.build_prompts

    def shifted(*args, **kwargs):
        batches = real(*args, **kwargs)
        for batch in batches:
            batch.point_coords[:] += 8
        return batches

    monkeypatch.setattr(verify, "build_prompts", shifted)
    result = _invoke("verify", tiny_bundle, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"]
    assert "problem:" in _invoke("verify", tiny_bundle).stdout


def test_info_of_the_machine_and_of_a_bundle(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIXANO_EDGE_HOME", str(tmp_path))
    machine = json.loads(_invoke("info", "--json").stdout)
    assert machine["host"]["cpu"]
    assert machine["store"] == str(tmp_path / "bundles")
    assert "This machine" in _invoke("info").stdout

    result = _invoke("info", tiny_bundle, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["hash"] == Bundle.open(tiny_bundle).hash
    assert facts["variants"] == ["fp32", "fp16"]
    assert facts["engine"]["image_encoder"]["provider"] == "CPUExecutionProvider"
    assert facts["parity"]["passed"] is True
    assert facts["warnings"] == []
    assert facts["memory"]["parts"]["activations"] > 0
    assert facts["memory"]["sources"] == dict.fromkeys(("weights", "work"), "measured at export, on a CPU")
    table = _invoke("info", tiny_bundle).stdout
    assert "(measured at export, on a CPU), bound tensors" in " ".join(table.split())
    assert "worst relative error" in table
    assert "Apache-2.0" in table


def test_info_warns_when_it_does_not_open_here(tiny_bundle: Path):
    facts = json.loads(_invoke("info", tiny_bundle, "--precision", "int4", "--json").stdout)
    assert "int4" in facts["engine_error"]
    assert any("does not open here" in w for w in facts["warnings"])
