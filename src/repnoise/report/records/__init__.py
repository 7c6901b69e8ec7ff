"""What a report is made of, from one cell to the whole summary: plain records that summary.json mirrors.

Keys join (`Cell.id`), labels are for people. Nothing here computes.
"""

from repnoise.report.records.attacks import (
    Areas,
    Cell,
    Curve,
    Gap,
    Generalisation,
    Lines,
    Point,
    Rates,
    Resistance,
    SeedCell,
    StepsToBreak,
    Unseen,
    Use,
)
from repnoise.report.records.estimate import Estimate, Role, Says, Status, mean_of
from repnoise.report.records.judges import Agreement, Cut, DataAudit, Flip, Judged, JudgeSays
from repnoise.report.records.kept import (
    Answers,
    Before,
    BeforeAfter,
    Kept,
    LossRow,
    OverRefusal,
    Stability,
    Trainability,
)
from repnoise.report.records.summary import Claim, Evidence, Section, Summary, Verdict

__all__ = [
    "Agreement",
    "Answers",
    "Areas",
    "Before",
    "BeforeAfter",
    "Cell",
    "Claim",
    "Curve",
    "Cut",
    "DataAudit",
    "Estimate",
    "Evidence",
    "Flip",
    "Gap",
    "Generalisation",
    "JudgeSays",
    "Judged",
    "Kept",
    "Lines",
    "LossRow",
    "OverRefusal",
    "Point",
    "Rates",
    "Resistance",
    "Role",
    "Says",
    "Section",
    "SeedCell",
    "Stability",
    "Status",
    "StepsToBreak",
    "Summary",
    "Trainability",
    "Unseen",
    "Use",
    "Verdict",
    "mean_of",
]
