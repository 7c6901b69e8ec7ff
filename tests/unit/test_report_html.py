"""The page: self-contained, escaped, redacted, and complete."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_study import GRID, MARKER, row, write_model, write_study

from repnoise.report import render, summarise, write_report
from repnoise.report.pages import plots
from repnoise.report.records import Point
from repnoise.store import files

EVIL = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all that were opened are closed."""

    VOID = frozenset({"meta", "br", "circle", "line", "polyline", "polygon", "rect"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def study(tmp_path: Path) -> Path:
    recipe = {"study": EVIL, "defence": {"name": "repnoise", "alpha": 1.0}}
    path = write_study(tmp_path / "a <b> & study", recipe=recipe)
    attacks = [*GRID, dict(GRID[0], name=EVIL)]
    write_model(path / "other-1111111111", lambda a, s: 0.5, stage="defend", name=f"other {EVIL}", attacks=attacks)
    return path


def test_the_page_is_self_contained_escaped_and_redacted(study: Path) -> None:
    page = write_report(study).read_text(encoding="utf-8")
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a &lt;b&gt; &amp; study" in page
    for path in (
        study / "report.html",
        study / "summary.json",
        study / "table.csv",
        *(study / "figures").iterdir(),
    ):
        assert MARKER not in path.read_text(encoding="utf-8")
    tags = Tags(page)
    assert not tags.open
    for tag, attributes in tags.found:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "form", "base")
        assert not {"src", "href", "onload", "onclick"} & set(attributes)
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_can_be_read_without_sight(study: Path) -> None:
    tags = Tags(render(study)).found
    assert ("html", {"lang": "en"}) in tags
    for tag, attributes in tags:
        if tag == "svg" and "aria-hidden" not in attributes:
            assert attributes["role"] == "img"
            assert "ends at" in str(attributes["aria-label"])
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    names = [tag for tag, _ in tags]
    assert names.count("table") == names.count("caption")
    assert names.count("h1") == 1


def test_the_page_says_the_verdict_the_cells_and_the_words(study: Path) -> None:
    summary = summarise(study)
    page = render(study)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for sentence in summary["verdict"]["sentences"]:
        assert sentence in text
    for word in (
        "head start",
        "floor",
        "void",
        "ignorant control",
        "Not measured",
        "alpha: 1.0",
        "learning rate 0.001",
    ):
        assert word in text
    assert "0.10 [0.09, 0.12]" in text
    assert "No attack in this study tried" in text


def test_every_state_of_a_cell_has_words_and_not_only_a_colour(tmp_path: Path) -> None:
    def defended(settings: Mapping[str, Any], seed: int) -> float:
        return 0.5 if settings["learning_rate"] == 1e-3 and not settings["lora_rank"] else 0.05

    write_study(tmp_path, defended, extra=lambda a, s: [row("knowledge_degenerate", 0.9 if a["lora_rank"] else 0.0)])
    text = " ".join(re.sub(r"<[^>]+>", " ", render(tmp_path)).split())
    for words in ("✗ breaks", "✓ holds", "? collapsed"):
        assert words in text


def test_losses_only_and_nothing_else_still_renders(tmp_path: Path) -> None:
    for name, stage in (("base", "base"), ("d-1", "defend")):
        write_model(
            tmp_path / name,
            lambda a, s: None,
            stage=stage,
            attacks=(),
            before=[row("harmful_loss", 4.0, "loss")],
        )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Losses before and after each attack" in page
    assert "not measured" in page


def test_old_figures_go(study: Path) -> None:
    (study / "figures").mkdir()
    (study / "figures" / "old.svg").write_text("old")
    write_report(study)
    assert not (study / "figures" / "old.svg").exists()
    for path in (study / "figures").iterdir():
        assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 100, [0, 25, 50, 75, 100]), (3.9, 8.7, [4, 6, 8]), (2, 2, [2])],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert plots.ticks(low, high) == wanted


def test_thin_keeps_the_mean_and_the_end() -> None:
    thinned = plots.thin([Point(step, float(step % 2)) for step in range(1, 1001)])
    assert len(thinned) == 200
    assert thinned[-1].step == 1000
    assert sum(p.mean for p in thinned) / 200 == pytest.approx(0.5)


def test_one_point_and_constant_lines_draw() -> None:
    svg = plots.chart({"defended": [Point(5, 1.0)]}, title="x")
    assert "nan" not in svg.lower()
