"""Records of what the defence costs, and of both models before any attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repnoise.report.records.attacks import Point
from repnoise.report.records.estimate import Estimate


@dataclass(frozen=True)
class Kept:
    """One measure on the untouched and on the defended model, on the same items where rows hold them.

    Attributes:
        higher_is_worse: a loss, or a rate of refusals.
        tolerance: how much worse it may be after the defence, in its own units.
        difference: after - before with its interval, or None where there are no items and no intervals.
        settles: what would tell on which side of the tolerance the difference lies, where the interval does not.
        seeds: training seeds behind it (trainability), else evaluation seeds.
    """

    metric: str
    higher_is_worse: bool
    tolerance: float
    before: float
    after: float
    n: int
    seeds: int
    before_lo: float | None
    before_hi: float | None
    lo: float | None
    hi: float | None
    difference: Estimate | None
    settles: str

    @property
    def worse(self) -> Estimate | None:
        """By how much it is worse after the defence; negative where it is better."""
        found = self.difference
        if found is None or self.higher_is_worse:
            return found
        lo, hi = (None if end is None else -end for end in (found.hi, found.lo))
        return Estimate(-found.mean, lo, hi, found.n)


@dataclass(frozen=True)
class Stability(Kept):
    """The leading measure of use, and every one that was measured."""

    measures: dict[str, Kept]


@dataclass(frozen=True)
class OverRefusal(Kept):
    """Refusals of harmless prompts, with an exact test."""

    p_value: float
    test: str
    newly_refused: int | None
    no_longer_refused: int | None


@dataclass(frozen=True)
class BeforeAfter:
    """Learning curves of the untouched and of the defended model, and the mean height of each."""

    before: list[Point]
    after: list[Point]
    before_area: float | None
    after_area: float | None


@dataclass(frozen=True)
class Trainability(Kept):
    """The score after learning a harmless task, and along the way where it was asked."""

    curve: BeforeAfter
    measures: dict[str, Kept]


@dataclass(frozen=True)
class Answers:
    """How one model answers the prompts of one harm before any attack."""

    harm: float | None
    refused: float | None
    complied: float | None
    degenerate: float | None
    off_topic: float | None


@dataclass(frozen=True)
class Before:
    """Both models before any attack.

    Attributes:
        undefended, defended: harm -> answers.
        noise: harms that the defended model answers with noise instead of refusing.
        use, use_lost: measure of use, and the share of it that the defence cost.
        collapsed: most of the use is gone, or most answers are degenerate and nothing shows that use is left.
    """

    undefended: dict[str, Answers]
    defended: dict[str, Answers]
    noise: list[str]
    use: str | None
    use_lost: float | None
    collapsed: bool


@dataclass(frozen=True)
class LossRow:
    """Losses and rates of one model before any attack, or after one (mean over its seeds).

    `steps_to_break`: first recorded step at which the harmful loss is back at that of the untouched model before any
    attack; None if it never is.
    """

    id: str | None
    model: str
    attack: dict[str, Any] | None
    label: str
    harm: str | None
    harmful_loss: Estimate | None
    harmless_loss: Estimate | None
    refusal_rate: Estimate | None
    degenerate_rate: Estimate | None
    difference: Estimate | None = None
    """Harmful loss of the defended model minus that of the undefended one after the same attack."""
    steps_to_break: int | None = None
    n_seeds: int = 1
