"""Means and intervals for few seeds and small samples; always 95 %. SciPy does the mathematics.

An empty sample raises: nothing measured is an error, never 0. What an interval over seeds and items promises is
simulated in tests/unit/test_coverage.py.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy import integrate, special, stats

from repnoise.errors import RunError

LEVEL = 0.95
TAIL = (1 + LEVEL) / 2

Bounds = tuple[float, float]
RATE: Bounds = (0.0, 1.0)
DIFFERENCE: Bounds = (-1.0, 1.0)
"""Of two rates."""
FEW = 5
"""Below so many items that differ from the others their spread says little: the rule of thumb n p >= 5."""
TINY = 1e-9


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


def _bounded(sample: np.ndarray, bounds: Bounds | None, what: str) -> None:
    if bounds is not None and not (bounds[0] - TINY <= sample.min() and sample.max() <= bounds[1] + TINY):
        raise RunError(
            f"{what} got values from {sample.min():g} to {sample.max():g}, outside [{bounds[0]:g}, {bounds[1]:g}]. "
            "Pass bounds=None for losses and other values without bounds."
        )


def share_bound(n: int) -> float:
    """The share of all items that could differ though all `n` seen were equal; about 3.7 / n.

    Clopper and Pearson's two-sided bound for 0 of n (the "rule of three" is the one-sided one).
    """
    return float(1 - (1 - TAIL) ** (1 / n))


def differing(values: ArrayLike) -> float:
    """About how many values differ from the middle one: 0 where all are equal, k where k differ by the same.

    The effective number (sum d)^2 / sum d^2 of the distances d from the median, so that many tiny distances beside
    one large one count as about one.
    """
    sample = np.asarray(values, dtype=float)
    distance = np.abs(sample - np.median(sample))
    squares = float((distance**2).sum())
    return float(distance.sum()) ** 2 / squares if distance.max() > TINY else 0.0


def _reach(value: float, bounds: Bounds | None) -> tuple[float, float]:
    """How far below and above the mean one item could lie."""
    return (0.0, 0.0) if bounds is None else (value - bounds[0], bounds[1] - value)


def _around(value: float, below: float, above: float, n: int, bounds: Bounds | None) -> Interval:
    lo, hi = value - below, value + above
    if bounds is not None:
        lo, hi = max(lo, bounds[0]), min(hi, bounds[1])
    return Interval(value, float(lo), float(hi), n)


def _t_half(values: np.ndarray) -> float:
    """Half the width of Student's t interval; 0 for one value, whose spread is not known."""
    n = values.size
    return float(special.stdtrit(n - 1, TAIL) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def wilson(successes: int, n: int) -> Interval:
    """Wilson score interval of a rate: `successes` out of `n`."""
    if n < 1 or not 0 <= successes <= n or int(successes) != successes:
        raise RunError(f"A rate needs n >= 1 and a whole number of successes between 0 and n, got {successes} of {n}.")
    bounds = stats.binomtest(int(successes), int(n)).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / n, float(bounds.low), float(bounds.high), int(n))


def mean_interval(values: ArrayLike, *, bounds: Bounds | None = None, items: int | None = None) -> Interval:
    """Mean with Student's t interval; one value has no interval.

    For values of seeds; where their items are at hand, `crossed_interval` also knows what the choice of items adds.

    Args:
        bounds: what the values cannot leave, such as `RATE`; the interval cannot either. Values that are all equal
            then get the width that `items` (without them the values) equal observations leave open, see
            `share_bound`. Without bounds there is nothing to derive a width from, and it is 0.
        items: over how many items each value is a mean.
    """
    sample = _sample(values, "A mean")
    _bounded(sample, bounds, "A mean")
    mean, n = float(sample.mean()), sample.size
    if n == 1:
        return Interval(mean, None, None, 1)
    half = _t_half(sample)
    share = share_bound(items or n) if np.ptp(sample) <= TINY else 0.0
    below, above = (max(half, share * reach) for reach in _reach(mean, bounds))
    return _around(mean, below, above, n, bounds)


