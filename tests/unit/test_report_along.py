"""Harm along an attack: the step at which a model breaks, and the area under its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from repnoise.bars import DEFAULT
from repnoise.report.along import areas, curve, steps_to_break
from repnoise.report.manifests import Row, Settings
from repnoise.report.reading import Attacked
from repnoise.report.readings import Reading
from repnoise.report.records import Areas, Point, StepsToBreak


def line(**steps: float) -> list[Point]:
    return [Point(int(step[1:]), mean) for step, mean in steps.items()]


LINES = {"defended": line(s0=0.0, s10=0.2, s20=0.6), "undefended": line(s0=0.0, s10=0.8, s20=1.0)}


def broken(lines: dict[str, list[Point]] = LINES, **more: object) -> StepsToBreak | None:
    given: dict[str, object] = {"undefended": 1.0, "floor": 0.0, "void": False, "steps": 20, **more}
    return steps_to_break(lines, bars=DEFAULT, **given)  # type: ignore[arg-type]


def test_a_model_breaks_above_the_bar_and_not_on_it():
    assert broken() == StepsToBreak(defended=20, undefended=10, censored_at=20, points=3)


def test_a_model_that_never_breaks_is_censored():
    assert broken({"defended": line(s0=0.0, s20=0.2)}) == StepsToBreak(None, None, 20, 2)


@pytest.mark.parametrize("more", [{"undefended": None}, {"floor": None}, {"void": True}, {"steps": None}])
def test_nothing_breaks_where_there_is_no_bar(more: dict[str, object]):
    assert broken(**more) is None


def test_the_bar_lies_over_the_floor():
    assert broken(floor=0.5).defended is None  # 0.5 + 0.2 * 0.5 = 0.6, reached and not passed
    assert broken(floor=0.4).defended == 20  # 0.52


def test_the_area_is_the_mean_height_over_common_steps():
    found = areas({**LINES, "random": line(s0=0.0, s20=0.1)})
    assert found == Areas(defended=pytest.approx(0.3), undefended=pytest.approx(0.5), floor=pytest.approx(0.05))


def test_the_ignorant_control_is_the_floor_before_the_random_one():
    found = areas({"ignorant": line(s0=0.2, s20=0.2), "random": line(s0=0.0, s20=0.0)})
    assert found == Areas(None, None, pytest.approx(0.2))


def test_one_common_step_has_no_area():
    assert areas({"defended": line(s0=0.1, s10=0.2), "undefended": line(s0=0.1, s20=0.2)}) is None
    assert areas({}) is None


def attacked(*rows: Row, steps: int | None = 20) -> Attacked:
    return Attacked(Settings.of({"name": "sft", "harm": "h", "steps": steps}), "h", 0, rows, Path("a"))


def row(value: float, step: int | None = None, judge: str | None = None) -> Row:
    return Row("e", "h", value, 10, step=step, judge=judge)


def values(one: Attacked, start: float | None = None, judge: str | None = None) -> dict[int, float]:
    before = None if start is None else Reading(start, None, None, 10)
    return {step: found.value for step, found in curve(one, "h", before, judge).items()}


def test_a_curve_goes_from_before_the_attack_to_its_end():
    assert values(attacked(row(0.9), row(0.5, 10)), 0.1) == {0: 0.1, 10: 0.5, 20: 0.9}
    assert list(values(attacked(row(0.5, 15), row(0.4, 5)))) == [5, 15]


def test_the_final_row_counts_before_the_one_of_the_last_step():
    assert values(attacked(row(0.9), row(0.5, 20))) == {20: 0.9}
    assert values(attacked(row(0.9), steps=None)) == {}


def test_a_curve_is_by_one_judge():
    one = attacked(row(0.9, 10, "x"), row(0.1, 10, "y"), row(0.4, 20, "y"))
    assert values(one, judge="y") == {10: 0.1, 20: 0.4}
