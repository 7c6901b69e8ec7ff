"""Weight interpolation: attack the mean of the defended model and the public checkpoint it was made from.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), CVPR 2022, arXiv 2109.01903, eq. 1, turned
against a defence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..recipes.ranges import Share
from .base import ATTACKS, Attack, Context, alike


@ATTACKS.register("interpolate")
@dataclass(kw_only=True)
class Interpolate(Attack):
    """w = (1 - t) * attacked + t * public, then plain fine-tuning (arXiv 2109.01903, eq. 1).

    Every model is treated alike: the random and the ignorant control get the same share of the public weights, so that
    the floor says what these weights give by themselves.
    """

    covers: ClassVar[tuple[str, ...]] = ("weights", "fine-tuning")

    t: Share = 0.5
    """Share of the public weights: 0 is the attacked model, 1 the public one."""
    public: str | None = None
    """The public checkpoint: folder or hub id of the same architecture; null = the model that the study defends."""

    def prepare(self, model: Any, context: Context) -> Any:
        with torch.no_grad():
            for _, parameter, public in alike(model, context.public(self.public)):
                parameter.lerp_(public, self.t)
        return super().prepare(model, context)
