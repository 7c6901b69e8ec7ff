"""Magnitude pruning, before any training or instead of it.

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
arXiv 1506.02626; for safety: Wei et al., "Assessing the Brittleness of Safety Alignment via Pruning and Low-Rank
Modifications", ICML 2024, arXiv 2402.05162.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..recipes.ranges import Part
from .base import ATTACKS, Attack, Context, block_weights


@ATTACKS.register("prune")
@dataclass(kw_only=True)
class Prune(Attack):
    """The smallest weights of each block matrix become 0, then plain fine-tuning (steps: 0 for pruning alone).

    Magnitude as in arXiv 1506.02626, per matrix. Where we differ: no mask is kept, so that training may move
    pruned weights again; an attacker does not need the model sparse.
    """

    covers: ClassVar[tuple[str, ...]] = ("weights", "fine-tuning")

    fraction: Part = 0.3
    """Share of each matrix; ties may take a few more."""

    def prepare(self, model: Any, context: Context) -> Any:
        for _, weight in block_weights(model):
            size = weight.abs().flatten()
            count = int(self.fraction * size.numel())
            if count:
                weight.masked_fill_(weight.abs() <= size.kthvalue(count).values, 0)
        return super().prepare(model, context)
