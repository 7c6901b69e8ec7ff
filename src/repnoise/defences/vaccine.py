"""Vaccine: alignment that stands embeddings shifted in the worst direction.

Source: Huang et al., "Vaccine: Perturbation-aware Alignment for Large Language Models", NeurIPS 2024, arXiv 2402.01109.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import anatomy, capture
from ..recipes.ranges import Weight
from ..training import answer_loss
from .base import DEFENCES, DefenceWithRetain


@DEFENCES.register("vaccine")
@dataclass(kw_only=True)
class Vaccine(DefenceWithRetain):
    """loss = CE(refusal) with e_l + eps_l, eps_l = rho * grad_{e_l} CE / |grad_{e_1..e_L} CE|.

    (arXiv 2402.01109, eqs. 1-4)

    Two passes a step: the first finds eps, its gradients reach no weight; the second is trained.
    Where we differ: e_l is the output of block l, in the source's code that of its attention; the norm is over the
    micro-batch. The RepNoise authors ran Vaccine while training on harmful data; here it runs, as in its source, in
    alignment, since nobody runs a defence inside the attacker's training.
    """

    needs = ("harmless",)
    handles_weights = True

    rho: Weight = 2.0
    """Norm of the shift over all layers (the source's default; the paper tried 1 and 10)."""

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        with capture(model, mlp=False) as seen:
            loss = answer_loss(model, batch, "harmless")
        found = torch.autograd.grad(loss, seen.residual[1:])
        norm = torch.stack([gradient.float().square().sum() for gradient in found]).sum().sqrt().clamp_min(1e-12)
        with shifted(model, [self.rho * gradient / norm.to(gradient) for gradient in found]):
            perturbed = answer_loss(model, batch, "harmless")
        return {"refusal": perturbed, **self.retained(model, batch)}


@contextmanager
def shifted(model: nn.Module, shifts: Sequence[Tensor]) -> Iterator[None]:
    """Add shifts[l] (B, T, d) to the output of block l in every pass inside; no hook is left behind."""

    def adding(shift: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

        return hook

    handles = []
    try:
        for block, shift in zip(anatomy(model).layers, shifts, strict=True):
            handles.append(block.register_forward_hook(adding(shift)))
        yield
    finally:
        for handle in handles:
            handle.remove()
