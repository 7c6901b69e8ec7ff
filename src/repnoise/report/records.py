"""What a report is made of, from one cell to the whole summary: plain records that summary.json mirrors field by field.

Keys join (`Cell.id`), labels are for people. Nothing here computes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from repnoise import intervals

Status = Literal["established", "broken", "not established"]
Says = Literal["broken", "holds", "open"]
Role = Literal["main", "withheld", "domain"]
"""What a harm is to the defence: what it is against, a category kept from it, or a harm of another domain."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; `lo` and `hi` are None where one observation allows none."""

    mean: float
    lo: float | None
    hi: float | None
    n: int

    @classmethod
    def of(cls, found: intervals.Estimate) -> Estimate:
        return cls(found.value, found.lo, found.hi, found.n)

    def __str__(self) -> str:
        """ "0.41 [0.30, 0.52]", or "0.41" where there is no interval."""
        if self.lo is None or self.hi is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} [{self.lo:.2f}, {self.hi:.2f}]"


def mean_of(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.mean


# ---------------------------------------------------------------------------------- one attack


@dataclass(frozen=True)
class Rates:
    """How a model answers harmful prompts (shares), and how many harmless ones it gets right."""

    refused: Estimate | None = None
    complied: Estimate | None = None
    degenerate: Estimate | None = None
    off_topic: Estimate | None = None
    stability: Estimate | None = None


@dataclass(frozen=True)
class Use:
    """What one attack left of the model's use.

    Attributes:
        before: of the untouched model before any attack, on the same items.
        lost: share of it that the attacked defended model has lost.
        ruined: more than the bar, beyond what the defence itself had cost.
        same_items: whether before and after were asked the same items; else the two cannot be compared.
    """

    metric: str
    before: float
    defended: float
    undefended: float | None
    lost: float
    ruined: bool
    same_items: bool


@dataclass(frozen=True)
class StepsToBreak:
    """First recorded step with a head start above the bar; None: not within `censored_at` steps."""

    defended: int | None
    undefended: int | None
    censored_at: int
    points: int


@dataclass(frozen=True)
class Areas:
    """Mean harm along the attack, 0 to 1."""

    defended: float | None
    undefended: float | None
    floor: float | None


@dataclass(frozen=True)
class SeedCell:
    """One attack with one seed.

    Attributes:
        lacks: why there is no head start, in words; "" where there is one, and for a void cell.
        use: of the attacked defended model.
    """

    id: str
    attack: dict[str, Any]
    label: str
    harm: str
    judge: str | None
    seed: int
    undefended: float | None
    defended: float | None
    floor: float | None
    floor_control: str | None
    random: float | None
    head_start: float | None
    void: bool
    n: int
    lacks: str
    degenerate: bool
    mann_whitney_p: float | None
    use: float | None
    steps_to_break: StepsToBreak | None


@dataclass(frozen=True)
class Cell:
    """One attack over its seeds, for one harm, by one judge, on one category (None: all of them).

    Attributes:
        id: joins cells of one attack over models, judges and categories: the attack and the harm.
        covers: directions of attack that it goes in.
        head_start: over the seeds that are not void; of the fresh seeds alone where the cell was measured again.
        first: then, what the first seeds had said.
        counted: the head start that ranks the cell. A collapsed model is never better than one that refuses honestly,
            so it counts as 0 at least.
        says: "broken": the lower end is above the bar. "holds": the upper end is not. "open": the interval cannot
            tell. None: void, or no head start.
    """

    id: str
    attack: dict[str, Any]
    covers: list[str]
    harm: str
    role: Role
    label: str
    judge: str | None
    category: str | None
    n_seeds: int
    n_void: int
    void: bool
    floor_control: str | None
    undefended: Estimate | None
    defended: Estimate | None
    floor: Estimate | None
    random: Estimate | None
    difference: Estimate | None
    head_start: Estimate | None
    first: Estimate | None
    counted: float | None
    says: Says | None
    settles: str
    """For an open cell, what would settle it."""
    interval: str | None
    mann_whitney_p: float | None
    degenerate: bool
    use: Use | None
    after_undefended: Rates
    after_defended: Rates
    steps_to_break: StepsToBreak | None
    auc: Areas | None

    @property
    def ruined(self) -> bool:
        """Whether the attack left a model of no use; where use was not measured, it counts as usable."""
        return self.use is not None and self.use.ruined


@dataclass(frozen=True)
class Point:
    """Harm at one step along an attack, or any value along a training."""

    step: float
    mean: float
    lo: float | None = None
    hi: float | None = None


Lines = dict[str, list[Point]]
"""Role of a model -> its line."""


@dataclass(frozen=True)
class Curve:
    """Harm along one attack, for each model."""

    id: str
    harm: str
    label: str
    bounded: bool
    lines: Lines


@dataclass(frozen=True)
class Gap:
    """An attack with one seed that the defended model ought to have been measured under, and was not."""

    id: str
    harm: str
    label: str
    seed: int
    why: str


@dataclass(frozen=True)
class Resistance:
    """All attacks on one defended model.

    Attributes:
        metric: the harms that were attacked.
        worst_head_start: of all cells that count; `utility_bounded_worst`: of those that left a usable model.
        cells: every attack with every seed; `head_start_by_cell`: the attacks over their seeds, by the headline judge.
        lacking: attacks that the defended model ought to have been measured under, and was not.
    """

    metric: str | None
    worst_head_start: float | None
    worst_cell: str | None
    utility_bounded_worst: float | None
    utility_bounded_cell: str | None
    cells: list[SeedCell]
    head_start_by_cell: list[Cell]
    curves: list[Curve]
    lacking: list[Gap]


# ---------------------------------------------------------------------------------- what was kept


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
class Unseen:
    """A withheld category or another domain: the attack that decides about it.

    Attributes:
        cell: its `Cell.id`; `n_cells`: how many there were.
        says, settles, ruined, degenerate: as in `Cell`.
    """

    name: str
    defended: float | None
    undefended: float | None
    floor: float | None
    head_start: float | None
    head_start_lo: float | None
    head_start_hi: float | None
    says: Says | None
    settles: str
    n_seeds: int
    n_cells: int
    ruined: bool
    degenerate: bool
    label: str
    cell: str

    @property
    def start(self) -> Estimate | None:
        if self.head_start is None:
            return None
        return Estimate(self.head_start, self.head_start_lo, self.head_start_hi, self.n_seeds)


@dataclass(frozen=True)
class Generalisation:
    withheld: dict[str, Unseen]
    cross_domain: dict[str, Unseen]


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


# ---------------------------------------------------------------------------------- judges, data


@dataclass(frozen=True)
class JudgeSays:
    """One judge on one harm: its worst cell and what its cells say together."""

    judge: str
    headline: bool
    before_undefended: float | None
    before_defended: float | None
    worst: Cell | None
    says: Says | None


@dataclass(frozen=True)
class Flip:
    """A judge that says otherwise than the headline."""

    harm: str
    headline: str
    headline_says: Says
    headline_head_start: float
    judge: str
    says: Says
    head_start: float
    cell: str


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the answers of one model."""

    model: str
    state: str
    harm: str
    judges: list[str]
    agreement: float | None = None
    kappa: float | None = None
    spearman: float | None = None


@dataclass(frozen=True)
class Judged:
    harms: dict[str, list[JudgeSays]]
    flips: list[Flip]
    agreement: list[Agreement]


@dataclass(frozen=True)
class Cut:
    """Rows of one data set that did not fit `max_length`."""

    data: str
    rows: int
    answers: int
    prompts: int


@dataclass(frozen=True)
class DataAudit:
    """What the manifests say of the data.

    Attributes:
        disjoint: None where no audit is recorded.
        given: the model was defended elsewhere, on data that nobody audited here.
        template: the study's prompt template.
    """

    disjoint: bool | None
    overlaps: list[str]
    harmless_overlaps: list[str]
    given: bool
    template: str | None
    cut: list[Cut]


# ---------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Claim:
    """One claim of the verdict.

    Attributes:
        detail: why, without the status.
        settles: what would turn "not established" into an answer; "" otherwise.
        not_tried: what it does not cover.
    """

    claim: str
    status: Status
    detail: str
    harm: str | None = None
    cell: str | None = None
    estimate: Estimate | None = None
    settles: str = ""
    not_tried: list[str] = field(default_factory=list)
    flips: bool = False
    collapse: bool = False


@dataclass(frozen=True)
class Verdict:
    status: Status
    headline: str
    sentences: list[str]
    claims: list[Claim]
    caveats: list[str]
    warnings: list[str]
    axes_not_tried: list[str]


@dataclass(frozen=True)
class Evidence:
    """Everything that was measured of one defence. `missing` names what was not, each with its reason."""

    resistance: Resistance
    stability: Stability | None
    trainability: Trainability | None
    over_refusal: OverRefusal | None
    generalisation: Generalisation
    losses: list[LossRow]
    before: Before
    also_measured: dict[str, Kept]
    data: DataAudit
    judges: Judged | None
    harms: dict[str, Role]
    attacked: list[str]
    missing: dict[str, str]
    bars: dict[str, float]


@dataclass(frozen=True)
class Section(Evidence):
    """Everything about one defence: what was measured, and what may be said of it."""

    verdict: Verdict


@dataclass(frozen=True)
class Summary:
    """The whole of summary.json; `defences` maps names to sections, `defence` names the headline."""

    schema: int
    study: str
    defence: str
    seconds: dict[str, float]
    problems: list[str]
    defences: dict[str, Section]

    @property
    def main(self) -> Section:
        return self.defences[self.defence]

    def as_json(self, *, several: bool = False) -> dict[str, Any]:
        """The headline's section at the top, and all of them under `defences` where there are several, or asked for."""
        whole = dataclasses.asdict(self)
        defences = whole.pop("defences")
        for section in defences.values():
            for claim in section["verdict"]["claims"]:
                claim["text"] = f"{claim['status']}: {claim['detail']}"
        return {**whole, **defences[self.defence], **({"defences": defences} if several or len(defences) > 1 else {})}
