"""Circuit breakers by representation rerouting: turn harmful representations away from what they were.

Source: Zou et al., "Improving Alignment and Robustness with Circuit Breakers", NeurIPS 2024, arXiv 2406.04313.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import IGNORE_INDEX, precise
from ..models import anatomy
from ..recipes.ranges import Count, Positive
from ..training import window_of
from .base import DEFENCES, DefenceWithRetain, check_layers, fraction, frozen_copy, real_tokens, residual


@DEFENCES.register("circuit-breakers")
@dataclass(kw_only=True)
class CircuitBreakers(DefenceWithRetain):
    """loss = c_s * mean relu(cos(h, h_0)) on harmful answers + c_r * mean |h - h_0| on retain rows,

    c_s = alpha (1 - t / 2T), c_r = alpha t / 2T (arXiv 2406.04313, algorithm 1); h_0 = the original model's.
    Where we differ: all weights are trained, the source trains LoRA adapters; T is `schedule_steps` and both
    coefficients stay as they are after it.
    """

    needs = ("harmful", "retain")

    alpha: Positive = 10.0
    layers: list[int] | None = None
    """Blocks that are rerouted, counted from 0; null = blocks 10 and 20 of 32, scaled to the model's depth."""
    schedule_steps: Count = 150
    """T: give it the number of training steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._original: nn.Module | None = None

    def setup(self, model: nn.Module) -> None:
        count = len(anatomy(model).layers)
        default = sorted({fraction(count, 10 / 32), fraction(count, 20 / 32)})
        self._layers = default if self.layers is None else self.layers
        check_layers(self._layers, count, "layers")
        self._original = frozen_copy(model)

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        assert self._original is not None, "setup() was not called"
        window, harmful, retain = window_of(batch), batch["harmful"], batch["retain"]
        with torch.no_grad():
            harmful_before = residual(self._original, harmful, self._layers)
            retain_before = residual(self._original, retain, self._layers)
        harmful_now, retain_now = residual(model, harmful, self._layers), residual(model, retain, self._layers)
        answer = (harmful["labels"] != IGNORE_INDEX).to(harmful_now[0].device)
        cosines = [
            torch.cosine_similarity(precise(now[answer]), precise(before[answer]), dim=-1).relu().mean()
            for now, before in zip(harmful_now, harmful_before, strict=True)
        ]
        distances = [
            (precise(real_tokens(retain, now)) - precise(real_tokens(retain, before)) + 1e-12).norm(dim=-1).mean()
            for now, before in zip(retain_now, retain_before, strict=True)
        ]
        progress = min(1.0, window.step / self.schedule_steps) / 2
        return {
            "reroute": self.alpha * (1 - progress) * torch.stack(cosines).mean() / window.size,
            "keep": self.alpha * progress * torch.stack(distances).mean() / window.size,
            **self.retained(model, batch),
        }
