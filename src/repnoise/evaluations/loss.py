"""Loss of held-out harmful and harmless answers, and refusals by rule: for any model with pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import Row, get_template, side
from ..data.parties import StudyData
from ..intervals import ratio_bootstrap
from ..judges import is_degenerate, is_refusal
from ..recipes.ranges import Count
from .asking import ask
from .base import EVALUATIONS, Evaluation, Measured
from .generation import Decoding, answer_losses


@EVALUATIONS.register("loss")
@dataclass(kw_only=True)
class Loss(Evaluation):
    """`<harm>_loss`, `harmless_loss`: nats per answer token over all held-out rows, intervals by bootstrap over
    rows; `*_perplexity` their exponentials; `refusal_rate` and `degenerate_rate` on held-out harmful prompts.

    Attributes:
        decoding: how the answers are generated that are searched for refusals.
        limit: the first so many prompts are asked; losses are over all rows.
    """

    decoding: Decoding = field(default_factory=lambda: Decoding(max_new_tokens=25))
    limit: Count = 32

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        first, *others = list(data.attacks) if harm is None else [harm]
        found = self.along(model, tokenizer, data, seed=seed, harm=first)
        for other in others:
            self._loss(found, other, side(data.test_of(other), "harmful"), model, tokenizer, data, seed)
        prompts = [pair.prompt for pair in data.test_of(first)[: self.limit]]
        asked = ask(model, tokenizer, prompts, self._template(data, tokenizer), self.decoding, seed=seed)
        keys: dict[str, Any] = {"seed": seed, "decoding": str(self.decoding)}
        found.add_rate("refusal_rate", [is_refusal(each.answer) for each in asked], **keys)
        found.add_rate("degenerate_rate", [is_degenerate(each.answer) for each in asked], **keys)
        found.samples += [{"prompt": each.prompt, "answer": each.answer} for each in asked]
        return found

    def along(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str
    ) -> Measured:
        found = Measured()
        self._loss(found, harm, side(data.test_of(harm), "harmful"), model, tokenizer, data, seed)
        self._loss(found, "harmless", data.harmless_test, model, tokenizer, data, seed)
        return found

    @staticmethod
    def _template(data: StudyData, tokenizer: PreTrainedTokenizerBase) -> Any:
        return get_template(data.template).resolve(tokenizer)

    def _loss(
        self,
        found: Measured,
        name: str,
        rows: list[Row],
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        data: StudyData,
        seed: int,
    ) -> None:
        losses = answer_losses(
            model, tokenizer, rows, self._template(data, tokenizer), max_length=data.max_length, batch_size=16
        )
        interval = ratio_bootstrap([loss for loss, _ in losses], [count for _, count in losses])
        each = [round(loss / max(count, 1), 6) for loss, count in losses]
        row = {"n": interval.n, "seed": seed, "split": "test"}
        bounds = {"value": interval.value, "lo": interval.lo, "hi": interval.hi}
        found.rows.append({"metric": f"{name}_loss", **bounds, **row, "items": each})
        limits = [None if x is None else math.exp(min(x, 50.0)) for x in (interval.value, interval.lo, interval.hi)]
        found.rows.append({"metric": f"{name}_perplexity", "value": limits[0], "lo": limits[1], "hi": limits[2], **row})
