"""Supervised fine-tuning on harmful answers (paper eq. 1), loss on the answer, the text, or all positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data import pad_id
from ..losses import IGNORE_INDEX, masked_cross_entropy
from ..training import Stream, forward, trained_tokens, window_of
from .base import ATTACKS, Attack, Context


@ATTACKS.register("sft")
@dataclass(kw_only=True)
class Sft(Attack):
    """loss = mean over the trained tokens of the cross-entropy; by default those of the harmful answer.

    Where we differ from the authors' attack code: it trains on the question and on every pad position as well
    (`loss_on: all` does so too); the durability study (arXiv 2412.07097) showed that this understates the attack.
    """

    loss_on: Literal["answer", "text", "all"] = "answer"
    """Trained: the answer; question and answer; or these and every pad up to max_length (the authors' code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._length: int | None = None
        self._pad = 0

    def prepare(self, model: Any, context: Context) -> Any:
        self._length = context.max_length
        self._pad = pad_id(context.tokenizer)
        return super().prepare(model, context)

    def begin_step(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self.loss_on == "answer":
            return {}
        return {"trained": sum(trained_tokens(self._stream(batch["harmful"])) for batch in batches)}

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.loss_on == "answer":
            return super().terms(model, batch)
        stream = self._stream(batch["harmful"])
        tokens = window_of(batch).shared.get("trained")
        return {"sft": masked_cross_entropy(forward(model, stream), stream["labels"], denominator=tokens)}

    def _stream(self, stream: Stream) -> Stream:
        """The stream with the labels that are trained; for "all" padded on the right to max_length.

        Without `prepare` (outside a study) "all" ends at the longest row of the batch.
        """
        ids, mask = stream["input_ids"], stream["attention_mask"]
        if self.loss_on == "text":
            return {**stream, "labels": ids.masked_fill(mask == 0, IGNORE_INDEX)}
        missing = max(0, (self._length or 0) - ids.shape[1])
        ids = torch.cat([ids, ids.new_full((len(ids), missing), self._pad)], dim=1)
        mask = torch.cat([mask, mask.new_zeros((len(mask), missing))], dim=1)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
