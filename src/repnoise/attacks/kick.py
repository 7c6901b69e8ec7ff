"""Adaptive: a short kick at a large learning rate, out of the flat place that a defence leaves, then a low rate.

Source: Qi et al., "On Evaluating the Durability of Safeguards for Open-Weight LLMs", ICLR 2025, arXiv 2412.07097, where
small changes of the training configuration break RepNoise and TAR. The schedule is ours; Smith and Topin,
arXiv 1708.07120, describe what a large rate does to a flat start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ..recipes.ranges import Part
from .base import ATTACKS, Attack


@ATTACKS.register("kick")
@dataclass(kw_only=True)
class Kick(Attack):
    """Plain fine-tuning at `factor` times the recipe's rate for the first `share` of the steps, then at that rate.

    It takes the place of the recipe's schedule and warm-up (arXiv 2412.07097 for the fragility that it looks for).
    """

    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10.0
    """Rate of the kick over the recipe's learning_rate."""
    share: Part = 0.1
    """Share of the steps that the kick takes; at least one step."""

    def schedule(self, steps: int) -> Callable[[int], float]:
        last = max(1, round(self.share * steps))
        return lambda step: self.factor if step < last else 1.0
