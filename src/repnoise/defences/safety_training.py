"""Additional safety training: more refusals of the kind that alignment gave it (paper, table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..training import answer_loss
from .base import DEFENCES, DefenceWithRetain


@DEFENCES.register("safety-training")
@dataclass(kw_only=True)
class SafetyTraining(DefenceWithRetain):
    """loss = CE(refusal), for the same prompts as every other defence (paper, section 4, baselines)."""

    needs = ("harmless",)

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"refusal": answer_loss(model, batch, "harmless"), **self.retained(model, batch)}
