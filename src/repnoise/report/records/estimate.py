"""A measured number with its interval, and the words for what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
