"""`track` end to end on a tiny bundle: what is written, in which order, and what a failure or Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from typer.testing import CliRunner

from pixano_edge.engine.cli import track_files
from pixano_edge.engine.cli.main import app
from pixano_edge.engine.cli.track import Painter, plan_passes
from pixano_edge.engine.cli.track_files import MaskLog, OverlayWriter
from pixano_edge.engine.cli.track_prompts import parse_track_prompts
from pixano_edge.engine.models.rle import decode_rle
from pixano_edge.engine.models.sam2.prompts import Prompt
from pixano_edge.engine.models.sam2_video.model import Sam2VideoModel
from tests.support.tracking import moving_squares

FRAMES = 12


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, ["track", *(str(a) for a in args)])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "masks.jsonl").read_text().splitlines()]


def mask_of(entry: dict[str, Any]) -> np.ndarray:
    return decode_rle({**entry["segmentation"], "counts": entry["segmentation"]["counts"].encode()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of frames."""
    path = tmp_path / "clip"
    path.mkdir()
    for i, frame in enumerate(moving_squares(FRAMES)):
        Image.fromarray(frame).save(path / f"{i:03d}.png")
    return path


def test_forward_writes_what_the_tracker_answers(folder: Path, tracking_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mask = np.zeros((96, 144), np.uint8)
    mask[40:70, 100:120] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    asked = ("--point", "0:25,35", "--point", "0:5,5,0", "--box", "4=3:10,20,60,60", "--mask", f"2=0:{tmp_path}/m.png")
    result = invoke(folder, "--bundle", tracking_bundle, *asked, "-o", out, "--device", "cpu", "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    with Sam2VideoModel.open(tracking_bundle, "cpu", threads=1) as model, model.track(folder) as tracker:
        tracker.add_prompt(1, 0, Prompt(points=[(25, 35), (5, 5)], labels=[1, 0]))
        tracker.add_mask(2, 0, mask > 0)
        tracker.add_prompt(4, 3, Prompt(box=(10, 20, 60, 60)))
        wanted = list(tracker.propagate(0))
    got = lines(out)
    assert [r["frame"] for r in got] == list(range(FRAMES))
    assert [r["file_name"] for r in got] == [f"{i:03d}.png" for i in range(FRAMES)]
    for want, line in zip(wanted, got):
        assert [o["id"] for o in line["objects"]] == [1, 2, 4]
        for one, entry in zip(want.objects, line["objects"]):
            assert np.array_equal(mask_of(entry), one.mask)
            assert entry["area"] == int(one.mask.sum())
            assert entry["score"] == pytest.approx(one.score, abs=1e-4)
    report = json.loads(result.stdout)
    assert report["tracked_frames"] == FRAMES
    assert report["files"] == ["masks.jsonl", "coco-video.json", "youtube-vis.json", "overlay.mp4"]
    assert sorted(p.name for p in out.iterdir()) == sorted(report["files"])
    for entry, number in zip(report["objects"], (1, 2, 4)):
        shown = [r["frame"] for r in got for o in r["objects"] if o["id"] == number and o["area"]]
        assert (entry["id"], entry["frames"]) == (number, len(shown))
        assert (entry["first"], entry["last"]) == (shown[0], shown[-1])
    video = cv2.VideoCapture(str(out / "overlay.mp4"))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == FRAMES
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(25)


def test_coco_and_youtube_vis_hold_the_same_masks(folder: Path, tracking_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("--box", "3:10,20,60,60", "--box", "2=5:90,40,120,70", "--both", "--overlay", "none")
    assert invoke(folder, "--bundle", tracking_bundle, *asked, "-o", out).exit_code == 0
    written = lines(out)
    assert [r["frame"] for r in written] == [*range(3, FRAMES), 2, 1, 0], "as they were tracked"
    by_frame = {r["frame"]: {o["id"]: o for o in r["objects"]} for r in written}
    coco = COCO(out / "coco-video.json")
    assert [i["frame_id"] for i in coco.dataset["images"]] == list(range(FRAMES))
    assert coco.dataset["videos"] == [{"id": 1, "width": 144, "height": 96, "length": FRAMES, "name": "clip"}]
    present = 0
    for image in coco.dataset["images"]:
        annotations = coco.loadAnns(coco.getAnnIds([image["id"]]))
        want = {i: o for i, o in by_frame[image["frame_id"]].items() if o["area"]}
        assert {a["track_id"] for a in annotations} == set(want)
        for annotation in annotations:
            assert np.array_equal(coco.annToMask(annotation) > 0, mask_of(want[annotation["track_id"]]))
            assert annotation["score"] == want[annotation["track_id"]]["iou"]
            present += 1
    assert present > FRAMES
    vis = json.loads((out / "youtube-vis.json").read_text())
    assert vis["videos"][0]["file_names"] == [f"{i:03d}.png" for i in range(FRAMES)]
    assert [a["track_id"] for a in vis["annotations"]] == [1, 2]
    for annotation in vis["annotations"]:
        for frame in range(FRAMES):
            entry = by_frame[frame][annotation["track_id"]]
            found = annotation["segmentations"][frame]
            assert (found is None) == (entry["area"] == 0)
            if found is not None:
                assert np.array_equal(coco_mask.decode(found) > 0, mask_of(entry))
                assert annotation["areas"][frame] == entry["area"]
                assert annotation["bboxes"][frame] == entry["bbox"]
    assert not (out / "overlay.mp4").exists()


def test_backward_draws_in_the_order_of_the_clip(folder: Path, tracking_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("--point", "8:34,35", "--backward", "--start", 2, "--overlay", "png")
    assert invoke(folder, "--bundle", tracking_bundle, *asked, "-o", out).exit_code == 0
    assert [r["frame"] for r in lines(out)] == [8, 7, 6, 5, 4, 3, 2]
    pictures = sorted((out / "overlay").iterdir())
    assert [p.name for p in pictures] == [f"{i:06d}.png" for i in range(2, 9)]
    (entry,) = lines(out)[0]["objects"]
    plain, drawn = moving_squares(9)[8], np.asarray(Image.open(pictures[-1]))
    changed = (plain != drawn).any(axis=2)
    # The mask is tinted; outside of it only its contour and the mark of the click are drawn.
    assert changed[mask_of(entry)].all()
    assert changed[32:38, 30:38].all()


def test_a_video_file_keeps_its_fps_and_odd_sizes(tracking_bundle: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 12, (145, 97))
    for frame in moving_squares(5):
        writer.write(cv2.copyMakeBorder(frame, 0, 1, 0, 1, cv2.BORDER_REPLICATE))
    writer.release()
    out = tmp_path / "out"
    assert invoke(clip, "--bundle", tracking_bundle, "--point", "0:25,35", "-o", out, "--end", 3).exit_code == 0
    assert lines(out)[-1]["frame"] == 3
    video = cv2.VideoCapture(str(out / "overlay.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == 4
    assert json.loads((out / "youtube-vis.json").read_text())["annotations"][0]["segmentations"][4] is None


def test_pictures_as_a_list_and_without_a_codec(
    folder: Path, tracking_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoCodec:
        def __init__(self, *_: object) -> None:
            pass

        def isOpened(self) -> bool:
            return False

    monkeypatch.setattr(cv2, "VideoWriter", type("Writer", (NoCodec,), {"fourcc": cv2.VideoWriter.fourcc}))
    out = tmp_path / "out"
    files = sorted(folder.iterdir())[4:7]
    result = invoke(*files, "--bundle", tracking_bundle, "--point", "0:25,35", "-o", out)
    assert result.exit_code == 0, result.output
    assert "cannot write MP4" in result.output
    assert len(list((out / "overlay").glob("*.jpg"))) == 3
    assert [r["file_name"] for r in lines(out)] == ["004.png", "005.png", "006.png"]


def test_a_broken_frame_names_itself_and_keeps_what_was_done(
    folder: Path, tracking_bundle: Path, tmp_path: Path
) -> None:
    (folder / "006.png").write_bytes(b"not a picture")
    out = tmp_path / "out"
    result = invoke(folder, "--bundle", tracking_bundle, "--point", "0:25,35", "-o", out)
    assert result.exit_code == 1
    assert "Frame 6" in result.output
    assert [r["frame"] for r in lines(out)] == list(range(6))
    assert len(json.loads((out / "coco-video.json").read_text())["images"]) == 6
    assert int(cv2.VideoCapture(str(out / "overlay.mp4")).get(cv2.CAP_PROP_FRAME_COUNT)) == 6
    as_json = invoke(folder, "--bundle", tracking_bundle, "--point", "0:25,35", "-o", out, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["error"]["type"] == "FrameError"


def test_an_earlier_result_is_not_mixed_in(folder: Path, tracking_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = (folder, "--bundle", tracking_bundle, "--point", "0:25,35", "-o", out)
    assert invoke(*asked, "--overlay", "jpg").exit_code == 0
    assert len(list((out / "overlay").iterdir())) == FRAMES
    assert invoke(*asked, "--overlay", "jpg", "--end", 2).exit_code == 0
    assert len(list((out / "overlay").iterdir())) == 3
    assert len(lines(out)) == 3


def test_ctrl_c_leaves_what_was_done(tracking_bundle: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 12, (144, 96))
    for frame in moving_squares(3) * 400:
        writer.write(frame)
    writer.release()
    out = tmp_path / "out"
    script = "from pixano_edge.engine.cli.main import main; main()"
    command = [sys.executable, "-c", script, "track", str(clip), "--bundle", str(tracking_bundle)]
    running = subprocess.Popen(
        [*command, "--point", "0:25,35", "-o", str(out), "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Ignored where the tests run in the background of a shell, and inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    log = out / "masks.jsonl"
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "Stopped after" in errors
    done = lines(out)
    assert 5 <= len(done) < 1200
    assert [r["frame"] for r in done] == list(range(len(done)))
    assert len(COCO(out / "coco-video.json").dataset["images"]) == len(done)
    shown = int(cv2.VideoCapture(str(out / "overlay.mp4")).get(cv2.CAP_PROP_FRAME_COUNT))
    assert len(done) - 1 <= shown <= len(done)


def test_several_objects_carry_their_numbers() -> None:
    image = np.full((200, 300, 3), 90, np.uint8)
    masks = {1: np.zeros((200, 300), bool), 12: np.zeros((200, 300), bool)}
    masks[1][20:100, 20:120] = True
    masks[12][20:180, 160:280] = True
    prompts = parse_track_prompts(["0:50,30", "12=0:200,30"], [], [])
    many, one = Painter(prompts).paint(5, image, masks), Painter(prompts[:1]).paint(5, image, masks)
    for x, y in ((70, 60), (220, 100)):
        assert (many[y - 8 : y + 8, x - 10 : x + 10] == 255).all(axis=2).any()
    assert not (one[52:68, 60:80] == 255).all(axis=2).any(), "a single object needs none"
    assert np.array_equal(Painter(prompts).paint(5, image, {}), image), "nobody is there"


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    with MaskLog(tmp_path) as log:
        log.add({"frame": 0, "file_name": "a", "objects": []})
        log._file.write(b'{"frame": 1, "file_na')
        log._file.flush()
        log.finish("clip", 3, (4, 5), "test")
    assert [r["frame"] for r in lines(tmp_path)] == [0]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixano_edge.engine.errors import EdgeError

    with MaskLog(tmp_path) as log:
        log.add({"frame": 0, "file_name": "a", "objects": []})

        class Full:
            def seek(self, place: int) -> None:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(log, "_file", Full())
        with pytest.raises(EdgeError, match="No space left"):
            log.add({"frame": 1, "file_name": "b", "objects": []})
        monkeypatch.undo()
        assert log.frames == [0]


@pytest.mark.parametrize(
    ("points", "options", "passes"),
    [
        (["0:1,1"], (0, None, "forward"), [(0, 9)]),
        (["3:1,1", "2=5:1,1"], (0, 8, "forward"), [(3, 8)]),
        (["3:1,1", "2=5:1,1"], (1, None, "backward"), [(5, 1)]),
        (["3:1,1"], (1, 7, "both"), [(3, 7), (2, 1)]),
        (["0:1,1"], (0, None, "both"), [(0, 9)]),
        (["9:1,1"], (0, None, "forward"), [(9, 9)]),
        (["0:1,1"], (0, None, "backward"), [(0, 0)]),
    ],
)
def test_passes(points: list[str], options: tuple[Any, ...], passes: list[tuple[int, int]]) -> None:
    span = plan_passes(parse_track_prompts(points, [], []), 10, *options)
    assert span.passes == passes
    assert span.frames == sum(abs(b - a) + 1 for a, b in passes)


def test_what_the_command_refuses(folder: Path, tracking_bundle: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    point = ("--point", "0:25,35")

    def refused(*args: object, bundle: Path = tracking_bundle, code: int = 2) -> str:
        result = CliRunner(env={"COLUMNS": "400"}).invoke(
            app, ["track", *(str(a) for a in args), "--bundle", str(bundle), "-o", str(out)]
        )
        assert result.exit_code == code, result.output
        return str(result.output)

    assert "Say what to track" in refused(folder)
    assert "exclude each other" in refused(folder, *point, "--both", "--backward")
    assert "--overlay takes" in refused(folder, *point, "--overlay", "gif")
    assert "There is no file or folder" in refused(tmp_path / "absent.mp4", *point)
    assert "prompt on frame 40, but the clip has 12 frames" in refused(folder, "--point", "40:25,35")
    assert "prompt on frame 0, but --start and --end leave frames 2 to 11" in refused(folder, *point, "--start", 2)
    assert "are no range" in refused(folder, *point, "--end", 50)
    assert "one video, one folder" in refused(folder, folder, *point)
    assert "conditioning frames" in refused(folder, *point, "--max-cond-frames", 0, code=1)
    assert "holds no graphs for video" in refused(folder, *point, bundle=tiny_bundle, code=1)
    assert not (out / "masks.jsonl").exists()
    assert "Object 1, frame 0" in refused(folder, "--point", "0:9000,35", code=1)
    result = invoke(folder, *point, "--bundle", tracking_bundle, "-o", folder)
    assert result.exit_code == 2


def test_pictures_that_cannot_be_encoded_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixano_edge.engine.errors import EdgeError

    monkeypatch.setattr(track_files.cv2, "imencode", lambda *_: (False, np.zeros(0, np.uint8)))
    with OverlayWriter(tmp_path, "jpg", 25) as writer, pytest.raises(EdgeError, match="000003"):
        writer.add(3, np.zeros((4, 5, 3), np.uint8))
