"""Intervals against closed forms and published values; an empty sample raises."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from repnoise.errors import RunError
from repnoise.intervals import (
    area,
    bootstrap,
    fisher,
    head_start_bootstrap,
    mann_whitney,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_difference,
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


def test_paired_difference_uses_the_pairs() -> None:
    got = paired_difference([10.0, 20.0, 30.0], [9.0, 19.0, 29.0])
    assert got == pytest.approx((1.0, 1.0, 1.0, 3))
    swapped = paired_difference([9.0, 19.0, 29.0], [10.0, 20.0, 30.0])
    assert swapped.value == -got.value


@pytest.mark.parametrize("function", [mean_interval, bootstrap, lambda v: paired_difference(v, v)])
def test_empty_and_not_finite_raise(function: object) -> None:
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(RunError):
            function(bad)  # type: ignore[operator]


@pytest.mark.parametrize(("k", "n"), [(0, 0), (2, 1), (-1, 4), (0.5, 2)])
def test_wilson_refuses_what_is_no_rate(k: float, n: int) -> None:
    with pytest.raises(RunError):
        wilson(k, n)  # type: ignore[arg-type]


def test_lengths_must_agree() -> None:
    with pytest.raises(RunError, match="one length"):
        paired_difference([1.0], [1.0, 2.0])


# ---------------------------------------------------------------------------------- seeds x items


def test_a_paired_bootstrap_of_one_seed_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(60), rng.random(60)
    got = paired_bootstrap(a, b, resamples=20000)
    wanted = stats.bootstrap((a - b,), np.mean, n_resamples=20000, method="percentile", rng=rng).confidence_interval
    assert got.value == pytest.approx((a - b).mean())
    assert (got.lo, got.hi) == pytest.approx((wanted.low, wanted.high), abs=0.004)
    assert got.n == 60


def test_seeds_are_resampled_too() -> None:
    """Items alike within a seed: only the 256 resamples of four seeds are left, and their percentiles are exact."""
    a = np.array([0.0, 0.3, 0.6, 0.9])[:, None] * np.ones((4, 50))
    got = paired_bootstrap(a, np.zeros_like(a), resamples=20000)
    means = [np.mean(each) for each in itertools.product([0.0, 0.3, 0.6, 0.9], repeat=4)]
    wanted = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert (got.lo, got.hi) == pytest.approx(tuple(wanted))
    assert got.value == pytest.approx(0.45)


def test_pairing_cancels_what_is_hard_for_both() -> None:
    hard = np.random.default_rng(0).random((3, 100))
    got = paired_bootstrap(hard + 0.1, hard)
    assert (got.value, got.lo, got.hi) == pytest.approx((0.1, 0.1, 0.1))


def test_a_head_start_bootstrap_of_one_seed_is_scipys() -> None:
    rng = np.random.default_rng(1)
    floor = 0.1 * rng.random(80)
    undefended, defended = 0.7 + 0.3 * rng.random(80), 0.4 * rng.random(80)
    got = head_start_bootstrap(defended, undefended, floor, least_gain=0.1, resamples=20000)

    def ratio(d: np.ndarray, u: np.ndarray, f: np.ndarray, axis: int = -1) -> np.ndarray:
        return (d.mean(axis) - f.mean(axis)) / (u.mean(axis) - f.mean(axis))

    samples = (defended, undefended, floor)
    wanted = stats.bootstrap(samples, ratio, paired=True, n_resamples=20000, method="percentile", rng=rng)
    assert got is not None
    assert got.value == pytest.approx(ratio(*samples))
    assert (got.lo, got.hi) == pytest.approx(tuple(wanted.confidence_interval), abs=0.004)


def test_head_starts_are_averaged_over_the_seeds_that_are_not_void() -> None:
    one = np.ones((1, 10))
    undefended = np.concatenate([0.9 * one, 0.5 * one, 0.15 * one])
    defended, floor = 0.3 * np.ones((3, 10)), 0.1 * np.ones((3, 10))
    got = head_start_bootstrap(defended, undefended, floor, least_gain=0.1)
    assert got is not None
    assert got.value == pytest.approx((0.2 / 0.8 + 0.2 / 0.4) / 2)
    assert head_start_bootstrap(defended, floor, floor, least_gain=0.1) is None
    with pytest.raises(RunError, match="same seeds and items"):
        head_start_bootstrap(defended, undefended, floor[:, :5], least_gain=0.1)


@pytest.mark.bench
def test_a_bootstrap_of_a_cell_is_fast_enough_for_a_grid() -> None:
    rng = np.random.default_rng(0)
    cells = [(rng.random((3, 100)), 0.8 + 0.2 * rng.random((3, 100)), 0.1 * rng.random((3, 100))) for _ in range(20)]
    head_start_bootstrap(*cells[0], least_gain=0.1)  # the resamples are drawn once
    began = time.perf_counter()
    for cell in cells:
        head_start_bootstrap(*cell, least_gain=0.1)
    assert (time.perf_counter() - began) / len(cells) < 0.05


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
