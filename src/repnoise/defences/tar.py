"""TAR: attack a copy inside the loop, and train the weights so that the attacked copy stays ignorant.

Source: Tamirisa et al., "Tamper-Resistant Safeguards for Open-Weight LLMs", ICLR 2025, arXiv 2408.00761.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import answer_tokens, masked_cross_entropy, precise
from ..models import anatomy, unwrap
from ..recipes.ranges import Count, Positive, Weight
from ..training import Stream, answer_loss, forward, window_of
from .base import DEFENCES, DefenceWithRetain, frozen_copy, gradients, real_tokens, residual, with_gradient


@DEFENCES.register("tar")
@dataclass(kw_only=True)
class Tar(DefenceWithRetain):
    """loss = tamper_weight * mean_k L_TR(attack_k(w)) + L_retain(w), L_TR = -entropy of harmful answers

    (arXiv 2408.00761, eq. 1 and algorithm 1). The gradient of L_TR at the attacked weights is applied to w as it is
    (first order, as in the source). L_retain = CE(retain) + representation_weight * |h - h_0|^2 at the last block.
    Where we differ: the simulated attack is one kind, AdamW on the first half of the harmful batch, and L_TR is taken
    on the second half, where the source draws from several attacks and data splits; the mean is over inner steps. The
    refusals of the pairs are trained too (weight `refusal_weight`), so that the model still refuses.
    """

    needs = ("harmful", "harmless", "retain")
    handles_weights = True

    tamper_weight: Weight = 4.0
    """lambda_TR of the source (4.0 in its released configuration)."""
    inner_steps: Count = 4
    """Steps of the simulated attack at every step; the source takes 64."""
    inner_learning_rate: Positive = 1e-3
    """Learning rate of the simulated attack."""
    representation_weight: Weight = 1.0
    """Weight of the squared distance to the original representations of retain rows, a mean over values."""
    refusal_weight: Weight = 1.0
    retain_weight: Weight = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._original: nn.Module | None = None

    def setup(self, model: nn.Module) -> None:
        self._original = frozen_copy(model)

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        size = window_of(batch).size
        value, found = self._tampered(model, batch["harmful"])
        scaled = {name: None if g is None else self.tamper_weight / size * g for name, g in found.items()}
        terms = {
            "tamper": with_gradient(model, self.tamper_weight / size * value, scaled),
            "refusal": self.refusal_weight * answer_loss(model, batch, "harmless"),
            **self.retained(model, batch),
        }
        if self.representation_weight:
            assert self._original is not None, "setup() was not called"
            stream, last = batch["retain"], [len(anatomy(model).layers) - 1]
            with torch.no_grad():
                before = real_tokens(stream, residual(self._original, stream, last)[0])
            now = real_tokens(stream, residual(model, stream, last)[0])
            distance = (precise(now) - precise(before)).square().mean()
            terms["representation"] = self.representation_weight * distance / size
        return terms

    def _tampered(self, model: nn.Module, stream: Stream) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Mean L_TR along a simulated attack, and its gradient at the attacked weights."""
        half = max(1, len(stream["input_ids"]) // 2)
        train: Stream = {key: value[:half] for key, value in stream.items()}
        test: Stream = {key: value[-half:] for key, value in stream.items()}
        attacked = copy.deepcopy(unwrap(model))
        attacked.zero_grad(set_to_none=True)
        optimizer = torch.optim.AdamW(attacked.parameters(), lr=self.inner_learning_rate, weight_decay=0.0)
        total, summed = torch.zeros((), device=train["input_ids"].device), dict[str, Tensor | None]()
        with torch.enable_grad():
            for _ in range(self.inner_steps):
                optimizer.zero_grad(set_to_none=True)
                masked_cross_entropy(forward(attacked, train), train["labels"]).backward()
                optimizer.step()
                loss = -answer_entropy(attacked, test)
                for name, gradient in gradients(loss, dict(attacked.named_parameters())).items():
                    if gradient is not None:
                        known = summed.get(name)
                        part = gradient / self.inner_steps
                        summed[name] = part if known is None else known + part
                total = total + loss.detach() / self.inner_steps
        return total, summed


def answer_entropy(model: nn.Module, stream: Stream) -> Tensor:
    """() mean entropy in nats of the predictions of answer tokens."""
    chosen = answer_tokens(stream["labels"]).select(forward(model, stream))
    logs = precise(chosen).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()
