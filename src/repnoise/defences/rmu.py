"""RMU: steer one layer's representations of harmful text to a random direction, keep those of harmless text.

Source: Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", ICML 2024,
arXiv 2403.03218.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import precise
from ..models import anatomy
from ..recipes.ranges import Positive, Weight, Whole
from ..training import window_of
from .base import DEFENCES, DefenceWithRetain, check_layers, fraction, frozen_copy, real_tokens, residual


@DEFENCES.register("rmu")
@dataclass(kw_only=True)
class Rmu(DefenceWithRetain):
    """loss = mean (h_l(harmful) - c u)^2 + alpha * mean (h_l(retain) - h_l^frozen(retain))^2

    (arXiv 2403.03218, section 4) over all tokens but padding. u is uniform on [0, 1)^d, normed to 1, drawn once from
    the seed. Only the blocks l - update + 1 ... l are trained; the others are frozen in place.
    """

    needs = ("harmful", "retain")

    steering: Positive = 6.5
    """c: norm of the target."""
    alpha: Weight = 1200.0
    """Weight of the retain side."""
    layer: int | None = None
    """l, counted from 0; null = block 7 of 32, scaled to the model's depth."""
    update: Whole = 3
    """How many blocks are trained, l the last of them; 0 = all weights."""
    seed: int = 0
    """Of the direction u."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._original: nn.Module | None = None

    def setup(self, model: nn.Module) -> None:
        blocks = anatomy(model).layers
        self._layer = fraction(len(blocks), 7 / 32) if self.layer is None else self.layer
        check_layers([self._layer], len(blocks), "layer")
        self._original = frozen_copy(model)
        if self.update:
            chosen = blocks[max(0, self._layer - self.update + 1) : self._layer + 1]
            kept = {id(each) for block in chosen for each in block.parameters()}
            for each in model.parameters():  # what is frozen already, the base under LoRA, stays so
                if id(each) not in kept:
                    each.requires_grad_(False)

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        assert self._original is not None, "setup() was not called"
        harmful, retain, layer = batch["harmful"], batch["retain"], [self._layer]
        size = window_of(batch).size
        steered = precise(real_tokens(harmful, residual(model, harmful, layer)[0]))
        direction = torch.rand(steered.shape[-1], generator=torch.Generator().manual_seed(self.seed)).to(steered)
        target = self.steering * direction / direction.norm()
        kept = precise(real_tokens(retain, residual(model, retain, layer)[0]))
        with torch.no_grad():
            before = precise(real_tokens(retain, residual(self._original, retain, layer)[0]))
        return {
            "unlearn": (steered - target).square().mean() / size,
            "keep": self.alpha * (kept - before).square().mean() / size,
            **self.retained(model, batch),
        }
