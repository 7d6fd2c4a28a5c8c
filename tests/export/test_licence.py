"""Licences are read, never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixano_edge.export import licence


@pytest.mark.parametrize(
    ("card", "tag"),
    [
        ("---\nlicense: apache-2.0\npipeline_tag: mask-generation\n---\n# SAM 2", "apache-2.0"),
        ("---\ntags: [a]\nlicense: 'MIT'\n---\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("# no front matter\nlicense: mit\n", None),
        ("---\nlicense_name: x\n---\n", None),
        ("", None),
    ],
)
def test_front_matter(card: str, tag: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card, newline="")
    assert licence.card_licence(tmp_path / "README.md") == tag


def test_unknown_tag_gives_advice(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n")
    found = licence.detect(tmp_path)
    assert found.spdx == "unknown"
    assert "'license: other'" in found.text
    assert "--licence" in found.text


def test_official_id_does_not_override_a_card(tmp_path: Path) -> None:
    official = {"facebook/x": "Apache-2.0"}
    assert licence.detect(tmp_path, "facebook/x", official=official).spdx == "Apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert licence.detect(tmp_path, "facebook/x", official=official).spdx == "CC-BY-NC-4.0"
    assert licence.detect(tmp_path, "other/x").spdx == "CC-BY-NC-4.0"
    assert licence.detect(None, "other/x", official=official).spdx == "unknown"
