"""The report as a file: whole, self-contained, safe for any name, and true to the result."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pixano_edge.calibration import plots
from pixano_edge.calibration.plots import Bar, Dot, bars, histogram, scatter, shortened, ticks
from pixano_edge.calibration.report import app, headline, read_result, render, write_report
from pixano_edge.calibration.result import SampleValue, Score, Speed, TensorRange
from pixano_edge.engine.errors import EdgeError
from tests.support.browser import Watch, chromium

from .made_up import png, result, variant

VOID = {"meta", "img", "br", "circle", "line", "rect"}


class Page(HTMLParser):
    """Elements, text, and whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_both_files_are_written_and_read_back(tmp_path: Path) -> None:
    made = result()
    html, data = write_report(made, tmp_path / "new" / "folder")
    assert read_result(data) == made
    assert sorted(p.name for p in html.parent.iterdir()) == ["report.html", "report.json"]
    again = CliRunner().invoke(app, [str(data), "-o", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "report.html").read_bytes() == html.read_bytes()


def test_it_needs_nothing_from_elsewhere_and_runs_nothing() -> None:
    html = render(result())
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert all(str(a["src"]).startswith("data:image/png;base64,") for a in page.all("img"))
    assert all(a["alt"] for a in page.all("img"))
    assert "http" not in re.sub(r"base64,[^\"]*", "", html).replace("http-equiv", "")
    assert any("default-src 'none'" in str(a.get("content")) for a in page.all("meta"))


def test_tables_can_be_reached_with_the_keyboard_and_plots_are_told_in_words() -> None:
    page = Page(render(result()))
    regions = [a for a in page.all("div") if a.get("class") == "scroll"]
    assert len(regions) == len(page.all("table")) > 5
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert all(a["role"] == "img" for a in page.all("svg"))
    assert len(page.all("desc")) == len(page.all("svg")) > 8
    assert page.all("html")[0]["lang"] == "en"


def test_what_it_says(tmp_path: Path) -> None:
    bad = variant("int8-minmax", values=(0.99, 0.5, 0.4))
    text = Page(render(result(variants=(variant(), bad)))).text
    assert "int8: passed, in the bundle" in text
    assert "mask_iou 0.9873 ≥ 0.98 on 3 held-out samples, 31 % of fp32's size, 1.54x as fast" in text
    assert "int8-minmax: failed, not put into the bundle" in text
    assert "mask_iou 0.6300 < 0.98" in text
    assert "mask_iou is 0.6300 on held-out data, below 0.98" in text
    assert "broken.png" in text
    assert "it is cut off" in text
    assert "alone it costs 0.031 of mask_iou" in text
    assert "Example, 2 threads usable" in text
    assert "image_encoder22.0 MB83.9 MB57.7 MB-" in "".join(text.splitlines())
    assert text.index("passed, in the bundle") < text.index("Accuracy over size")  # the verdict comes first
    assert text.index("0.4000") < text.index("Activations")


def test_worst_samples_come_worst_first() -> None:
    made = variant(values=(0.99, 0.2, 0.6))
    text = Page(render(result(variants=(made,)))).text
    part = text[text.index("Worst samples") :]
    places = [part.index(f"mask_iou {value}") for value in ("0.2000", "0.6000", "0.9900")]
    assert places == sorted(places)


def test_no_name_becomes_markup() -> None:
    nasty = '<span class="x"><script>alert(1)</script>&"\''
    base = variant(nasty)
    made = replace(
        base,
        problems=(nasty,),
        notes=(nasty,),
        held_out=Score.of((SampleValue(nasty, 0.5),)),
        blocks=tuple(replace(b, name=nasty, why=nasty, quantised=False) for b in base.blocks),
        ranges=tuple(replace(r, name=nasty, method=nasty) for r in base.ranges),
        worst=tuple(replace(w, name=nasty, asked=nasty, fp32_text=nasty) for w in base.worst),
    )
    html = render(result(bundle=nasty, command=nasty, hardware=(nasty,), variants=(made,)))
    page = Page(html)
    assert not page.all("script")
    assert "<script>" not in html
    assert not [a for a in page.all("span") if a.get("class") == "x"]
    assert page.text.count("alert(1)") > 20


def test_what_is_missing_is_said() -> None:
    bare = replace(
        variant(),
        held_out=None, on_calibration=None, truth=None, speed=(), fp32_speed=(), blocks=(), ranges=(), worst=(),
        graphs=(), passed=False, published=False, problems=("scale of 'x' is 0",),
    )  # fmt: skip
    assert "was refused before mask_iou was measured" in headline(bare)
    assert "unknown of fp32's size" in headline(replace(bare, fp32_bytes=0))
    text = Page(render(result(variants=(bare,)))).text
    assert "scale of 'x' is 0" in text
    assert "Not measured." in text
    assert "No variant was made." in Page(render(result(variants=()))).text


def test_a_value_that_is_no_number_is_the_worst() -> None:
    values = (SampleValue("fine", 0.9), SampleValue("broken", math.nan))
    made = replace(variant(), held_out=Score(math.nan, values), passed=False, published=False)
    text = Page(render(result(variants=(made,)))).text
    assert "not a number" in text
    assert text.index("broken") < text.index("fine")


def test_slower_is_called_slower() -> None:
    slow = replace(variant(), speed=(Speed("image_encoder", "onnxruntime CPUExecutionProvider", 2, 20, 0.1, 0.2),))
    assert "1.25x slower" in headline(slow)
    apart = replace(variant(), speed=(Speed("image_encoder", "openvino", 2, 20, 0.1, 0.2),))
    assert "fast" not in headline(apart)  # nothing of fp32 to compare it with


def test_a_picture_that_is_none_is_refused(tmp_path: Path) -> None:
    broken = replace(variant().worst[0], fp32_png=b"GIF89a")
    with pytest.raises(EdgeError, match=r"scene-0\.png, fp32' is no PNG"):
        write_report(result(variants=(replace(variant(), worst=(broken,)),)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("{")
    with pytest.raises(EdgeError, match="cannot be read as JSON"):
        read_result(tmp_path / "file")
    shown = CliRunner().invoke(app, [str(tmp_path / "file"), "-o", str(tmp_path)])
    assert shown.exit_code == 1
    assert "Give a calibration's report.json" in shown.output
    with pytest.raises(EdgeError, match="cannot be made"):
        write_report(result(), tmp_path / "file" / "below")

    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(EdgeError, match="No space left"):
        write_report(result(), tmp_path / "out")


def test_a_large_result_stays_readable(tmp_path: Path) -> None:
    base = variant()
    made = replace(
        base,
        blocks=tuple(replace(base.blocks[0], name=f"b{i}", alone=1 - i / 1e4) for i in range(400)),
        ranges=tuple(replace(base.ranges[0], name=f"t{i}") for i in range(400)),
        worst=tuple(replace(base.worst[0], name=f"s{i}", fp32_png=png(i)) for i in range(30)),
    )
    page = Page(render(result(variants=(made,))))
    assert len(page.all("svg")) == 1 + 1 + 24
    assert len(page.all("img")) == 20
    assert "b399" in page.text  # the most sensitive is drawn, and every one is in the table
    assert "t399" in page.text


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.973, 1.0) == [0.98, 0.99, 1.0]
    assert ticks(1, 1) == [1]
    assert ticks(math.nan, 1) != []


def test_a_bar_is_as_long_as_its_value() -> None:
    drawn = bars([Bar("a", 0.5, "0.5", plots.GOOD), Bar("b", 1.0, "1", plots.BAD), Bar("c", math.nan, "-", "bad")], "t")
    widths = [float(w) for w in re.findall(r'height="14".*?|width="([\d.]+)"', drawn) if w]
    assert widths[0] == pytest.approx(widths[1] / 2, abs=0.2)
    assert widths[2] == 0


def test_dots_stand_where_their_values_are() -> None:
    drawn = scatter(
        [Dot("fp32", 1.0, 1.0, "accent"), Dot("int8", 0.5, 0.9, "good"), Dot("x", 0.1, math.nan, "bad")], 0.95, "m"
    )
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    budget = float(re.findall(r'class="budget".*?y1="([\d.]+)"', drawn)[0])
    assert len(dots) == 2
    assert dots[1][0] < dots[0][0]
    assert dots[0][1] < budget < dots[1][1]
    assert budget == pytest.approx((dots[0][1] + dots[1][1]) / 2, abs=0.2)


def test_what_is_clipped_has_another_colour() -> None:
    held = TensorRange("g", "t", 8.0, (50, 20, 5, 1), 4.0, "minmax", 0.08)
    drawn = histogram(held)
    assert drawn.count('class="accent"') == 2
    assert drawn.count('class="bad"') == 2
    for broken in (replace(held, counts=(), limit=0.0), replace(held, amax=math.nan)):
        assert '="nan' not in histogram(broken)  # no coordinate


def test_long_names_keep_both_ends() -> None:
    assert shortened("a" * 30 + "/end", 20).endswith("/end")
    assert len(shortened("a" * 90, 20)) == 20
    assert shortened("short", 20) == "short"


def test_histograms_of_the_calibrators_fit() -> None:
    counts, edges = np.histogram(np.abs(np.random.default_rng(0).normal(size=1000)), bins=2048)
    held = TensorRange("g", "t", float(edges[-1]), TensorRange.merged(counts), 2.0, "mse", 0.05)
    assert 20 < histogram(held).count("<rect") <= 64


@pytest.mark.browser
def test_in_a_browser(tmp_path: Path) -> None:
    """No fault in the console, both themes, no page wider than a telephone, and the keyboard gets everywhere."""
    html, _ = write_report(result(variants=(variant(), variant("int8-minmax", values=(0.9, 0.2)))), tmp_path)
    grounds = []
    with chromium() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 400, "height": 800})
            watch = Watch(page, "file://")
            page.goto(html.as_uri())
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
            assert page.evaluate("[...document.images].every(i => i.decode && !i.src.startsWith('http'))")
            wanted = page.locator("[tabindex='0']:visible, summary").count()
            seen = set()
            for _ in range(wanted + 5):
                page.keyboard.press("Tab")
                seen.add(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
            assert len(seen) >= wanted > 10
            watch.check()
            page.close()
    assert grounds[0] != grounds[1]
