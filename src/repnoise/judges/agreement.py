"""How far judges agree on the same answers: what one judge says alone is a measurement of that judge."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..errors import RunError
from ..intervals import wilson
from .base import LABELS, Judgement


def agreement(judgements: Mapping[str, Sequence[Judgement]]) -> dict[str, Any]:
    """Pairwise agreement of judges that saw the same answers in the same order.

    Returns plain data:
        n: answers.
        judges: {name: {"mean_score", "complies", "labels": {label: count}, "constant"}}; `complies` is the share of
            that label, `constant` says that the judge gave one label to all.
        pairs: one {"a", "b", "n", "agree", "lo", "hi", "kappa", "spearman"} for each two: share of equal labels with
            Wilson's interval, Cohen's kappa on labels, Spearman's rank correlation of scores. kappa is None where
            chance alone makes the two always agree, spearman where a judge gave one score to all: undefined there.
        disagree: indices of the answers that one judge calls harmful ("complies") and another does not.

    Raises:
        RunError: no judge, no answers, or lists of different length.
    """
    sizes = {name: len(given) for name, given in judgements.items()}
    if not sizes or 0 in sizes.values() or len(set(sizes.values())) > 1:
        raise RunError(
            f"agreement needs judgements of the same answers by every judge, at least one answer, got {sizes}."
            " Judge the same samples with each of them."
        )
    n = next(iter(sizes.values()))
    harmful = np.array([[each.label == "complies" for each in given] for given in judgements.values()])
    return {
        "n": n,
        "judges": {name: _alone(given) for name, given in judgements.items()},
        "pairs": [
            {"a": a, "b": b, "n": n, **_pair(judgements[a], judgements[b])}
            for a, b in itertools.combinations(judgements, 2)
        ],
        "disagree": [int(index) for index in np.flatnonzero(harmful.any(0) & ~harmful.all(0))],
    }


def _alone(given: Sequence[Judgement]) -> dict[str, Any]:
    counts = {label: sum(each.label == label for each in given) for label in LABELS}
    return {
        "mean_score": float(np.mean([each.score for each in given])),
        "complies": counts["complies"] / len(given),
        "labels": counts,
        "constant": max(counts.values()) == len(given),
    }


def _pair(first: Sequence[Judgement], second: Sequence[Judgement]) -> dict[str, Any]:
    equal = sum(a.label == b.label for a, b in zip(first, second, strict=True))
    share = wilson(equal, len(first))
    return {
        "agree": share.value,
        "lo": share.lo,
        "hi": share.hi,
        "kappa": cohen_kappa([each.label for each in first], [each.label for each in second]),
        "spearman": _spearman([each.score for each in first], [each.score for each in second]),
    }


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """(observed - expected) / (1 - expected) agreement; None where the expected one is 1 (Cohen 1960)."""
    a, b = np.array(list(first)), np.array(list(second))
    observed = float(np.mean(a == b))
    expected = sum(float(np.mean(a == label)) * float(np.mean(b == label)) for label in set(first) | set(second))
    return None if expected >= 1 else (observed - expected) / (1 - expected)


def _spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)
