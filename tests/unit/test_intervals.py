"""Intervals against closed forms and published values; an empty sample raises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repnoise.errors import RunError
from repnoise.intervals import bootstrap, mean_interval, paired_difference, wilson

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
