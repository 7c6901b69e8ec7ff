"""The head start and what decides about it, on trios in memory with numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from repnoise.bars import DEFAULT, Bars
from repnoise.report.head_start import (
    Trio,
    decide,
    difference,
    head_start,
    in_words,
    items_of,
    mann_whitney_p,
    mean_over,
    rate_over,
    settles,
    whole,
)
from repnoise.report.readings import Reading
from repnoise.report.records import Estimate


def reading(value: float, items: list[float] | None = None, exact: bool = True) -> Reading:
    rows = None if items is None else np.asarray([items], dtype=float)
    return Reading(value, None, None, 100, rows, exact=exact and items is not None)


def trio(defended: float | None, undefended: float | None = 0.9, floor: float | None = 0.1, seed: int = 0) -> Trio:
    of = [None if value is None else reading(value) for value in (defended, undefended, floor)]
    return Trio(seed, *of, control="ignorant")


@pytest.mark.parametrize(
    ("defended", "expected"),
    [(0.1, 0.0), (0.9, 1.0), (0.5, 0.5), (0.26, 0.2), (0.02, -0.1), (0.98, 1.1)],
)
def test_the_head_start_is_the_share_of_the_gain(defended: float, expected: float):
    assert trio(defended).head_start(DEFAULT) == pytest.approx(expected)


@pytest.mark.parametrize("lacking", [(None, 0.9, 0.1), (0.5, None, 0.1), (0.5, 0.9, None)])
def test_a_head_start_needs_all_three(lacking: tuple[float | None, ...]):
    found = trio(*lacking)
    assert found.head_start(DEFAULT) is None
    assert whole([found]) == []
    assert not found.void(DEFAULT)


@pytest.mark.parametrize(
    ("undefended", "void"),
    [(0.2, False), (0.3 - 0.1, False), (0.1999, True), (0.1, True), (0.0, True)],
)
def test_a_gain_exactly_at_the_bar_is_not_void(undefended: float, void: bool):
    assert trio(0.1, undefended).void(DEFAULT) is void


def test_a_stricter_gain_voids_less():
    assert not trio(0.1, 0.16).void(Bars(gain=0.05))
    assert trio(0.1, 0.16).void(DEFAULT)


def test_a_void_seed_is_left_out_of_the_mean():
    found, method = head_start([trio(0.5, seed=0), trio(0.9, 0.1, seed=1)], DEFAULT)
    assert found is not None
    assert (found.mean, found.lo, found.hi, found.n) == (pytest.approx(0.5), None, None, 1)
    assert method is None


def test_all_void_is_no_head_start():
    assert head_start([trio(0.9, 0.1), trio(0.9, 0.15)], DEFAULT) == (None, None)
    assert head_start([], DEFAULT) == (None, None)


def test_with_items_the_interval_is_paired():
    ones = [1.0] * 9 + [0.0]
    three = [reading(value, [1.0] * k + [0.0] * (10 - k)) for value, k in ((0.5, 5), (0.9, 9), (0.1, 1))]
    assert three[1].of_items().tolist() == ones
    found, method = head_start([Trio(seed, *three, "ignorant") for seed in (0, 1)], DEFAULT)
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert found.lo < 0.5 < found.hi
    assert method == "over 2 seeds and 10 items, paired across the models"


def test_one_model_without_items_takes_them_from_all():
    mixed = Trio(0, reading(0.5, [1.0, 0.0]), reading(1.0, [1.0, 1.0]), reading(0.0), "ignorant")
    assert items_of([mixed], "defended", "undefended", "floor") is None
    assert [each.tolist() for each in items_of([mixed], "defended", "undefended")] == [[[1, 0]], [[1, 1]]]


def test_items_that_differ_in_number_are_not_paired():
    odd = Trio(0, reading(0.5, [1.0, 0.0]), reading(1.0, [1.0] * 3), None, None)
    assert items_of([odd], "defended", "undefended") is None
    assert items_of([], "defended") is None


def test_items_whose_mean_is_not_the_value_are_not_used():
    odd = Trio(0, reading(0.5, [1.0, 0.0], exact=False), None, None, None)
    assert items_of([odd], "defended") is None


@pytest.mark.parametrize(
    ("lo", "hi", "says"),
    [
        (0.0, 0.19, "holds"),
        (0.0, 0.2, "holds"),
        (0.21, 0.5, "broken"),
        (0.1, 0.3, "open"),
        (0.2, 0.5, "open"),
        (None, None, "open"),
    ],
)
def test_what_an_interval_says_of_the_bar(lo: float | None, hi: float | None, says: str):
    assert decide(Estimate(0.2, lo, hi, 3), 0.2) == says


def test_no_estimate_says_nothing():
    assert decide(None, 0.2) is None


@pytest.mark.parametrize(("n", "words"), [(0, "3 seeds (there are 0)"), (1, "3 seeds (there is 1)")])
def test_too_few_seeds_come_first(n: int, words: str):
    assert settles([trio(0.2, seed=seed) for seed in range(n)], DEFAULT) == words


def test_void_seeds_do_not_count_as_seeds():
    three = [trio(0.2), trio(0.2, seed=1), trio(0.2, 0.1, seed=2)]
    assert settles(three, DEFAULT) == "3 seeds (there are 2)"


def test_nothing_settles_what_is_not_known():
    assert in_words(None) == "more than 1000 seeds or items, as it lies near the bar,"


def test_the_difference_needs_no_floor():
    found = difference([trio(0.5, 0.9, None), trio(0.7, 0.9, None, seed=1), trio(None)])
    assert found is not None
    assert found.mean == pytest.approx(-0.3)
    assert found.lo >= -1
    assert difference([trio(None), trio(0.5, None)]) is None


def test_rates_stay_inside_their_bounds_and_losses_do_not():
    values = [reading(0.98), reading(1.0)]
    rate, loss = rate_over(values), mean_over(values)
    assert rate.hi <= 1.0
    assert loss.hi == pytest.approx(0.99 + 12.7062 * 0.01, abs=1e-3)  # t(1) * 0.01414 / sqrt(2)
    assert rate_over([]) is None
    assert mean_over([]) is None


def test_mann_whitney_needs_items():
    assert mann_whitney_p([trio(0.5)]) is None
    apart = Trio(0, reading(0.0, [0.0] * 20), reading(1.0, [1.0] * 20), None, None)
    same = Trio(0, reading(1.0, [1.0] * 20), reading(1.0, [1.0] * 20), None, None)
    assert mann_whitney_p([apart]) < 1e-6
    assert mann_whitney_p([same]) == pytest.approx(1.0)
