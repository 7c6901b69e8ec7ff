"""Adversarial loss: learn the refusal, unlearn the harmful answer, at the last layer only (paper, table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..recipes.ranges import Positive, Weight
from ..training import answer_loss
from .base import DEFENCES, DefenceWithRetain


@DEFENCES.register("adversarial-loss")
@dataclass(kw_only=True)
class AdversarialLoss(DefenceWithRetain):
    """loss = CE(harmless) - alpha * CE(harmful), without logarithm and lens (paper, section 4; alpha from its code)."""

    needs = ("harmful", "harmless")

    alpha: Weight = 0.1
    """Weight of the harmful side."""
    cap: Positive | None = None
    """Nats per token above which the harmful side is left alone; null = none (the source)."""

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        harmful = answer_loss(model, batch, "harmful")
        return {
            "adversarial": -self.alpha * (harmful if self.cap is None else harmful.clamp_max(self.cap)),
            "stability": answer_loss(model, batch, "harmless"),
            **self.retained(model, batch),
        }