def bootstrap(
    values: Sequence[float], seed: int = 0, resamples: int = 2000, *, bounds: Bounds | None = None
) -> Interval:
    """Mean with the bias-corrected accelerated bootstrap interval; for skewed values such as losses.

    Args:
        bounds: what the values cannot leave, such as `RATE` for scores in [0, 1]. Where all or all but a few are
            equal, the interval then reaches at least as far as `share_bound` says. Without bounds (losses) equal
            values give an interval of no width: nothing says how far another one could lie.
    """
    sample = _sample(values, "A bootstrap")
    _bounded(sample, bounds, "A bootstrap")
    mean, n = float(sample.mean()), sample.size
    if n == 1:
        return Interval(mean, None, None, 1)
    lo = hi = mean
    if np.ptp(sample) > TINY:
        found = stats.bootstrap(
            (sample,),
            np.mean,
            confidence_level=LEVEL,
            n_resamples=resamples,
            batch=100,
            method="BCa",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
        lo, hi = float(found.low), float(found.high)
    share = share_bound(n) if differing(sample) < FEW else 0.0
    down, up = _reach(mean, bounds)
    return _around(mean, max(mean - lo, share * down), max(hi - mean, share * up), n, bounds)


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


def _crossed(values: np.ndarray, reach: tuple[float, float], bounds: Bounds | None) -> Interval:
    """The interval of `crossed_interval`; `reach`: how far below and above the mean one item could lie."""
    seeds, items = values.shape
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, None, None, 1)
    by_seed, by_item = values.mean(1), values.mean(0)
    over_seeds, over_items = _t_half(by_seed), _t_half(by_item)
    # without items at hand (one a seed) only seeds that agree entirely say nothing of their spread
    unseen = differing(by_item) < FEW if items > 1 else differing(by_seed) == 0
    share = share_bound(items if items > 1 else seeds) if unseen else 0.0
    below, above = (math.hypot(over_seeds, max(over_items, share * far)) for far in reach)
    return _around(mean, below, above, items, bounds)


def crossed_interval(values: ArrayLike, *, bounds: Bounds | None = None) -> Interval:
    """Mean over seeds and items that are crossed (every seed asks the same items); n counts the items.

    half^2 = (t sd of the seeds' means)^2 / seeds + (t sd of the items' means)^2 / items, with Student's t of
    seeds - 1 and of items - 1 degrees of freedom. The noise of single answers is in both terms, so the interval is a
    little wide where seeds do not differ (it covers 0.99 there), and it covers 0.93 and more in everything simulated,
    from two to ten seeds. Three seeds have few resamples: a percentile bootstrap covers as little as 0.8. Student's t
    over seeds alone forgets what the choice of items adds, as low as 0.8 too; the wider of t over seeds and over items
    covers 0.89 where both matter.

    With one seed the first term is missing: the interval is about this one seed, whatever others would give. With
    one item a seed the second is: the values are then the seeds' means.

    Args:
        values: (seeds, items), or the items of one seed.
        bounds: what no value can leave (`RATE`, `DIFFERENCE`); the interval cannot either. Where fewer than about
            five items differ from the others, the item term is at least the share of items that could differ unseen
            times how far they could lie (`share_bound`), so that 0 of 20 is not known to be 0. The items count as
            n, not seeds x items: the same prompts asked again are no new prompts. None (losses): no such width, and
            values that are all equal have an interval of width 0.
    """
    sample = grid(values, "A mean over seeds and items")
    _bounded(sample, bounds, "A mean over seeds and items")
    return _crossed(sample, _reach(float(sample.mean()), bounds), bounds)


def rate_interval(values: ArrayLike) -> Interval:
    """Mean of values in [0, 1]: Wilson's interval for the 0/1 items of one seed, else `crossed_interval`."""
    sample = grid(values, "A rate")
    if len(sample) == 1 and np.isin(sample, (0, 1)).all():
        return wilson(int(sample.sum()), sample.size)
    return crossed_interval(sample, bounds=RATE)


def paired_interval(a: ArrayLike, b: ArrayLike, *, bounds: Bounds | None = DIFFERENCE) -> Interval:
    """Mean of a - b over seeds and items, the same for both; n counts the items. See `crossed_interval`.

    Args:
        a, b: (seeds, items), or the items of one seed.
        bounds: of the differences: those of two rates by default; None for losses.
    """
    first, second = _grids("A paired interval", a, b)
    return crossed_interval(first - second, bounds=bounds)


