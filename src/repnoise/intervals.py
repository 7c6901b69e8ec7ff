"""Means and intervals for few seeds and small samples; always 95 %. SciPy does the mathematics.

An empty sample raises: nothing measured is an error, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from repnoise.errors import RunError

LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with its 95 % interval; `lo` and `hi` are None where one observation allows none."""

    value: float
    lo: float | None
    hi: float | None
    n: int


def as_dict(interval: Interval) -> dict[str, Any]:
    """The interval of a mean as it stands in summary.json."""
    return {"mean": interval.value, "lo": interval.lo, "hi": interval.hi, "n": interval.n}


def _sample(values: Sequence[float], what: str) -> np.ndarray:
    sample = np.asarray(values, dtype=float)
    if sample.ndim != 1 or sample.size == 0:
        raise RunError(
            f"{what} needs a flat list of at least one number, got shape {sample.shape}. Nothing measured is "
            "an error, never 0: look for the run that wrote no rows."
        )
    if not np.isfinite(sample).all():
        raise RunError(f"{what} got a value that is not finite. Leave out what was not measured.")
    return sample


def wilson(successes: int, n: int) -> Interval:
    """Wilson score interval of a rate: `successes` out of `n`."""
    if n < 1 or not 0 <= successes <= n or int(successes) != successes:
        raise RunError(f"A rate needs n >= 1 and a whole number of successes between 0 and n, got {successes} of {n}.")
    bounds = stats.binomtest(int(successes), int(n)).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / n, float(bounds.low), float(bounds.high), int(n))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with Student's t interval; one value has no interval."""
    sample = _sample(values, "A mean")
    mean, n = float(sample.mean()), sample.size
    if n == 1:
        return Interval(mean, None, None, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * stats.sem(sample))
    return Interval(mean, mean - half, mean + half, n)


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> Interval:
    """Mean with the bias-corrected accelerated bootstrap interval; for skewed values such as losses."""
    sample = _sample(values, "A bootstrap")
    mean, n = float(sample.mean()), sample.size
    if n == 1:
        return Interval(mean, None, None, 1)
    if np.ptp(sample) == 0:
        return Interval(mean, mean, mean, n)
    result = stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=resamples,
        batch=100,
        method="BCa",
        random_state=np.random.default_rng(seed),
    )
    bounds = result.confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high), n)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of a - b, item by item, with Student's t interval of the differences."""
    first, second = _sample(a, "A paired difference"), _sample(b, "A paired difference")
    if first.size != second.size:
        raise RunError(f"A paired difference needs two lists of one length, got {first.size} and {second.size}.")
    return mean_interval(list(first - second))


def ratio_bootstrap(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0, resamples: int = 2000
) -> Interval:
    """sum(numerators) / sum(denominators) with a 95 % percentile interval over items, n items.

    The loss per token of rows of different lengths is such a ratio: rows are resampled, not tokens.
    """
    top, bottom = _sample(numerators, "ratio_bootstrap"), _sample(denominators, "ratio_bootstrap")
    value = float(top.sum() / bottom.sum())
    if len(top) < 2:
        return Interval(value, None, None, len(top))
    found = stats.bootstrap(
        (top, bottom),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high), len(top))
