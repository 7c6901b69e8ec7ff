"""Gaussian noise on the weights, before any training or instead of it.

Source: Clymer et al., "Poser: Unmasking Alignment Faking LLMs by Manipulating Their Internals", arXiv 2405.05466, and
Tice et al., "Noise Injection Reveals Hidden Capabilities of Sandbagging Language Models", arXiv 2412.01784.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..recipes.ranges import Positive
from .base import ATTACKS, Attack, Context, block_weights


@ATTACKS.register("noise")
@dataclass(kw_only=True)
class Noise(Attack):
    """w + scale * std(w) * N(0, 1) in every block matrix, then plain fine-tuning (arXiv 2412.01784).

    Where we differ: the noise is relative to each matrix, since a defence may have changed their sizes.
    """

    covers: ClassVar[tuple[str, ...]] = ("weights", "fine-tuning")

    scale: Positive = 0.1
    """Standard deviation of the noise over that of the matrix."""

    def prepare(self, model: Any, context: Context) -> Any:
        generator = context.generator()
        for _, weight in block_weights(model):
            drawn = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(drawn * (self.scale * weight.float().std().to(weight)))
        return super().prepare(model, context)
