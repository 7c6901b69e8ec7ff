"""Supervised fine-tuning on harmful answers (paper eq. 1), loss on the answer only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..losses import masked_cross_entropy
from ..training import forward, window_of
from .base import ATTACKS, Attack


@ATTACKS.register("sft")
@dataclass(kw_only=True)
class Sft(Attack):
    """loss = mean over harmful answer tokens of the cross-entropy.

    Where we differ from the authors' attack code: it also trains on the question and on every pad position; the
    durability study (arXiv 2412.07097) showed that this understates the attack.
    """

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        stream = batch["harmful"]
        tokens = window_of(batch).tokens.get("harmful")
        return {"sft": masked_cross_entropy(forward(model, stream), stream["labels"], denominator=tokens)}
