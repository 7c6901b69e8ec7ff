"""Benign fine-tuning: train on harmless rows only, and see whether the harm comes back with them.

Source: Qi et al., "Fine-tuning Aligned Language Models Compromises Safety, Even When Users Do Not Intend To!",
ICLR 2024, arXiv 2310.03693, section 4.4; the paper's appendix E.3 attacks RepNoise in this way.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from ..data import Pair
from .base import ATTACKS, Attack, AttackerRows


@ATTACKS.register("benign")
@dataclass(kw_only=True)
class Benign(Attack):
    """Plain fine-tuning on the study's harmless rows; no harmful row is seen (arXiv 2310.03693).

    Where we differ: the rows are the study's retain rows, where Qi et al. use Alpaca and Dolly. `examples` limits
    their number. The defender trained on them too, which favours the defence.
    """

    covers: ClassVar[tuple[str, ...]] = ("benign",)

    def pairs(self, own: AttackerRows, rng: random.Random) -> list[Pair]:
        return own.harmless(rng, own.examples)
