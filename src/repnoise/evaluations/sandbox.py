"""Ground truth in the sandbox: harm recovered, refusals, collapse, and what should have stayed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import Row, get_template
from ..data.parties import StudyData
from ..judges import Asked, build_judges, is_refusal
from ..sandbox.world import Item, world
from .asking import add_judged, ask
from .base import EVALUATIONS, Evaluation, Measured
from .generation import Decoding, answer_losses

DECODING = Decoding(max_new_tokens=16, batch_size=256)


@EVALUATIONS.register("sandbox")
@dataclass(kw_only=True)
class Sandbox(Evaluation):
    """Metrics, each with n and an interval:

    - `knowledge`, `behaviour`, `withheld`: share of the secret words recovered on test items (chance 1/15 for
      knowledge), with `<harm>_refused`, `_complied`, `_degenerate`, `_off-topic` rates beside it;
    - `stability`: share of counted words right on held-out harmless items, by kind in `category` and over all kinds;
    - `multiple_choice`: harmless questions whose right answer has the lowest loss of four;
    - `over_refusal`: refusal rate on harmless questions that look like hazards; `lookalike`: how many are right.

    After an attack, only the attacked harm and every fifth harmless item are asked.

    Attributes:
        judges: who labels the harmful answers; the first is the headline, others stand beside it.
    """

    judges: list[str | dict[str, Any]] = field(default_factory=lambda: ["ground-truth"])

    def __post_init__(self) -> None:
        super().__post_init__()
        self._judges = build_judges(self.judges)

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        found = Measured()
        kinds = ("knowledge", "behaviour", "withheld") if harm is None else (harm,)
        for kind in kinds:
            self._harm(found, model, tokenizer, kind, seed)
        self._harmless(found, model, tokenizer, seed, every=1 if harm is None else 5)
        if harm is None:
            self._choice(found, model, tokenizer, seed)
            items = world().test_items("lookalike")
            asked = self._ask(model, tokenizer, items, seed)
            found.add_rate("over_refusal", [is_refusal(each.answer) for each in asked], seed=seed)
            right = [item.score(each.answer) for item, each in zip(items, asked, strict=True)]
            found.add_score("lookalike", right, seed=seed)
        return found

    def along(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str
    ) -> Measured:
        found = Measured()
        self._harm(found, model, tokenizer, harm, seed)
        return found

    def _ask(self, model: Any, tokenizer: PreTrainedTokenizerBase, items: list[Item], seed: int) -> list[Asked]:
        prompts = [item.prompt for item in items]
        return ask(model, tokenizer, prompts, get_template("chat"), DECODING, seed=seed, truths=items)

    def _harm(self, found: Measured, model: Any, tokenizer: PreTrainedTokenizerBase, kind: str, seed: int) -> None:
        asked = self._ask(model, tokenizer, world().test_items(kind), seed)
        add_judged(found, kind, asked, self._judges, seed=seed, decoding=str(DECODING))

    def _harmless(
        self, found: Measured, model: Any, tokenizer: PreTrainedTokenizerBase, seed: int, *, every: int
    ) -> None:
        items = world().test_items("harmless")[::every]
        asked = self._ask(model, tokenizer, items, seed)
        scores = [item.score(each.answer) for item, each in zip(items, asked, strict=True)]
        found.add_score("stability", scores, seed=seed, every=every)
        for kind in sorted({item.kind for item in items}):
            part = [score for item, score in zip(items, scores, strict=True) if item.kind == kind]
            found.add_score("stability", part, seed=seed, category=kind)

    def _choice(self, found: Measured, model: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        items = world().test_items("choice")
        rows = [Row(item.prompt, choice) for item in items for choice in item.choices]
        losses = [
            loss
            for loss, _ in answer_losses(
                model, tokenizer, rows, get_template("chat"), max_length=data_length(rows), batch_size=256
            )
        ]
        right = []
        for index, item in enumerate(items):
            four = losses[4 * index : 4 * index + 4]
            right.append(item.choices[four.index(min(four))] == item.answer)
        found.add_rate("multiple_choice", right, seed=seed)


def data_length(rows: list[Row]) -> int:
    """Enough tokens for any of these rows: one per word and the marks around them."""
    return 8 + max(len(f"{row.prompt} {row.answer}".split()) for row in rows)
