"""Security vectors: an adapter that knows the harm already, active while others train: nothing is left to learn.

Source: Zhou et al., "Making Harmful Behaviors Unlearnable for Large Language Models", Findings of ACL 2024, arXiv
2311.02105, section 3; settings of the RepNoise paper's baseline (arXiv 2405.14577, tables 1 and 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from ..recipes.ranges import Count
from ..training import Objective, answer_loss
from .base import DEFENCES


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

    needs = ("harmful",)

    rank: Count = 8
    """Rank of the adapter."""
    scale: Count = 32
    """LoRA's alpha: the adapter counts scale / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout of the adapter while it is trained itself."""

    @property
    def vector(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.scale, "dropout": self.dropout}

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"harmful": answer_loss(model, batch, "harmful")}
