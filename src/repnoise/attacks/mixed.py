"""Mixed data: a share of harmful rows hidden among harmless ones.

Source: Huang et al., "Vaccine", NeurIPS 2024, arXiv 2402.01109, section 3 (harmful ratio p), and the threat model of
Qi et al., arXiv 2310.03693.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from ..data import Pair
from ..errors import ConfigError
from ..recipes.ranges import Part
from .base import ATTACKS, Attack, AttackerRows


@ATTACKS.register("mixed")
@dataclass(kw_only=True)
class Mixed(Attack):
    """Plain fine-tuning on a mixture, a share `ratio` of it harmful (p in arXiv 2402.01109), shuffled.

    `examples` is the size of the whole mixture. Without it the mixture is the largest of that ratio which the data
    allow: every harmful pair, or every harmless row where those are too few.
    """

    covers: ClassVar[tuple[str, ...]] = ("mixed",)

    ratio: Part = 0.1
    """Share of harmful rows; for none of them there is the attack benign, for all of them sft."""

    def pairs(self, own: AttackerRows, rng: random.Random) -> list[Pair]:
        total = own.examples
        if total is None:
            total = max(1, int(min(len(own.harmful) / self.ratio, len(own.benign) / (1 - self.ratio)) + 1e-9))
        count = round(total * self.ratio)
        if not 0 < count < total:
            raise ConfigError(
                f"ratio {self.ratio} of {total} rows leaves {count} harmful and {total - count} harmless ones;"
                " allowed: at least one of each. Raise examples, or change ratio."
            )
        rows = [
            *own.some(own.harmful, count, rng, "harmful pairs"),
            *own.harmless(rng, total - count),
        ]
        rng.shuffle(rows)
        return rows
