"""Rows -> readings: the value of one metric of one model, with the items behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from repnoise.intervals import mean_interval
from repnoise.report.manifests import Row


class Reading(NamedTuple):
    """One metric of one model: its value with interval, and the items behind it where the rows hold them."""

    value: float
    lo: float | None
    hi: float | None
    n: int
    items: np.ndarray | None = None  # (rows, items): one row per seed of the evaluation
    judge: str = ""
    exact: bool = False  # `value` is the mean of `items`; a loss per token is not the mean of its rows' losses
    every: int = 1  # the items are every so many-th one of the test split
    rows: int = 1

    def of_items(self) -> np.ndarray | None:
        """(items,): each item's mean over the rows; None where `value` is not their mean."""
        return self.items.mean(0) if self.items is not None and self.exact else None


def shared(a: Reading, b: Reading) -> tuple[np.ndarray, np.ndarray] | None:
    """(rows, items) of both on the test items that both were asked, seeds in order; None where rows do not tell."""
    if a.items is None or b.items is None:
        return None
    every = math.lcm(a.every, b.every)
    first, second = a.items[:, :: every // a.every], b.items[:, :: every // b.every]
    return (first, second) if first.shape == second.shape else None


def pick(
    rows: Iterable[Row],
    metric: str,
    *,
    steps: int | None = None,
    category: str | None = None,
    judge: str | None = None,
) -> Reading | None:
    """The final value of `metric` on the test split over all layers, or None where it was not measured.

    Final means: no `step`, else `step == steps`. Several rows (seeds of a sampling evaluation) are averaged.
    Where several evaluations share a metric name, the first by name counts, after those that say which words are
    right (judge "ground-truth").

    Args:
        judge: whose labels; "" for rows that name none; None for the headline judge, the first in row order.
    """
    final = final_rows(rows, metric, steps, category)
    if judge is not None:
        final = [row for row in final if _judge(row) == judge]
    if not final:
        return None
    first = _first_evaluation(final)
    final = [row for row in final if row.evaluation == first]
    name = _judge(final[0])
    final = [row for row in final if _judge(row) == name]
    strides = {row.every or 1 for row in final}
    items = _items(final) if len(strides) == 1 else None  # else they are not the same test items
    values = np.asarray([row.value for row in final], dtype=float)
    exact = items is not None and bool(np.allclose(items.mean(1), values, rtol=1e-4, atol=1e-4))
    every = strides.pop() if len(strides) == 1 else 1
    if len(final) == 1:
        row = final[0]
        return Reading(row.value, row.lo, row.hi, row.n, items, name, exact, every)
    mean = mean_interval(values)
    n = sum(row.n for row in final)
    return Reading(mean.value, mean.lo, mean.hi, n, items, name, exact, every, len(final))


def judges(rows: Iterable[Row], metric: str, *, steps: int | None = None) -> list[str]:
    """Everyone who judged the final `metric`, the headline judge first; [] where nobody is named."""
    final = final_rows(rows, metric, steps, None)
    first = _first_evaluation(final) if final else ""
    ordered = sorted(final, key=lambda row: row.evaluation != first)
    names = list(dict.fromkeys(_judge(row) for row in ordered))
    return names if any(names) else []


def categories(rows: Iterable[Row], metric: str, *, steps: int | None = None) -> list[str | None]:
    """The categories in which the final `metric` was measured; None stands for all of them together."""
    found = {
        row.category
        for row in rows
        if row.metric == metric and row.split in (None, "test") and row.layer is None and row.step in (None, steps)
    }
    return sorted(found, key=str)


def final_rows(rows: Iterable[Row], metric: str, steps: int | None, category: str | None) -> list[Row]:
    found = [
        row
        for row in rows
        if row.metric == metric and row.split in (None, "test") and row.layer is None and row.category == category
    ]
    final = [row for row in found if row.step is None]
    return final or [row for row in found if steps is not None and row.step == steps]


def _first_evaluation(rows: Sequence[Row]) -> str:
    known = {row.evaluation for row in rows if _judge(row) == "ground-truth"}
    return min((row.evaluation for row in rows), key=lambda name: (name not in known, name))


def _judge(row: Row) -> str:
    return row.judge or ""


def _items(rows: Sequence[Row]) -> np.ndarray | None:
    """(rows, items), or None where a row has none or they differ in number."""
    lists = [row.items for row in rows]
    if any(not each for each in lists) or len({len(each) for each in lists if each}) > 1:
        return None
    return np.asarray(lists, dtype=float)
