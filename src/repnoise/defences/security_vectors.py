"""Security vectors: an adapter that knows the harm already, active while others train: nothing is left to learn.

Source: Zhou et al., "Making Harmful Behaviors Unlearnable for Large Language Models", Findings of ACL 2024, arXiv
2311.02105, section 3; settings of the RepNoise paper's baseline (arXiv 2405.14577, tables 1 and 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..training import Objective
from .base import DEFENCES, answer_loss


@DEFENCES.register("security-vectors")
@dataclass(kw_only=True)
class SecurityVectors(Objective):
    """loss = CE(harmful answer) over the weights of a LoRA adapter; the model's own weights stay as they are.

    (arXiv 2311.02105, eq. 2)

    The released folder holds the untouched weights and, under `security_vector/`, the adapter. Every attack of the
    study keeps it active and frozen while it trains and drops it afterwards, as a host does who fine-tunes for others.
    Whoever holds the weights need not: without the folder this is the undefended model, head start 1 in every cell.
    Where we differ: the source alternates the adapter with simulated attacks (min-min); the RepNoise authors train it
    once, and so do we.
    """

    rank: int = 8
    """Rank of the adapter."""
    scale: int = 32
    """LoRA's alpha: the adapter counts scale / rank."""
    dropout: float = 0.1
    """Dropout of the adapter while it is trained itself."""

    def __post_init__(self) -> None:
        self.needs = ("harmful",)
        if self.rank < 1 or self.scale < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"rank is {self.rank}, scale {self.scale}, dropout {self.dropout};"
                " allowed: 1 or more, 1 or more, 0 up to (not including) 1."
            )
        self.vector = {"rank": self.rank, "alpha": self.scale, "dropout": self.dropout}

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"harmful": answer_loss(model, batch, "harmful")}
