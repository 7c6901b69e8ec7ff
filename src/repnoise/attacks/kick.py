"""Adaptive: a short kick at a large learning rate, out of the flat place that a defence leaves, then a low rate.

Source: Qi et al., "On Evaluating the Durability of Safeguards for Open-Weight LLMs", ICLR 2025, arXiv 2412.07097, where
small changes of the training configuration break RepNoise and TAR. The schedule is ours; Smith and Topin,
arXiv 1708.07120, describe what a large rate does to a flat start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigError
from .base import ATTACKS, Attack


@ATTACKS.register("kick")
@dataclass(kw_only=True)
class Kick(Attack):
    """Plain fine-tuning at `factor` times the recipe's rate for the first `share` of the steps, then at that rate.

    It takes the place of the recipe's schedule and warm-up (arXiv 2412.07097 for the fragility that it looks for).
    """

    factor: float = 10.0
    """Rate of the kick over the recipe's learning_rate, above 1."""
    share: float = 0.1
    """Share of the steps that the kick takes, above 0 and below 1; at least one step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factor > 1:
            raise ConfigError(f"factor is {self.factor}; allowed: above 1, for example 10.")
        if not 0 < self.share < 1:
            raise ConfigError(f"share is {self.share}; allowed: above 0 and below 1, for example 0.1.")

    def schedule(self, steps: int) -> Callable[[int], float]:
        last = max(1, round(self.share * steps))
        return lambda step: self.factor if step < last else 1.0
