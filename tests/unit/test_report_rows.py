"""Rows -> one reading: which rows count, and which items may be paired."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from repnoise.report.manifests import Row
from repnoise.report.readings import Reading, categories, judges, pick, shared


def row(value: float = 0.5, metric: str = "harm", evaluation: str = "e", n: int = 4, **more: Any) -> Row:
    return Row(evaluation, metric, value, n, **more)


def value(rows: list[Row], **more: Any) -> float | None:
    found = pick(rows, "harm", **more)
    return None if found is None else found.value


def test_nothing_of_nothing_and_of_other_metrics():
    assert pick([], "harm") is None
    assert pick([row(metric="harm_loss"), row(metric="harm ")], "harm") is None


def test_one_row_keeps_its_interval():
    found = pick([row(0.25, lo=0.1, hi=0.4)], "harm")
    assert found is not None
    assert (found.value, found.lo, found.hi, found.n, found.rows) == (0.25, 0.1, 0.4, 4, 1)


def test_several_rows_are_averaged_and_their_sizes_added():
    found = pick([row(0.2), row(0.4), row(0.6, n=6)], "harm")
    assert found is not None
    assert found.value == pytest.approx(0.4)
    assert (found.n, found.rows) == (14, 3)
    # Student's t with 2 degrees of freedom: 4.3027 * 0.2 / sqrt(3)
    assert found.hi - found.value == pytest.approx(0.49683, abs=1e-4)


@pytest.mark.parametrize("split", ["validation", "train", ""])
def test_only_the_test_split_counts(split: str):
    assert value([row(0.9, split=split), row(0.1, split="test")]) == 0.1
    assert value([row(0.9, split=split)]) is None


def test_a_layer_is_not_the_model():
    assert value([row(0.9, layer=0), row(0.1)]) == 0.1


def test_the_final_row_has_no_step():
    assert value([row(0.9, step=100), row(0.1)], steps=100) == 0.1


def test_without_a_final_row_the_last_step_counts_and_no_other():
    rows = [row(0.3, step=50), row(0.9, step=100)]
    assert value(rows, steps=100) == 0.9
    assert value(rows, steps=75) is None
    assert value(rows) is None


def test_step_nought_is_a_step():
    assert value([row(0.3, step=0)], steps=0) == 0.3


def test_categories_are_kept_apart():
    rows = [row(0.1, category="a"), row(0.2, category="b"), row(0.3)]
    assert value(rows) == 0.3
    assert value(rows, category="b") == 0.2
    assert value(rows, category="c") is None


def test_the_first_judge_is_the_headline_unless_another_is_asked_for():
    rows = [row(0.1, judge="z"), row(0.2, judge="a")]
    assert value(rows) == 0.1
    assert value(rows, judge="a") == 0.2
    assert value(rows, judge="b") is None
    assert value(rows, judge="") is None


def test_the_empty_judge_is_nobody():
    assert value([row(0.1, judge="z"), row(0.2)], judge="") == 0.2


def test_the_first_evaluation_by_name_counts_but_ground_truth_goes_first():
    assert value([row(0.1, evaluation="b"), row(0.2, evaluation="a")]) == 0.2
    assert value([row(0.1, evaluation="b", judge="ground-truth"), row(0.2, evaluation="a")]) == 0.1


def test_judges_start_with_the_headline():
    rows = [row(evaluation="b", judge="x"), row(evaluation="a", judge="y"), row(evaluation="a", judge="x")]
    assert judges(rows, "harm") == ["y", "x"]
    assert judges([row()], "harm") == []
    assert judges([], "harm") == []


def test_categories_of_the_test_split_alone():
    rows = [row(), row(category="b"), row(category="a"), row(category="v", split="validation")]
    assert categories(rows, "harm") == [None, "a", "b"]


def test_categories_of_other_steps_and_layers_do_not_count():
    rows = [row(category="a", step=5), row(category="b", layer=1), row(category="c", step=10)]
    assert categories(rows, "harm", steps=10) == ["c"]


def test_items_are_exact_where_the_value_is_their_mean():
    found = pick([row(0.5, items=[1, 0, 1, 0])], "harm")
    assert found is not None
    assert found.exact
    assert found.of_items().tolist() == [1, 0, 1, 0]


def test_a_loss_that_is_not_the_mean_of_its_rows_is_not_exact():
    found = pick([row(0.7, items=[1, 0, 1, 0])], "harm")
    assert found is not None
    assert not found.exact
    assert found.items is not None
    assert found.of_items() is None


def test_items_of_several_seeds_are_averaged_item_by_item():
    found = pick([row(0.5, items=[1, 0]), row(1.0, items=[1, 1])], "harm")
    assert found is not None
    assert found.of_items().tolist() == [1.0, 0.5]


@pytest.mark.parametrize("second", [None, [], [1.0]])
def test_items_that_a_seed_lacks_or_that_differ_in_number_are_none(second: Any):
    found = pick([row(0.5, items=[1, 0]), row(1.0, items=second)], "harm")
    assert found is not None
    assert found.items is None
    assert found.value == 0.75


def test_items_of_different_strides_are_not_the_same_items():
    found = pick([row(0.5, items=[1, 0], every=1), row(0.5, items=[1, 0], every=2)], "harm")
    assert found is not None
    assert found.items is None
    assert found.of_items() is None
    assert (found.value, found.n, found.rows) == (0.5, 8, 2)


def test_no_stride_is_every_item():
    found = pick([row(0.5, items=[1, 0]), row(0.5, items=[0, 1], every=1)], "harm")
    assert found is not None
    assert found.every == 1
    assert found.items is not None


def reading(items: list[list[float]] | None, every: int = 1) -> Reading:
    return Reading(0.0, None, None, 1, None if items is None else np.asarray(items, dtype=float), every=every)


def test_shared_items_of_equal_strides_are_all():
    first, second = shared(reading([[1, 2]]), reading([[3, 4]]))
    assert (first.tolist(), second.tolist()) == ([[1, 2]], [[3, 4]])


@pytest.mark.parametrize(
    ("a", "b", "first", "second"),
    [
        (1, 2, [0, 2, 4, 6], [0, 1, 2, 3]),
        (2, 1, [0, 1, 2, 3], [0, 2, 4, 6]),
    ],
)
def test_shared_items_of_two_strides(a: int, b: int, first: list[int], second: list[int]):
    whole = {1: list(range(8)), 2: list(range(4))}
    found = shared(reading([whole[a]], a), reading([whole[b]], b))
    assert [each[0].tolist() for each in found] == [first, second]


def test_strides_without_a_common_factor_meet_at_their_multiple():
    test = np.arange(12)
    found = shared(reading([test[::2].tolist()], 2), reading([test[::3].tolist()], 3))
    assert [each[0].tolist() for each in found] == [[0, 6], [0, 6]]


@pytest.mark.parametrize(
    ("a", "b"),
    [([[1, 2]], [[1, 2, 3]]), ([[1, 2]], [[1, 2], [3, 4]]), (None, [[1]]), ([[1]], None)],
)
def test_nothing_is_shared_where_the_rows_do_not_tell(a: Any, b: Any):
    assert shared(reading(a), reading(b)) is None
