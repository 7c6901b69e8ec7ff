"""Records of attacks: one seed, one cell, curves, what is missing, and all of it together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repnoise.report.records.estimate import Estimate, Role, Says


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
        head_start: over all seeds that are not void, also where the cell was measured again: looking twice errs on
            either side of the bar no more often than each look does.
        first, fresh: then, what the first seeds had said, for which the cell was picked, and what the fresh ones say.
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
    fresh: Estimate | None
    n_fresh: int
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
