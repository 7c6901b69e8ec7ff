"""What an evaluation is: a model in, rows (and samples) out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.study import StudyData
from ..intervals import bootstrap, wilson
from ..registry import Registry


@dataclass
class Measured:
    """Rows for rows/<evaluation>.jsonl, and prompts with generations for samples/<evaluation>.jsonl."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, metric: str, values: Sequence[float | bool], *, seed: int, **keys: Any) -> None:
        """One row: the mean of per-item values with n and a 95 % interval.

        Rates (all values boolean) get Wilson's interval, scores a bootstrap over items. No values raises
        `RunError`: nothing measured is never 0.
        """
        if values and all(isinstance(value, bool) for value in values):
            interval = wilson(sum(map(bool, values)), len(values))
        else:
            interval = bootstrap([float(value) for value in values])
        self.rows.append(
            {
                "metric": metric,
                "value": interval.value,
                "n": interval.n,
                "lo": interval.lo,
                "hi": interval.hi,
                "seed": seed,
                "split": "test",
                **keys,
            }
        )


class Evaluation:
    """Subclasses define `measure`; a file registers one under the name that recipes use."""

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        """Everything there is to know of `model`; with `harm`, what an attack on that harm is judged by."""
        raise NotImplementedError(f"{type(self).__name__} must define measure()")

    def along(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str
    ) -> Measured:
        """A cheap point on the attack curve: the harm metric only."""
        return self.measure(model, tokenizer, data, seed=seed, harm=harm)


EVALUATIONS: Registry[Evaluation] = Registry("evaluation", "repnoise.evaluations", Evaluation)
