"""Intervals against closed forms and published values; an empty sample raises."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from repnoise.errors import RunError
from repnoise.intervals import (
    DIFFERENCE,
    RATE,
    area,
    bootstrap,
    crossed_interval,
    differing,
    fisher,
    head_start_interval,
    mann_whitney,
    mcnemar,
    mean_interval,
    paired_interval,
    rate_interval,
    share_bound,
    wilson,
)

Z = 1.959963984540054


@given(st.integers(1, 400), st.data())
def test_wilson_is_the_closed_form(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    p = k / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    got = wilson(k, n)
    assert got.value == p
    assert got.lo == pytest.approx(max(centre - half, 0), abs=1e-12)
    assert got.hi == pytest.approx(min(centre + half, 1), abs=1e-12)


def test_mean_interval_of_three_seeds() -> None:
    got = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729696142 / math.sqrt(3)
    assert got == pytest.approx((2.0, 2 - half, 2 + half, 3))


def test_one_value_has_no_interval() -> None:
    assert mean_interval([0.3]) == (0.3, None, None, 1)
    assert bootstrap([0.3]) == (0.3, None, None, 1)


def test_bootstrap_is_repeatable_and_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        got = bootstrap(list(rng.exponential(1.0, 40)), resamples=400)
        hits += got.lo <= 1.0 <= got.hi  # type: ignore[operator]
    assert hits >= 50
    assert bootstrap([1.0, 2.0, 9.0], seed=3) == bootstrap([1.0, 2.0, 9.0], seed=3)
    assert bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0, 3)


@pytest.mark.parametrize("function", [mean_interval, bootstrap, lambda v: paired_interval(v, v)])
def test_empty_and_not_finite_raise(function: object) -> None:
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(RunError):
            function(bad)  # type: ignore[operator]


@pytest.mark.parametrize(("k", "n"), [(0, 0), (2, 1), (-1, 4), (0.5, 2)])
def test_wilson_refuses_what_is_no_rate(k: float, n: int) -> None:
    with pytest.raises(RunError):
        wilson(k, n)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- seeds x items


def test_pairing_cancels_what_is_hard_for_both() -> None:
    hard = np.random.default_rng(0).random((3, 100))
    got = paired_interval(hard + 0.1, hard, bounds=None)
    assert (got.value, got.lo, got.hi) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(RunError, match="same seeds and items"):
        paired_interval(hard, hard[:, :50])


def test_head_starts_are_averaged_over_the_seeds_that_are_not_void() -> None:
    one = np.ones((1, 10))
    undefended = np.concatenate([0.9 * one, 0.5 * one, 0.15 * one])
    defended, floor = 0.3 * np.ones((3, 10)), 0.1 * np.ones((3, 10))
    got = head_start_interval(defended, undefended, floor, least_gain=0.1)
    assert got is not None
    assert got.value == pytest.approx((0.2 / 0.8 + 0.2 / 0.4) / 2)
    assert head_start_interval(defended, floor, floor, least_gain=0.1) is None
    with pytest.raises(RunError, match="same seeds and items"):
        head_start_interval(defended, undefended, floor[:, :5], least_gain=0.1)


def test_seeds_and_items_each_have_their_t() -> None:
    values = np.random.default_rng(2).normal(size=(3, 40))
    got = crossed_interval(values)
    halves = [
        stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
        for means in (values.mean(1).tolist(), values.mean(0).tolist())
    ]
    assert (got.value, got.n) == (pytest.approx(values.mean()), 40)
    assert (got.value - got.lo, got.hi - got.value) == pytest.approx((math.hypot(*halves),) * 2)  # type: ignore[operator]
    one_seed, seeds_only = crossed_interval(values[0]), crossed_interval(values.mean(1, keepdims=True))
    assert one_seed == pytest.approx(mean_interval(values[0]))
    assert seeds_only[:3] == pytest.approx(mean_interval(values.mean(1))[:3])
    assert crossed_interval([0.4]) == (0.4, None, None, 1)


def test_value_and_interval_of_a_head_start_are_of_one_estimate() -> None:
    """The mean over the seeds that are not void, of their own ratios; a void seed moves nothing."""
    rng = np.random.default_rng(3)
    defended, undefended, floor = (rng.random((3, 4, 80)) < np.array([0.3, 0.9, 0.1])[:, None, None]).astype(float)
    undefended[3] = floor[3]
    got = head_start_interval(defended, undefended, floor, least_gain=0.1)
    assert got is not None
    d, u, f = (each[:3].mean(1) for each in (defended, undefended, floor))
    assert got.value == pytest.approx(np.mean((d - f) / (u - f)))
    assert got == head_start_interval(defended[:3], undefended[:3], floor[:3], least_gain=0.1)
    assert (got.lo + got.hi) / 2 == pytest.approx(got.value)  # type: ignore[operator]
    assert head_start_interval(floor, floor, floor, least_gain=0.1) is None
    assert head_start_interval([0.3], [0.9], [0.1], least_gain=0.1) == (pytest.approx(0.25), None, None, 1)
    with pytest.raises(RunError, match="same seeds and items"):
        head_start_interval(defended, undefended, floor[:, :5], least_gain=0.1)


def test_the_items_of_a_head_start_are_as_uncertain_as_their_bootstrap() -> None:
    """One seed and many items: the delta method and the percentile bootstrap agree."""
    rng = np.random.default_rng(4)
    hard = rng.random(400)
    models = [(0.5 * hard + 0.5 * rng.random(400) < rate).astype(float) for rate in (0.4, 0.7, 0.2)]
    got = head_start_interval(*models, least_gain=0.1)
    drawn = rng.integers(0, 400, (20000, 400))
    means = [model[drawn].mean(1) for model in models]
    starts = (means[0] - means[2]) / (means[1] - means[2])
    wanted = np.quantile(starts, [0.025, 0.975])
    assert got is not None
    assert got[1:3] == pytest.approx(wanted, abs=0.01)


# ---------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("n", [1, 2, 5, 20, 300])
def test_the_share_that_could_differ_is_clopper_and_pearsons(n: int) -> None:
    assert share_bound(n) == pytest.approx(stats.binomtest(0, n).proportion_ci(0.95, method="exact").high)


def test_differing_counts_the_items_that_are_not_as_the_others() -> None:
    assert differing([0.3] * 9) == 0
    assert differing([0.1 + 0.2, 0.3, 0.3]) == 0  # but for rounding
    assert differing([0.0] * 90 + [1.0] * 4) == pytest.approx(4)
    assert differing([0.0] * 50 + [1e-3] * 40 + [1.0]) == pytest.approx(1, abs=0.1)
    assert differing(np.random.default_rng(0).random(100)) > 50


def test_equal_items_leave_a_share_open() -> None:
    """Never an interval of no width, and n is the items, however often the seeds ask them."""
    none, all_ = np.zeros((3, 20)), np.ones((3, 20))
    share = 1 - 0.025 ** (1 / 20)
    assert bootstrap([0.0] * 20, bounds=RATE) == pytest.approx((0.0, 0.0, share, 20))
    assert bootstrap([1.0] * 20, bounds=RATE) == pytest.approx((1.0, 1 - share, 1.0, 20))
    assert rate_interval(none) == pytest.approx((0.0, 0.0, share, 20))
    assert rate_interval(0.5 * all_) == pytest.approx((0.5, 0.5 - share / 2, 0.5 + share / 2, 20))
    assert paired_interval(all_, all_) == pytest.approx((0.0, -share, share, 20))
    assert paired_interval(all_, none) == pytest.approx((1.0, 1 - 2 * share, 1.0, 20))
    assert mean_interval([0.0] * 3, bounds=DIFFERENCE, items=20) == pytest.approx((0, -share, share, 3))
    assert mean_interval([0.9] * 3, bounds=RATE, items=20) == pytest.approx(
        (0.9, 0.9 - 0.9 * share, 0.9 + 0.1 * share, 3)
    )
    assert mean_interval([0.0] * 3, bounds=RATE) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 3), 3))
    start = head_start_interval(none, 0.9 * all_, 0.1 * none, least_gain=0.1)
    assert start == pytest.approx((0.0, -share / 0.9, share / 0.9, 20))  # one item moves it by 1 / gain


def test_few_items_that_differ_leave_it_open_too() -> None:
    """One hit among sixty answers: Student's t over items would be sure of less than 0.16."""
    one = np.zeros((3, 20))
    one[0, 0] = 1
    got = rate_interval(one)
    assert got.hi is not None
    assert got.hi > 1 / 60 + 0.16
    assert got.lo == 0
    many = np.zeros((3, 20))
    many[:, :10] = 1  # the spread of ten items speaks for itself
    assert rate_interval(many)[:3] == pytest.approx(crossed_interval(many)[:3])


