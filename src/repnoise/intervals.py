"""Means and intervals for few seeds and small samples; always 95 %. SciPy does the mathematics.

An empty sample raises: nothing measured is an error, never 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy import integrate, stats

from repnoise.errors import RunError

LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with its 95 % interval; `lo` and `hi` are None where one observation allows none."""

    value: float
    lo: float | None
    hi: float | None
    n: int


class Estimate(Protocol):
    """Anything with a value, its interval and how many observations are behind it."""

    @property
    def value(self) -> float: ...
    @property
    def lo(self) -> float | None: ...
    @property
    def hi(self) -> float | None: ...
    @property
    def n(self) -> int: ...


def as_dict(interval: Estimate) -> dict[str, Any]:
    """The interval of a mean as it stands in summary.json."""
    return {"mean": interval.value, "lo": interval.lo, "hi": interval.hi, "n": interval.n}


def _sample(values: ArrayLike, what: str) -> np.ndarray:
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


def mean_interval(values: ArrayLike) -> Interval:
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


# ---------------------------------------------------------------------------------- seeds x items

RESAMPLES = 2000


def grid(values: ArrayLike, what: str = "A grid") -> np.ndarray:
    """Values of (seeds, items), or of the items of one seed, as a float array (seeds, items)."""
    sample = np.atleast_2d(np.asarray(values, dtype=float))
    if sample.ndim != 2:
        raise RunError(f"{what} needs values of seeds x items, got shape {sample.shape}.")
    _sample(sample.ravel(), what)
    return sample


def _grids(what: str, *values: ArrayLike) -> np.ndarray:
    """Several grids of one shape as one array (grids, seeds, items)."""
    found = [grid(each, what) for each in values]
    if len({each.shape for each in found}) > 1:
        shapes = ", ".join(str(each.shape) for each in found)
        raise RunError(f"{what} needs the same seeds and items for every model, got grids of {shapes}.")
    return np.stack(found)


@functools.lru_cache(maxsize=32)
def _shares(n: int, level: str, resamples: int, seed: int) -> np.ndarray:
    """(resamples, n): the share of each of n things in a resample with replacement; kept, as cells are alike."""
    rng = np.random.default_rng([seed, n, *level.encode()])
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    lo, hi = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lo), float(hi)


def paired_bootstrap(a: ArrayLike, b: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of a - b with a percentile interval by a two-level bootstrap; n counts the items.

    Seeds and items are crossed (every seed asks the same items), so each resample draws seeds and items
    independently, and the same ones for `a` and `b` (Owen 2007, "The pigeonhole bootstrap").

    Args:
        a, b: (seeds, items), or the items of one seed; with one seed only items are resampled.
    """
    first, second = _grids("A paired bootstrap", a, b)
    seeds, items = first.shape
    value = float((first - second).mean())
    if items == 1 and seeds == 1:
        return Interval(value, None, None, 1)
    means = (first - second) @ _shares(items, "items", resamples, seed).T  # (seeds, resamples)
    lo, hi = _percentiles((means * _shares(seeds, "seeds", resamples, seed).T).sum(0))
    return Interval(value, lo, hi, items)


def head_start_bootstrap(
    defended: ArrayLike,
    undefended: ArrayLike,
    floor: ArrayLike,
    *,
    least_gain: float,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Mean over seeds of (defended - floor) / (undefended - floor) with a two-level bootstrap interval.

    Seeds and items are resampled jointly for the three models, so that what is hard for all of them cancels. A
    seed whose gain (undefended - floor) is below `least_gain` is void and left out, in the resamples as in
    the data. None where every seed is void; no interval where most resamples are.

    Args:
        defended, undefended, floor: harm scores of (seeds, items), or the items of one seed.
    """
    grids = _grids("A head start", defended, undefended, floor)
    _, seeds, items = grids.shape

    def starts(means: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """means (3, seeds, R), shares (seeds, R) -> head starts of the resamples that are not void."""
        gain = means[1] - means[2]
        counts = gain >= least_gain
        ratios = np.divide(means[0] - means[2], gain, out=np.zeros_like(gain), where=counts)
        weight = shares * counts
        total = weight.sum(0)
        return (ratios * weight).sum(0)[total > 0] / total[total > 0]

    found = starts(grids.mean(2, keepdims=True), np.full((seeds, 1), 1 / seeds))
    if not len(found):
        return None
    value = float(found[0])
    if items == 1 and seeds == 1:
        return Interval(value, None, None, 1)
    resampled = starts(grids @ _shares(items, "items", resamples, seed).T, _shares(seeds, "seeds", resamples, seed).T)
    if len(resampled) < resamples / 2:
        return Interval(value, None, None, items)
    return Interval(value, *_percentiles(resampled), items)


# ---------------------------------------------------------------------------------- tests


def mann_whitney(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p value of the Mann-Whitney U test, by which the paper compares harm scores (its table 1)."""
    first, second = _sample(a, "Mann-Whitney"), _sample(b, "Mann-Whitney")
    if np.ptp(np.concatenate([first, second])) == 0:
        return 1.0  # all tied: the normal approximation has no variance
    return float(stats.mannwhitneyu(first, second, alternative="two-sided").pvalue)


def mcnemar(before: ArrayLike, after: ArrayLike) -> tuple[float, int, int]:
    """Exact McNemar test on paired 0/1 items: p value, items that went 0 -> 1, items that went 1 -> 0."""
    first, second = _sample(before, "McNemar's test"), _sample(after, "McNemar's test")
    if first.size != second.size:
        raise RunError(f"McNemar's test needs two lists of one length, got {first.size} and {second.size}.")
    if not np.isin(np.concatenate([first, second]), (0, 1)).all():
        raise RunError("McNemar's test needs items that are 0 or 1. Use a paired difference for scores.")
    up, down = int((second > first).sum()), int((second < first).sum())
    return (float(stats.binomtest(up, up + down).pvalue) if up + down else 1.0), up, down


def fisher(successes_a: int, n_a: int, successes_b: int, n_b: int) -> float:
    """Two-sided p value of Fisher's exact test that two rates are equal; for counts whose items are not known."""
    table = [[successes_a, n_a - successes_a], [successes_b, n_b - successes_b]]
    if min(min(row) for row in table) < 0 or n_a < 1 or n_b < 1:
        raise RunError(f"Fisher's test got {successes_a} of {n_a} and {successes_b} of {n_b}.")
    return float(stats.fisher_exact(table).pvalue)


def area(steps: Sequence[float], values: Sequence[float]) -> float | None:
    """Mean height of a curve: its area by the trapezoid rule over its width; None for fewer than two steps."""
    x, y = _sample(steps, "An area"), _sample(values, "An area")
    if x.size != y.size or x.size < 2 or x[-1] <= x[0]:
        return None
    return float(integrate.trapezoid(y, x) / (x[-1] - x[0]))
