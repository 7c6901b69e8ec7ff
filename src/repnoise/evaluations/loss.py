"""Loss of held-out harmful and harmless answers, refusals by rule, greedy samples: for any model."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import Row, get_template, side
from ..data.study import StudyData
from ..intervals import ratio_bootstrap
from ..judges import label_answer
from .base import EVALUATIONS, Evaluation, Measured
from .generation import answer_losses, generate

MAX_NEW_TOKENS = 25
SAMPLES = 32


@EVALUATIONS.register("loss")
class Loss(Evaluation):
    """`harmful_loss`, `harmless_loss`: nats per answer token over all held-out rows, intervals by bootstrap over
    rows; `*_perplexity` their exponentials; `refusal_rate` and `degenerate_rate` on held-out harmful prompts.
    """

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        found = self.along(model, tokenizer, data, seed=seed, harm=harm or "harmful")
        prompts = [pair.prompt for pair in data.test[:SAMPLES]]
        texts = generate(
            model, tokenizer, prompts, self._template(data, tokenizer), max_new_tokens=MAX_NEW_TOKENS, batch_size=16
        )
        labels = [label_answer(text) for text in texts]
        found.add("refusal_rate", [each == "refuses" for each in labels], seed=seed)
        found.add("degenerate_rate", [each == "degenerate" for each in labels], seed=seed)
        found.samples += [
            {"prompt": prompt, "answer": text, "label": each}
            for prompt, text, each in zip(prompts, texts, labels, strict=True)
        ]
        return found

    def along(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str
    ) -> Measured:
        found = Measured()
        self._loss(found, "harmful", side(data.test, "harmful"), model, tokenizer, data, seed)
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
        row = {"n": interval.n, "seed": seed, "split": "test"}
        found.rows.append(
            {"metric": f"{name}_loss", "value": interval.value, "lo": interval.lo, "hi": interval.hi, **row}
        )
        limits = [None if x is None else math.exp(min(x, 50.0)) for x in (interval.value, interval.lo, interval.hi)]
        found.rows.append({"metric": f"{name}_perplexity", "value": limits[0], "lo": limits[1], "hi": limits[2], **row})