def test_values_without_bounds_get_no_width_invented() -> None:
    losses = np.full((3, 20), 2.5)
    assert crossed_interval(losses) == (2.5, 2.5, 2.5, 20)
    assert paired_interval(losses, losses - 1.5, bounds=None) == (1.5, 1.5, 1.5, 20)
    assert mean_interval([2.5] * 3) == (2.5, 2.5, 2.5, 3)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.integers(1, 4))
def test_a_rate_stays_within_zero_and_one(values: list[float], seeds: int) -> None:
    rng = np.random.default_rng(0)
    table = np.stack([rng.permutation(values) for _ in range(seeds)])
    for got in (rate_interval(table), mean_interval(values, bounds=RATE), bootstrap(values, resamples=99, bounds=RATE)):
        assert 0 <= got.lo <= got.value + 1e-9  # type: ignore[operator]
        assert got.value - 1e-9 <= got.hi <= 1  # type: ignore[operator]
    assert paired_interval(table, 1 - table).lo >= -1  # type: ignore[operator]
    assert paired_interval(table, 1 - table).hi <= 1  # type: ignore[operator]


def test_the_rate_of_the_results_page_ends_at_one() -> None:
    """0.90 of three seeds was printed as [0.79, 1.02]."""
    got = mean_interval([0.85, 0.9, 0.95], bounds=RATE)
    assert got.hi == 1.0
    assert got.lo == mean_interval([0.85, 0.9, 0.95]).lo


