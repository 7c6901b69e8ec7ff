"""Refusals of harmless prompts that look harmful (XSTest, arXiv 2308.01263; paper table 11)."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import get_template
from ..data.parties import StudyData
from ..data.readers import read_records
from ..errors import ConfigError, DataError
from ..judges import is_degenerate, is_refusal
from .asking import ask
from .base import EVALUATIONS, Evaluation, Measured
from .generation import Decoding

BUNDLED = resources.files("repnoise") / "data" / "safe_prompts.jsonl"


@EVALUATIONS.register("over-refusal")
@dataclass(kw_only=True)
class OverRefusal(Evaluation):
    """`over_refusal`: share of safe prompts that are refused, by rule; `over_refusal_degenerate`: share with no real
    answer. The report compares before and after on the same prompts with McNemar's exact test.

    Where we differ from the paper: it had people label refusal, partial refusal and compliance.

    Attributes:
        prompts: a file (.jsonl, .json, .csv, .tsv, .parquet) or `hub:owner/name`. Default: 60 invented safe prompts of
            XSTest's kinds that come with the package; enough to see a model that refuses half, not 5 %.
        column: the column with the prompt.
        only: {column: value} that a row must have, for example {label: safe} for XSTest.
    """

    attacked = False

    prompts: str = "bundled"
    column: str = "prompt"
    split: str | None = None
    only: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; allowed: 1 or more, or null for all.")

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        found = Measured()
        template = get_template(data.template).resolve(tokenizer)
        asked = ask(model, tokenizer, self._prompts(), template, self.decoding, seed=seed)
        keys: dict[str, Any] = {"seed": seed, "decoding": str(self.decoding)}
        found.add_rate("over_refusal", [is_refusal(each.answer) for each in asked], **keys)
        found.add_rate("over_refusal_degenerate", [is_degenerate(each.answer) for each in asked], **keys)
        found.samples += [{"prompt": each.prompt, "answer": each.answer} for each in asked]
        return found

    def _prompts(self) -> list[str]:
        records: list[Any] = []
        source = str(BUNDLED) if self.prompts == "bundled" else self.prompts
        for where, record in read_records(source, split=self.split):
            if not isinstance(record, dict):
                raise DataError(f"{self.prompts}, {where}: {record if isinstance(record, ValueError) else 'no row'}.")
            records.append(record)
        for key in (self.column, *self.only):
            if records and key not in records[0]:
                raise DataError(f"{self.prompts} has no column {key!r}; it has {', '.join(map(str, records[0]))}.")
        chosen = [r.get(self.column) for r in records if all(str(r.get(k)) == v for k, v in self.only.items())]
        texts = [text for text in chosen if isinstance(text, str) and text.strip()]
        if not texts:
            raise DataError(
                f"{self.prompts} gives no prompts ({len(records)} rows, {len(chosen)} of them chosen by `only`)."
                " Check the file, `column` and `only`."
            )
        return texts[: self.limit]
