"""What is left of a model's use after an attack, and how it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from repnoise.bars import Bars
from repnoise.report.head_start import EPSILON
from repnoise.report.reading import Attacked, Model, Study
from repnoise.report.readings import Reading, shared
from repnoise.report.records import Role, Use

UTILITY = ("stability", "multiple_choice", "truthfulqa_mc1", "harmless_loss")  # the first that was measured counts
RATES = {  # rate: the metrics that may hold it
    "refused": ("{harm}_refused", "refusal_rate"),
    "complied": ("{harm}_complied",),
    "degenerate": ("{harm}_degenerate", "degenerate_rate"),
    "off_topic": ("{harm}_off-topic",),
    "stability": ("stability",),
}


@dataclass(frozen=True)
class Utility:
    """By what a model's use is measured, and how much there was before any attack."""

    metric: str
    undefended: Reading
    defended: Reading | None
    bar: float

    def lost(self, value: float, reference: float) -> float:
        """Share of the reference's use that is gone; a loss counts upwards."""
        change = value - reference if self.metric.endswith("_loss") else reference - value
        return change / abs(reference) if reference else 0.0

    @property
    def lost_by_defence(self) -> float | None:
        return None if self.defended is None else self.lost(self.defended.value, self.undefended.value)

    def after(self, attacked: Sequence[Reading], undefended: Sequence[Reading]) -> Use:
        """What is left after an attack, over its seeds, held against the same items before.

        What the defence itself had cost is no loss to the attacker, and must not protect a defence that ruins.
        """
        own = sum(each.value for each in attacked) / len(attacked)
        before, same = _before(self.undefended, attacked)
        lost = self.lost(own, before)
        further = lost if self.defended is None else self.lost(own, _before(self.defended, attacked)[0])
        theirs = [each.value for each in undefended]
        return Use(
            self.metric,
            before,
            own,
            sum(theirs) / len(theirs) if theirs else None,
            lost,
            min(lost, further) > self.bar + EPSILON,
            same,
        )


def _before(before: Reading, attacked: Sequence[Reading]) -> tuple[float, bool]:
    """The value before on the items that the attacked models were asked, and whether those are the same items."""
    aligned = [shared(before, each) for each in attacked]
    if all(aligned) and before.exact:
        return float(aligned[0][0].mean()), True  # type: ignore[index]
    return before.value, all(before.n * each.rows == each.n * before.rows for each in attacked)


def utility_of(study: Study, model: Model, bars: Bars) -> Utility | None:
    """The first metric of `UTILITY` that the untouched model has and the attacked ones too, if there are any."""
    usable = []
    for metric in UTILITY:
        before = study.base.before(metric) if study.base else None
        if before is not None:
            attacked = any(metric in a.by_metric for a in model.attacks)
            usable.append((attacked, Utility(metric, before, model.before(metric), bars.utility_loss)))
    return next((found for attacked, found in usable if attacked), usable[0][1] if usable else None)


def rate(one: Attacked | Model | None, name: str, judge: str | None, harm: str, role: Role) -> Reading | None:
    """How often a model answers in this way: by this judge, else by anyone."""
    if one is None:
        return None
    # before any attack, rates without a harm in their name are about the main harm
    general = role == "main" or isinstance(one, Attacked) or name == "stability"
    get = one.final if isinstance(one, Attacked) else one.before
    for metric in RATES[name]:
        if not general and "{harm}" not in metric:
            continue
        metric = metric.format(harm=harm)
        found = get(metric, judge=judge) if judge is not None and name != "stability" else None
        if (found := found or get(metric)) is not None:
            return found
    return None
