"""A run's manifest, its rows and its attack as records: the one place where the report reads keys of files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from repnoise.report.records import Cut, Role


@dataclass(frozen=True)
class Row:
    """One measured number; see store/rows.py for what each key means."""

    evaluation: str
    metric: str
    value: float
    n: int
    lo: float | None = None
    hi: float | None = None
    split: str | None = None
    layer: int | None = None
    category: str | None = None
    step: int | None = None
    judge: str | None = None
    items: Sequence[float] | None = None
    every: int | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Row:
        return cls(**{each.name: row[each.name] for each in fields(cls) if each.name in row})


@dataclass(frozen=True)
class Settings:
    """An attack without its seed.

    Attributes:
        recorded: all of it, as the manifest has it. Attacks with equal ones are one attack on several models.
    """

    recorded: dict[str, Any]
    name: str
    harm: str
    learning_rate: float | None = None
    steps: int | None = None
    lora_rank: int | None = None
    batch_size: int | None = None
    examples: int | None = None
    template: str | None = None
    optimizer: str | None = None

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> Settings:
        known = {each.name for each in fields(cls)} - {"recorded"}
        plain = {key: value for key, value in recorded.items() if key != "seed"}
        return cls(plain, **{key: value for key, value in plain.items() if key in known})

    @cached_property
    def key(self) -> str:
        """What attacks on different models have in common."""
        return json.dumps(self.recorded, sort_keys=True)

    def label(self, vary: Sequence[str] = ()) -> str:
        """In words: "sft, learning rate 0.001, 100 steps, full fine-tuning", then those in `vary`."""
        parts = [self.name]
        if self.learning_rate is not None:
            parts.append(f"learning rate {self.learning_rate:g}")
        if self.steps is not None:
            parts.append(f"{self.steps} steps")
        parts.append(f"LoRA rank {self.lora_rank}" if self.lora_rank else "full fine-tuning")
        found = ((key, self.recorded.get(key)) for key in vary)
        return ", ".join([*parts, *(f"{key} {value}" for key, value in found if value is not None)])


def varying(every: Sequence[Settings]) -> list[str]:
    """Settings outside the usual label that differ between these attacks."""
    shown = {"name", "learning_rate", "steps", "lora_rank", "harm"}
    keys = sorted({key for one in every for key in one.recorded} - shown)
    return [k for k in keys if len({json.dumps(one.recorded.get(k), sort_keys=True) for one in every}) > 1]


@dataclass(frozen=True)
class Data:
    """What a manifest records of the data; None or empty where it records nothing."""

    overlaps: list[str] | None = None
    harmless_overlaps: list[str] | None = None
    harms: dict[str, Role] = field(default_factory=dict)
    template: str | None = None
    cut: list[Cut] = field(default_factory=list)
    pairs: int | None = None
    retain: int | None = None

    @classmethod
    def of(cls, record: Any) -> Data:
        found = record if isinstance(record, Mapping) else {}
        audit, harmless = found.get("audit"), found.get("harmless_audit")
        return cls(
            overlaps=_overlaps(audit),
            harmless_overlaps=_overlaps(harmless),
            harms=dict(found.get("harms") or {}),
            template=found.get("template"),
            cut=[
                Cut(name, int(one["rows"]), int(one["answers_cut"]), int(one["prompts_cut"]))
                for name, one in (found.get("truncated") or {}).items()
            ],
            pairs=_size(audit, "defence"),
            retain=_size(harmless, "retain"),
        )


def _overlaps(audit: Any) -> list[str] | None:
    if not isinstance(audit, Mapping):
        return None
    found = [(each["sets"], each["prompts"]) for each in audit.get("overlaps") or []]
    return [f"{' and '.join(map(str, sets))} share {prompts} prompts" for sets, prompts in found]


def _size(audit: Any, name: str) -> int | None:
    found = ((audit or {}).get("sets") or {}).get(name)
    return int(found["rows"]) if isinstance(found, Mapping) and "rows" in found else None


@dataclass(frozen=True)
class Manifest:
    """How one run came about.

    Attributes:
        attack, seed, covers: of an attack; None and nothing for other stages.
        given: the model was defended elsewhere.
        train: `TrainingArguments` of a defence; None where nothing was trained here.
        pairs: how many pairs it trained on.
    """

    status: str | None
    stage: str
    name: str | None
    hash: str | None
    parent: str | None
    started: str
    finished: str
    seconds: float
    error: str | None
    data: Data
    attack: Settings | None
    seed: int | None
    covers: tuple[str, ...]
    given: bool
    train: dict[str, Any] | None
    pairs: int | None
    versions: dict[str, str | None]
    python: str | None
    platform: str | None
    git: dict[str, Any] | None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Manifest:
        arguments = found.get("arguments") or {}
        attack, seed = arguments.get("attack"), arguments.get("seed")
        texts = isinstance(attack, dict) and all(isinstance(attack.get(key), str) for key in ("name", "harm"))
        named = texts and isinstance(seed, int)
        defence = arguments.get("defence")
        kept = ("status", "name", "hash", "parent", "error", "python", "platform", "git")
        plain: dict[str, Any] = {key: found.get(key) for key in kept}
        return cls(
            **plain,
            stage=str(found.get("stage")),
            started=str(found.get("started")),
            finished=str(found.get("finished")),
            seconds=float(found.get("seconds") or 0.0),
            data=Data.of(found.get("data")),
            attack=Settings.of(attack) if named and isinstance(attack, dict) else None,
            seed=seed if named else None,
            covers=tuple(arguments.get("covers") or ()),
            given=bool(arguments.get("given")),
            train=(defence.get("train") or {}) if isinstance(defence, dict) else None,
            pairs=arguments.get("pairs"),
            versions=found.get("versions") or {},
        )
