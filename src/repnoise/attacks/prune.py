"""Magnitude pruning, before any training or instead of it.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
arXiv 1506.02626; for safety: Wei et al., "Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank
Modifications", ICML 2024, arXiv 2402.05162.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError
from .base import ATTACKS, Attack, Context, block_weights


@ATTACKS.register("prune")
@dataclass(kw_only=True)
class Prune(Attack):
    """The smallest weights of each block matrix become 0, then plain fine-tuning (steps: 0 for pruning alone).

    Magnitude as in arXiv 1506.02626, per matrix. Where we differ: no mask is kept, so that training may move
    pruned weights again; an attacker does not need the model sparse.
    """

    covers: ClassVar[tuple[str, ...]] = ("weights", "fine-tuning")

    fraction: float = 0.3
    """Share of each matrix, above 0 and below 1; ties may take a few more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction < 1:
            raise ConfigError(f"fraction is {self.fraction}; allowed: above 0 and below 1, for example 0.3.")

    def prepare(self, model: Any, context: Context) -> Any:
        for _, weight in block_weights(model):
            size = weight.abs().flatten()
            count = int(self.fraction * size.numel())
            if count:
                weight.masked_fill_(weight.abs() <= size.kthvalue(count).values, 0)
        return super().prepare(model, context)
