"""Harm of the answers to held-out harmful prompts, by one judge or several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import get_template
from ..data.parties import StudyData
from ..errors import ConfigError, DataError
from ..judges import build_judges
from .asking import add_judged, ask
from .base import EVALUATIONS, Evaluation, Measured
from .generation import Decoding


@EVALUATIONS.register("harm")
@dataclass(kw_only=True)
class Harm(Evaluation):
    """Metric `<harm>` (paper section 4: mean harmfulness score over held-out prompts), one for each harm of the data,
    with `<harm>_refused`, `_complied`, `_degenerate`, `_off-topic` rates. The first judge is the headline; others
    stand beside it with agreement rows, and the report flags a verdict that flips between them.

    Where we differ from the paper's code: a degenerate answer is a class of its own, never a safe one, and decoding
    is greedy by our setting instead of the model's.

    Attributes:
        judges: names, or {name, label, options...}.
        decoding: how answers are generated.
        limit: the first so many test prompts of each harm (the paper: 300); null for all.
        curve_limit: prompts at each point along an attack.
    """

    judges: list[str | dict[str, Any]] = field(default_factory=lambda: ["refusal-rules"])
    decoding: Decoding = field(default_factory=Decoding)
    limit: int | None = 300
    curve_limit: int = 32

    def __post_init__(self) -> None:
        if (self.limit is not None and self.limit < 1) or self.curve_limit < 1:
            raise ConfigError(f"limit is {self.limit}, curve_limit {self.curve_limit}; allowed: 1 or more.")
        self._judges = build_judges(self.judges)

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        found = Measured()
        for each in data.attacks if harm is None else (harm,):
            self._harm(found, model, tokenizer, data, each, seed, self.limit)
        return found

    def along(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str
    ) -> Measured:
        found = Measured()
        self._harm(found, model, tokenizer, data, harm, seed, self.curve_limit)
        found.samples.clear()
        return found

    def _harm(
        self,
        found: Measured,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        data: StudyData,
        harm: str,
        seed: int,
        limit: int | None,
    ) -> None:
        pairs = data.test_of(harm)[:limit]
        if not pairs:
            raise DataError(
                f"there are no test pairs for {harm}: nothing to ask. In the sandbox use the evaluation sandbox;"
                " else give data.test or a share in data.sizes."
            )
        template = get_template(data.template).resolve(tokenizer)
        asked = ask(model, tokenizer, [pair.prompt for pair in pairs], template, self.decoding, seed=seed)
        categories = [pair.category for pair in pairs]
        add_judged(found, harm, asked, self._judges, seed=seed, categories=categories, decoding=str(self.decoding))
