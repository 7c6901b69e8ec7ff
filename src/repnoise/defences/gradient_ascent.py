"""Gradient ascent on harmful answers: the simplest unlearning baseline (paper, table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..recipes.ranges import Positive
from ..training import answer_loss
from .base import DEFENCES, DefenceWithRetain


@DEFENCES.register("gradient-ascent")
@dataclass(kw_only=True)
class GradientAscent(DefenceWithRetain):
    """loss = -CE(harmful) (paper, section 4, baselines).

    Where we differ: the authors' code takes the cross-entropy over the question and the pads too; here over the
    answer. It has no bound, so that the model is soon of no use: `cap` and `retain_weight` are ours, off by default.
    """

    needs = ("harmful",)

    cap: Positive | None = None
    """Nats per token above which there is nothing more to gain; null = none."""

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        loss = answer_loss(model, batch, "harmful")
        return {"ascent": -(loss if self.cap is None else loss.clamp_max(self.cap)), **self.retained(model, batch)}
