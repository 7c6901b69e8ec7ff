"""What an evaluation is: a model in, rows (and samples) out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ..data.parties import StudyData
from ..intervals import RATE, Bounds, Interval, bootstrap, wilson
from ..registry import Checked, Registry


@dataclass
class Measured:
    """Rows for rows/<evaluation>.jsonl, and prompts with generations for samples/<evaluation>.jsonl."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add_rate(self, metric: str, values: Sequence[bool], *, seed: int, **keys: Any) -> None:
        """One row: the share of items for which something is true, with Wilson's interval; see `add_score`."""
        interval = wilson(sum(map(bool, values)), len(values))
        self._add(metric, interval, [int(value) for value in values], seed, keys)

    def add_score(
        self, metric: str, values: Sequence[float], *, seed: int, bounds: Bounds | None = RATE, **keys: Any
    ) -> None:
        """One row: the mean of per-item values with n, a 95 % interval (bootstrap over items) and the values.

        No values raise `RunError`: nothing measured is never 0.

        Args:
            values: one per item, in an order that depends on the data alone: models are compared item by item.
            bounds: what a value cannot leave; None for losses and the like.
            keys: further keys of the row schema, for example category, judge, step.
        """
        numbers = [float(value) for value in values]
        self._add(metric, bootstrap(numbers, bounds=bounds), [round(number, 6) for number in numbers], seed, keys)

    def _add(self, metric: str, interval: Interval, items: list[Any], seed: int, keys: dict[str, Any]) -> None:
        bounds = {"lo": interval.lo, "hi": interval.hi}
        row = {"metric": metric, "value": interval.value, "n": interval.n, **bounds, "seed": seed, "split": "test"}
        self.rows.append({**row, "items": items, **keys})


class Evaluation(Checked):
    """Subclasses are dataclasses, their fields the options of the recipe; a file registers one under its name.

    Attributes:
        attacked: measured again after every attack; False for what would cost too much there.
    """

    attacked: ClassVar[bool] = True

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        """Everything there is to know of `model`; with `harm`, what an attack on that harm is judged by.

        The model must come back as it was given: same weights, same mode, no hook.
        """
        raise NotImplementedError(f"{type(self).__name__} must define measure()")

    def along(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str
    ) -> Measured:
        """A cheap point on the attack curve: the harm metric only; by default nothing."""
        return Measured()


EVALUATIONS: Registry[Evaluation] = Registry("evaluation", "repnoise.evaluations", Evaluation)
