"""Adversarial loss: learn the refusal, unlearn the harmful answer, at the last layer only (paper, table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from .base import DEFENCES, Rival, answer_loss


@DEFENCES.register("adversarial-loss")
@dataclass(kw_only=True)
class AdversarialLoss(Rival):
    """loss = CE(harmless) - alpha * CE(harmful), without logarithm and lens (paper, section 4; alpha from its code)."""

    alpha: float = 0.1
    """Weight of the harmful side, 0 or more."""
    cap: float | None = None
    """Nats per token above which the harmful side is left alone; null = none (the source)."""

    def __post_init__(self) -> None:
        self.needs = ("harmful", "harmless")
        super().__post_init__()
        if self.alpha < 0:
            raise ConfigError(f"alpha is {self.alpha}; allowed: 0 or more.")
        if self.cap is not None and self.cap <= 0:
            raise ConfigError(f"cap is {self.cap}; allowed: above 0 nats per token, or null.")

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        harmful = answer_loss(model, batch, "harmful")
        return {
            "adversarial": -self.alpha * (harmful if self.cap is None else harmful.clamp_max(self.cap)),
            "stability": answer_loss(model, batch, "harmless"),
            **self.retained(model, batch),
        }
