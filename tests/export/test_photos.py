"""Pictures for parity: found, reduced, refused, and named for what they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixano_edge.engine.errors import ExportError
from pixano_edge.export import photos


def save(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, (10, 20, 30)).save(path)
    return path


def test_folder_is_sampled_evenly(tmp_path: Path) -> None:
    for index in range(9):
        save(tmp_path / f"{index}.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    found = photos.find_photos(tmp_path)
    assert [p.name for p in found] == ["0.jpg", "3.jpg", "5.jpg", "8.jpg"]


def test_no_photos(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No photos"):
        photos.find_photos(tmp_path)


def test_damaged_photo(tmp_path: Path) -> None:
    data = save(tmp_path / "a.png", (300, 300)).read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "b.jpg").write_bytes(b"")
    for name in ("a.png", "b.jpg"):
        with pytest.raises(ExportError, match=name):
            photos.load_photos([tmp_path / name])


def test_large_photo_is_reduced(tmp_path: Path) -> None:
    (photo,) = photos.load_photos([save(tmp_path / "big.png", (3200, 1000))])
    assert photo.size == (500, 1600)
    assert photo.pixels.flags.c_contiguous
    assert photo.name == "big.png"


def test_grey_and_alpha_become_rgb(tmp_path: Path) -> None:
    Image.new("LA", (8, 6)).save(tmp_path / "la.png")
    Image.new("L", (8, 6)).save(tmp_path / "l.png")
    for photo in photos.load_photos([tmp_path / "la.png", tmp_path / "l.png"]):
        assert photo.pixels.shape == (6, 8, 3)


def test_default_photos_are_real_deterministic_and_not_square() -> None:
    pytest.importorskip("skimage", reason="the photos come with pixano-edge[export]")
    first, second = photos.default_photos(), photos.default_photos()
    assert [p.name for p in first] == ["skimage-coffee-599x399", "skimage-chelsea-263x299"]
    assert [p.name for p in first] == [p.name for p in second]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, second))
    assert all(p.size[0] != p.size[1] and p.size[0] % 2 and p.size[1] % 2 for p in first)
    assert all(p.name.endswith(f"{p.size[1]}x{p.size[0]}") for p in first)
    assert all("CC0-1.0" in p.origin and p.pixels.std() > 20 for p in first)
    assert {p.size[0] > p.size[1] for p in first} == {True, False}


def test_default_photos_are_those_of_scikit_image() -> None:
    data = pytest.importorskip("skimage.data", reason="the photos come with pixano-edge[export]")
    coffee, chelsea = photos.default_photos()
    assert np.array_equal(coffee.pixels, data.coffee()[:399, 1:600])
    assert np.array_equal(chelsea.pixels, data.chelsea()[1:300, 82:345])


def test_default_photos_import_no_scikit_image() -> None:
    """Its import is slow, and its loader would download a missing file."""
    code = (
        "import sys\n"
        "from pixano_edge.export.photos import default_photos\n"
        "default_photos()\n"
        "assert 'skimage' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("absent", ["package", "files"])
def test_default_photos_without_scikit_image(absent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(photos, "_bundled_folder", lambda: None if absent == "package" else tmp_path)
    with pytest.warns(UserWarning, match="scikit-image"):
        found = photos.default_photos()
    assert [p.name for p in found] == ["drawn-1", "drawn-2"]
    assert all(p.pixels.std() > 20 for p in found)
