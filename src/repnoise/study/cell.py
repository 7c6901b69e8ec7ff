"""One cell of an attack's grid: what is tried, how it is recorded, what it sets of the training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..attacks import ATTACKS, Attack, AttackerRows
from ..data import Pair
from ..data.parties import StudyData
from ..store.provenance import canonical_hash

# Axis of an attack -> field of `transformers.TrainingArguments`.
TRAINING_AXES = {
    "learning_rate": "learning_rate",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "seed": "seed",
    "optimizer": "optim",
    "lr_scheduler_type": "lr_scheduler_type",
    "warmup": "warmup_steps",
}
ALWAYS = ("name", "harm", "learning_rate", "steps", "lora_rank", "batch_size")
WHERE_SET = ("examples", "template", "optimizer", "lr_scheduler_type", "warmup")


@dataclass(frozen=True)
class Cell:
    """One value of every axis, beside the options of the attack and its further training arguments.

    An axis that is None has the default of `AttackConfig`.
    """

    name: str
    harm: str
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    lora_rank: int | None = None
    examples: int | None = None
    template: str | None = None
    optimizer: str | None = None
    lr_scheduler_type: str | None = None
    warmup: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Cell:
        """From one of `AttackConfig.cells`, where the options stand beside the axes."""
        known = {*cls.__dataclass_fields__} - {"options"}  # an attack may have an option of this name
        ours = {key: value for key, value in settings.items() if key in known}
        return cls(**ours, options={key: value for key, value in settings.items() if key not in known})

    def recorded(self) -> dict[str, Any]:
        """What the manifest and the plan of a sweep say of it; the seed stands apart."""
        axes = {key: getattr(self, key) for key in ALWAYS}
        set_ = {key: value for key in WHERE_SET if (value := getattr(self, key)) is not None}
        return {**axes, **set_, **self.options, **({"train": dict(self.train)} if self.train else {})}

    def on(self, who: str) -> str:
        """In words, on the model `who`: what progress and failures say."""
        settings = {**self.recorded(), "seed": self.seed}
        words = [f"{k} {v}" for k, v in settings.items() if k not in ("name", "train") and v is not None]
        return f"{self.name} on {who} ({', '.join(words)})"

    def training(self) -> dict[str, Any]:
        """What it sets of `TrainingArguments`: its axes, then its `train`."""
        axes = {name: value for axis, name in TRAINING_AXES.items() if (value := getattr(self, axis)) is not None}
        return {"disable_tqdm": True, **axes, **self.train}

    def attack(self) -> Attack:
        return ATTACKS.build(self.name, {"lora_rank": self.lora_rank, **self.options})

    def rows(self, attack: Attack, data: StudyData) -> list[Pair]:
        """The rows that it trains on, drawn by its seed."""
        theirs = AttackerRows(data.attacks[self.harm], data.retain, self.examples)
        return attack.pairs(theirs, random.Random(self.seed))

    def digest(self, parent: str, **further: Any) -> str:
        """Hash of the cell on the model `parent`, with what else the results depend on."""
        cell = {"train": {}, **self.recorded(), "seed": self.seed}
        return canonical_hash({"parent": parent, "cell": cell, **further})


def distinct(cells: Iterable[Cell]) -> Iterator[Cell]:
    """The first cell of each combination of what can be wrong: rows, and names of `TrainingArguments`."""
    seen = set()
    for cell in cells:
        key = (cell.harm, *(getattr(cell, axis) for axis in WHERE_SET))
        if key not in seen:
            seen.add(key)
            yield cell


def unknown_to(data: StudyData, pairs: Sequence[Pair]) -> list[Pair]:
    """Those of an attack's rows that are not among the study's: their lengths were checked by nobody."""
    known = {pair.prompt for each in data.attacks.values() for pair in each} | {row.prompt for row in data.retain}
    return [pair for pair in pairs if pair.prompt not in known]
