"""Records of judges and data: who says what, how far they agree, what overlaps or was cut."""

from __future__ import annotations

from dataclasses import dataclass

from repnoise.report.records.attacks import Cell
from repnoise.report.records.estimate import Says


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
