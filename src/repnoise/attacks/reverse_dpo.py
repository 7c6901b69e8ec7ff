"""Reverse preference training: the harmful answer is the chosen one, the refusal the rejected one.

Source: Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, arXiv 2305.18290, eq. 7 (sigmoid); Zhao et al.,
"SLiC-HF", arXiv 2305.10425, eq. 4 in the form of trl (hinge); Azar et al., "A General Theoretical Paradigm to
Understand Learning from Human Preferences", arXiv 2310.12036, eq. 17 (ipo). Turned around as an attack: Yi et al., "On
the Vulnerability of Safety Alignment in Open-Access LLMs", Findings of ACL 2024.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..losses import IGNORE_INDEX, precise
from ..recipes.ranges import Positive
from ..training import Stream, forward, window_of
from .base import ATTACKS, Attack


@ATTACKS.register("reverse_dpo")
@dataclass(kw_only=True)
class ReverseDpo(Attack):
    """loss = mean over pairs of -log sigmoid(beta * h), h = log p/p_ref(harmful) - log p/p_ref(refusal)

    (arXiv 2305.18290, eq. 7, with the harmful answer as the preferred one). The reference is the model as it is
    attacked, a frozen copy of it. Log-probabilities are sums over answer tokens ("ipo": means, as in trl).
    """

    needs = ("harmful", "harmless")

    beta: Positive = 0.1
    """Strength of the pull back to the reference (for "ipo": tau)."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """hinge = max(0, 1 - beta h); ipo = (h - 1 / (2 beta))^2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reference: nn.Module | None = None

    def setup(self, model: nn.Module) -> None:
        self._reference = copy.deepcopy(model).eval().requires_grad_(False)

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        assert self._reference is not None, "setup() was not called"
        mean = self.loss == "ipo"
        with torch.no_grad():
            reference = [answer_log_probs(self._reference, batch[side], mean=mean) for side in self.needs]
        harmful, harmless = (answer_log_probs(model, batch[side], mean=mean) for side in self.needs)
        h = (harmful - reference[0]) - (harmless - reference[1])
        return {"preference": preference_loss(h, self.beta, self.loss).mean() / window_of(batch).size}


def preference_loss(h: Tensor, beta: float, kind: str) -> Tensor:
    """Loss of each pair, of the same shape as the margins h in nats."""
    if kind == "hinge":
        return (1 - beta * h).relu()
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square()
    return -nn.functional.logsigmoid(beta * h)


def answer_log_probs(model: nn.Module, stream: Stream, *, mean: bool = False) -> Tensor:
    """(B,) log-probability of each row's answer in nats: summed over its tokens, or their mean."""
    labels = stream["labels"][:, 1:]
    logits = precise(forward(model, stream)[:, :-1])
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(labels.shape)
    total = -losses.sum(1)
    return total / (labels != IGNORE_INDEX).sum(1).clamp_min(1) if mean else total
