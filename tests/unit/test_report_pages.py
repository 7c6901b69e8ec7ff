"""Text from users on pages and in tables: never markup, never a formula."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from report_study import attack, row, write_study

from repnoise.report import build_summary, write_report
from repnoise.report.pages.plots import chart, describe, thin, ticks
from repnoise.report.records import Point
from repnoise.report.summary import inert, table_csv

EVIL = "<script>alert('x')</script>"


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("repnoise.store.files.os.fsync", lambda descriptor: None)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_text_that_begins_a_formula_gets_an_apostrophe(text: str):
    assert inert([text]) == [f"'{text}"]


@pytest.mark.parametrize("value", [-1, -0.5, 0, True, None, "a=b", "a+b", "", "'=1"])
def test_numbers_and_plain_texts_stay(value: object):
    assert inert([value]) == [value]


def test_what_is_no_text_and_no_number_is_written_as_text():
    assert inert([["=1"]]) == ["['=1']"]


def test_harms_names_and_judges_in_table_csv_are_inert(tmp_path: Path):
    harm = "=cmd|' /C calc'!A0"
    path = write_study(
        tmp_path,
        attacks=[attack(harm=harm, note="@x")],
        seeds=(0,),
        extra=lambda settings, seed: [row(harm, 0.25, judge="+judge")],
    )
    lines = list(csv.DictReader(io.StringIO(table_csv(build_summary(path)))))
    assert len(lines) == 1
    assert lines[0]["harm"] == f"'{harm}"
    assert lines[0]["judge"] == "'+judge"
    assert lines[0]["attack.note"] == "'@x"
    assert lines[0]["defended"] == "0.25"


def test_names_on_the_page_are_escaped(tmp_path: Path):
    path = write_study(
        tmp_path,
        attacks=[attack(harm=EVIL)],
        seeds=(0,),
        data={"harms": {EVIL: "withheld"}},
        extra=lambda settings, seed: [row(EVIL, 0.5, judge=EVIL), row(EVIL, 0.5, judge=EVIL, category=EVIL)],
    )
    (path / "x<script>alert('x')").mkdir()
    ((path / "x<script>alert('x')") / "progress.json").write_text("{}", encoding="utf-8")
    page = write_report(path).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_a_title_of_a_chart_is_escaped():
    svg = chart({"defended": [Point(0, 0.0), Point(1, 1.0)]}, title=f'"{EVIL}', x_label=EVIL)
    assert "<script" not in svg
    assert 'aria-label="&quot;&lt;script' in svg


def test_a_chart_in_words():
    assert describe("t", {"a": [Point(0, 0.1), Point(1, 0.256)], "b": []}) == "t: a ends at 0.26"
    assert describe("t", {}) == "t: no points"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0, 100, [0, 25, 50, 75, 100]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (2, 2, [2])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]):
    assert ticks(low, high) == expected


def test_a_long_line_is_thinned_to_means():
    found = thin([Point(step, float(step)) for step in range(1, 7)], most=3)
    assert [(p.step, p.mean) for p in found] == [(2, 1.5), (4, 3.5), (6, 5.5)]
    assert thin(found, most=3) == found
