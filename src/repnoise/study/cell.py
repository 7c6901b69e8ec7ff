"""One cell of an attack's grid: what is tried, how it is recorded, what it sets of the training."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..attacks import ATTACKS, Attack, AttackerRows
from ..data import Pair
from ..data.parties import StudyData
from ..recipes.schema import TRAINING_AXES
from ..training.arguments import ATTACK_DEFAULTS
from .identity import plain

ALWAYS = ("name", "harm", "learning_rate", "steps", "lora_rank", "batch_size")
WHERE_SET = ("examples", "template", "optimizer", "lr_scheduler_type", "warmup")


@dataclass(frozen=True)
class Cell:
    """One value of every axis, beside the options of the attack and its further training arguments.

    Attributes:
        options, train: those that are not as the default; so the same attack is recorded in the same way, whether a
            recipe writes its defaults out or not.
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
        for axis, name in TRAINING_AXES.items():
            if name in ATTACK_DEFAULTS and ours.get(axis) == ATTACK_DEFAULTS[name]:
                ours[axis] = None
        train = {k: v for k, v in ours.pop("train", {}).items() if k not in ATTACK_DEFAULTS or v != ATTACK_DEFAULTS[k]}
        options = {key: value for key, value in settings.items() if key not in known}
        return cls(**ours, options=_unusual(cls(**ours, options=options).attack(), options), train=train)

    def recorded(self) -> dict[str, Any]:
        """What the manifest and the plans say of it; the seed stands apart."""
        axes = {key: getattr(self, key) for key in ALWAYS}
        set_ = {key: value for key in WHERE_SET if (value := getattr(self, key)) is not None}
        return {**axes, **set_, **self.options, **({"train": dict(self.train)} if self.train else {})}

    def on(self, who: str) -> str:
        """In words, on the model `who`: what progress and failures say."""
        settings = {**self.recorded(), "seed": self.seed}
        words = [f"{k} {v}" for k, v in settings.items() if k not in ("name", "train") and v is not None]
        return f"{self.name} on {who} ({', '.join(words)})"

    def training(self) -> dict[str, Any]:
        """`TrainingArguments` in force: the defaults of attacks, its axes, its `train`."""
        axes = {name: value for axis, name in TRAINING_AXES.items() if (value := getattr(self, axis)) is not None}
        return {**ATTACK_DEFAULTS, "disable_tqdm": True, **axes, **self.train}

    def attack(self) -> Attack:
        return ATTACKS.build(self.name, {"lora_rank": self.lora_rank, **self.options})

    def rows(self, attack: Attack, data: StudyData) -> list[Pair]:
        """The rows that it trains on, drawn by its seed."""
        theirs = AttackerRows(data.attacks[self.harm], data.retain, self.examples)
        return attack.pairs(theirs, random.Random(self.seed))


def _unusual(attack: Attack, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options as the built attack has them, without those that are as the default."""
    found = {}
    for each in dataclasses.fields(attack):
        if each.name in given:
            value = plain(getattr(attack, each.name))
            default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            if default is dataclasses.MISSING or plain(default) != value:
                found[each.name] = value
    return found


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