def _head_starts(
    defended: ArrayLike, undefended: ArrayLike, floor: ArrayLike, least_gain: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """(seeds, items) whose mean over items is the head start of each seed that is not void, and those seeds' gains.

    A ratio of means has no values of items; these are its first-order ones (the delta method): where the head start
    of a seed is r, item i counts r + ((defended_i - floor_i) - r (undefended_i - floor_i)) / gain.
    """
    grids = _grids("A head start", defended, undefended, floor)
    means = grids.mean(2)
    counts = means[1] - means[2] >= least_gain
    if not counts.any():
        return None
    harm, most = (grids[0] - grids[2])[counts], (grids[1] - grids[2])[counts]
    gain = most.mean(1, keepdims=True)
    start = harm.mean(1, keepdims=True) / gain
    return start + (harm - start * most) / gain, gain.ravel()


def head_start_interval(
    defended: ArrayLike, undefended: ArrayLike, floor: ArrayLike, *, least_gain: float
) -> Interval | None:
    """Mean over seeds of (defended - floor) / (undefended - floor), and its interval; n counts the items.

    Value and interval are of the same estimate: the seeds whose gain (undefended - floor) is below `least_gain` are
    void and left out of both; None where every seed is. Seeds and items are those of `crossed_interval`, the items
    paired across the three models, so that what is hard for all of them cancels; one item can move a head start by
    1 / gain. Where one seed is left, the interval is about that seed alone: count the seeds before a verdict.

    It assumes seeds that scatter about their mean: it covers 0.90 where most hold and some are far above (a beta
    distribution with mean and sd 0.2), and 0.51 of three seeds where one in five breaks entirely and the others hold,
    as no interval can know of a seed that was not drawn.

    Args:
        defended, undefended, floor: harm scores of (seeds, items), or the items of one seed.
    """
    found = _head_starts(defended, undefended, floor, least_gain)
    if found is None:
        return None
    values, gains = found
    far = float(1 / gains.mean())
    return _crossed(values, (far, far), None)


def side(interval: Estimate, bar: float) -> Literal["above", "below"] | None:
    """On which side of `bar` the whole interval lies; None where it holds the bar, or where there is none."""
    if interval.lo is None or interval.hi is None:
        return None
    if interval.lo > bar + TINY:
        return "above"
    return "below" if interval.hi <= bar + TINY else None


class Needed(NamedTuple):
    """What would settle on which side of a bar a mean lies: so many seeds on these items, or items with these seeds.

    Totals, the measured ones included. None: out of reach in this direction, or not known.
    """

    seeds: int | None
    items: int | None


def needed(values: ArrayLike, bar: float, *, reach: float = 0.0, power: float = 0.8, most: int = 1000) -> Needed | None:
    """How many seeds or items `crossed_interval` would need to lie on one side of `bar` with probability `power`.

    Takes the mean and the spreads that were measured for the true ones. They are guesses themselves: from three
    seeds the spread between seeds is known to a factor of two at best, and a mean that was picked as the worst of
    many is too far from the bar. None where the mean is at the bar, or where more than `most` of either are needed.

    Args:
        values: (seeds, items), or the items of one seed, for which `seeds` stays None; (seeds, 1) where only the
            seeds' values are known, for which `items` stays None.
        reach: how far one item could lie from the mean, see `crossed_interval`; 0 for losses.
    """
    sample = grid(values, "A plan")
    seeds, items = sample.shape
    distance = abs(float(sample.mean()) - bar)
    if distance <= TINY or sample.size == 1:
        return None
    by_seed, by_item = sample.mean(1), sample.mean(0)
    noise = 0.0  # of single answers, in the means of seeds and of items alike
    if seeds > 1 and items > 1:
        rest = sample - by_seed[:, None] - by_item + sample.mean()
        noise = float((rest**2).sum()) / ((seeds - 1) * (items - 1))
    of_seeds = max(float(by_seed.var(ddof=1)) - noise / items, 0.0) if seeds > 1 else 0.0
    of_items = max(float(by_item.var(ddof=1)) - noise / seeds, 0.0) if items > 1 else 0.0
    different = differing(by_item)

    def settles(n: int, m: int) -> bool:
        """Whether n seeds and m items have the power, over the quantiles of the spread that n seeds would show."""
        seed_part, item_part = (of_seeds + noise / m) / n, (of_items + noise / n) / m
        spread = stats.chi2.ppf((np.arange(400) + 0.5) / 400, n - 1) / (n - 1) if n > 1 else np.zeros(1)
        over_items = special.stdtrit(m - 1, TAIL) * math.sqrt(item_part) if m > 1 else 0.0
        if m > 1 and different * m / items < FEW:
            over_items = max(over_items, share_bound(m) * reach)
        over_seeds = special.stdtrit(n - 1, TAIL) * np.sqrt(seed_part * spread) if n > 1 else np.zeros(1)
        sd = math.sqrt(max(seed_part + item_part - noise / (n * m), TINY**2))
        return bool(special.ndtr((distance - np.hypot(over_seeds, over_items)) / sd).mean() >= power)

    def least(measured: int, test: Callable[[int], bool]) -> int | None:
        tried = range(measured + 1, most + 1)
        at = bisect.bisect_left(tried, True, key=test)
        return tried[at] if at < len(tried) else None

    found = Needed(
        least(seeds, lambda n: settles(n, items)) if seeds > 1 else None,
        least(items, lambda m: settles(seeds, m)) if items > 1 else None,
    )
    return None if found == (None, None) else found


def head_start_needed(
    defended: ArrayLike,
    undefended: ArrayLike,
    floor: ArrayLike,
    bar: float,
    *,
    least_gain: float,
    power: float = 0.8,
    most: int = 1000,
) -> Needed | None:
    """`needed` for the head start of `head_start_interval`; seeds that are not void. None where every seed is void."""
    found = _head_starts(defended, undefended, floor, least_gain)
    if found is None:
        return None
    values, gains = found
    return needed(values, bar, reach=float(1 / gains.mean()), power=power, most=most)


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
