"""Records of the verdict, and of everything that summary.json holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from repnoise.report.records.attacks import Generalisation, Resistance
from repnoise.report.records.estimate import Estimate, Role, Status
from repnoise.report.records.judges import DataAudit, Judged
from repnoise.report.records.kept import Before, Kept, LossRow, OverRefusal, Stability, Trainability


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