def test_a_rate_of_one_seed_is_wilsons_where_it_is_yes_or_no() -> None:
    assert rate_interval([1, 0, 0, 0]) == wilson(1, 4)
    assert rate_interval([True, False, False, False]) == wilson(1, 4)
    assert rate_interval([1, 0, 0, 0.5]) != wilson(1, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rate_interval([0.2, 1.4]),
        lambda: mean_interval([-0.1, 0.4], bounds=RATE),
        lambda: bootstrap([0.5, 2.0], bounds=RATE),
        lambda: paired_interval([3.0, 2.0], [1.0, 0.5]),
    ],
)
def test_what_leaves_its_bounds_is_no_rate(call: Callable[[], object]) -> None:
    with pytest.raises(RunError, match="bounds=None"):
        call()


# ---------------------------------------------------------------------------------- tests


def test_mann_whitney_is_scipys_and_all_ties_say_nothing() -> None:
    a, b = [0.1, 0.4, 0.4, 0.9, 0.2], [0.8, 0.9, 0.7, 1.0, 0.4]
    assert mann_whitney(a, b) == stats.mannwhitneyu(a, b, alternative="two-sided").pvalue
    assert mann_whitney([0.5] * 9, [0.5] * 9) == 1.0


def test_mcnemar_counts_the_discordant_pairs() -> None:
    before, after = [0] * 8 + [1, 1, 0], [1] * 8 + [0, 1, 0]
    p, up, down = mcnemar(before, after)
    assert (up, down) == (8, 1)
    assert p == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar([0, 1], [0, 1]) == (1.0, 0, 0)
    with pytest.raises(RunError, match="0 or 1"):
        mcnemar([0.5], [1])


def test_fisher_is_the_hypergeometric_tail() -> None:
    """Of 10 and 10, 0 and 4: p = 2 C(10,4) / C(20,4)."""
    assert fisher(0, 10, 4, 10) == pytest.approx(2 * math.comb(10, 4) / math.comb(20, 4))
    with pytest.raises(RunError):
        fisher(5, 4, 1, 4)


def test_area_is_the_mean_height() -> None:
    assert area([0, 10, 20], [0.0, 1.0, 0.0]) == pytest.approx(0.5)
    assert area([0, 10, 100], [0.0, 1.0, 1.0]) == pytest.approx((5 + 90) / 100)
    assert area([5], [1.0]) is None
