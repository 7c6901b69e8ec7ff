"""Booster: make one harmful step worth less, by a regulariser on what it gains.

Source: Huang et al., "Booster: Tackling Harmful Fine-tuning for LLMs via Attenuating Harmful Perturbation", ICLR 2025,
arXiv 2409.01586.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import masked_cross_entropy
from ..models import unwrap
from ..recipes.ranges import Positive, Weight
from ..training import answer_loss, window_of
from .base import DEFENCES, DefenceWithRetain, gradients, with_gradient


@DEFENCES.register("booster")
@dataclass(kw_only=True)
class Booster(DefenceWithRetain):
    """loss = f(w) + weight * (h(w) - h(w - step * grad h(w) / |grad h(w)|)), f = CE(refusal), h = CE(harmful)

    (arXiv 2409.01586, eq. 1). As in its algorithm 1 the Hessian is left out: the gradient of the last part is that of h
    at the shifted weights. Where we differ: each micro-batch takes its own step when gradients are accumulated.
    """

    needs = ("harmful", "harmless")
    handles_weights = True

    weight: Weight = 5.0
    """lambda of the source."""
    step: Positive = 0.1
    """alpha of the source: length of the simulated harmful step."""

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        harmful = answer_loss(model, batch, "harmful")
        weights = {name: each for name, each in unwrap(model).named_parameters() if each.requires_grad}
        here = gradients(harmful, weights)
        norm = torch.stack([g.float().square().sum() for g in here.values() if g is not None]).sum().sqrt()
        shifted = {}
        for name, weight in weights.items():
            gradient = here.get(name)
            moved = weight.detach()
            if gradient is not None:
                moved = moved - self.step * gradient / norm.clamp_min(1e-12).to(gradient)
            shifted[name] = moved.requires_grad_()
        after = self._harmful_at(model, shifted, batch)
        there = gradients(after, shifted)
        difference = {
            name: None if (g := there.get(name)) is None or (h := here.get(name)) is None else self.weight * (h - g)
            for name in weights
        }
        return {
            "stability": answer_loss(model, batch, "harmless"),
            "attenuation": with_gradient(model, self.weight * (harmful - after), difference),
            **self.retained(model, batch),
        }

    @staticmethod
    def _harmful_at(model: nn.Module, weights: dict[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        stream = batch["harmful"]
        inputs = {"input_ids": stream["input_ids"], "attention_mask": stream["attention_mask"], "use_cache": False}
        logits = torch.func.functional_call(unwrap(model), weights, (), inputs).logits
        return masked_cross_entropy(logits, stream["labels"], denominator=window_of(batch).tokens.get("harmful"))
