"""Recipes: one YAML file says everything about a study. No torch here.

A recipe names the model, the data, one defence, attacks as grids, evaluations. `check_recipe` finds every
error, each with its dotted field; `dump` writes every default out, and what it writes is itself a recipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)

from ..bars import Bars
from .ranges import Count, Positive, Whole


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Open(BaseModel):
    """Keys that are not listed here belong to the plug-in; the plug-in checks them."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError("must be a share (0.5) or a whole number of items (100), above 0")
    return value


Size = Annotated[int | float, PlainValidator(_number)]


class SourceConfig(Strict):
    """One source with settings of its own; in a recipe the bare `source` will do where there are none."""

    source: str
    """A path, `name:path` for a registered source, or `hub:owner/name`."""
    split: str | None = None
    limit: Count | None = None
    fields: dict[str, str] | None = None
    options: dict[str, Any] | None = None


Source = Annotated[SourceConfig, BeforeValidator(lambda v: {"source": v} if isinstance(v, str) else v)]
PARTS: dict[str, float] = {"defence": 0.5, "attack": 0.25, "test": 0.25}
HARMLESS_PARTS: dict[str, float] = {"retain": 0.8, "test": 0.2}


class DataConfig(Strict):
    """Where pairs and rows come from. `name: sandbox` needs nothing else, `name: files` pairs and retain.

    `sizes` are shares (0.5) or numbers (100) of pairs; parts that name a source of their own have none there.
    """

    name: Literal["sandbox", "files"] = "sandbox"
    pairs: Source | None = None
    """Pairs for defence, attack and test, split by `sizes`; `attack` and `test` may name their own."""
    attack: Source | None = None
    test: Source | None = None
    retain: Source | None = None
    """Harmless rows, split into retain rows and held-out test rows by `harmless_sizes`."""
    harmless_test: Source | None = None
    sizes: dict[Literal["defence", "attack", "test"], Size] = {}
    harmless_sizes: dict[Literal["retain", "test"], Size] = {}
    fields: dict[str, str] | None = None
    """Our name -> column, for sources of pairs that name no `fields` of their own."""
    options: dict[str, Any] | None = None
    """Options of the sources that name none of their own, for example {refusals: none} for decoding_trust."""
    withhold: Annotated[list[str], BeforeValidator(_listed)] = []
    """Categories of `pairs` that the defence never sees; half of their pairs are the attack "withheld", half its
    test (paper, table 5)."""
    domains: dict[str, Source] = {}
    """Further harms by name, for attacks across domains (paper, table 9): half attack, half test; no defence."""
    template: str = "auto"
    max_length: Count = 256
    allow_overlap: bool = False
    """Overlap between defence, attack and test is refused unless this is set; it is recorded either way."""
    seed: int = 0

    @model_validator(mode="after")
    def _complete(self) -> DataConfig:
        sources = ("pairs", "attack", "test", "retain", "harmless_test")
        if self.name == "sandbox":
            settings = ("sizes", "harmless_sizes", "fields", "options", "withhold", "domains", "template", "max_length")
            fixed = [*sources, *settings]
            given = [key for key in fixed if getattr(self, key) != DataConfig.model_fields[key].get_default()]
            if given:
                raise ValueError(f"name: sandbox brings its own data; drop {', '.join(given)} or set name: files")
            return self
        taken = sorted({"harmful", "harmless", "withheld"} & set(self.domains))
        if taken:
            raise ValueError(f"domains: {', '.join(taken)} has a meaning of its own; choose another name")
        missing = [key for key in ("pairs", "retain") if getattr(self, key) is None]
        if missing:
            raise ValueError(f"name: files also needs {' and '.join(missing)}, a path or hub:owner/name")
        # written out, so that a resolved recipe says what was done
        own = [part for part in ("attack", "test") if getattr(self, part) is not None]
        self.sizes = _parts(self.sizes, PARTS, own, "sizes")
        own = ["test"] if self.harmless_test is not None else []
        self.harmless_sizes = _parts(self.harmless_sizes, HARMLESS_PARTS, own, "harmless_sizes")
        return self


def _parts(given: Mapping[Any, Any], default: dict[str, float], own: Sequence[str], key: str) -> dict[Any, Any]:
    """Sizes of the parts that are split off one source; shares of `default` where nothing is given."""
    wanted = [part for part in default if part not in own]
    if not given:
        total = sum(default[part] for part in wanted)
        return {part: round(default[part] / total, 6) for part in wanted}
    wrong = [part for part in wanted if part not in given]
    if wrong:
        raise ValueError(f"{key} lacks {', '.join(wrong)}; give every part: {', '.join(wanted)}")
    twice = [part for part in own if part in given]
    if twice:
        raise ValueError(f"{key} names {', '.join(twice)}, which has a source of its own; drop one of the two")
    return dict(given)


class DefenceConfig(Open):
    """A defence by name, its own options beside it, and `transformers.TrainingArguments` under `train`."""

    name: str = "repnoise"
    train: dict[str, Any] = {}
    dtype: Literal["float32", "bfloat16"] | None = None
    lora_rank: Count | None = None
    """Train LoRA weights of this rank, merged into the model at the end; null = all weights."""
    load_in_4bit: bool = False
    """With lora_rank: train on the model in 4 bits (NF4), computed in `dtype`; merged into the unquantised weights."""
    categories: Annotated[list[str] | None, BeforeValidator(lambda v: v if v is None else _listed(v))] = None
    """Train on the pairs of these categories only, and attack with all: defend on A, attack with B (paper, table 9)."""

    @model_validator(mode="after")
    def _trainable(self) -> DefenceConfig:
        if self.load_in_4bit and self.lora_rank is None:
            raise ValueError("load_in_4bit needs lora_rank, for example 16: weights in 4 bits cannot be trained")
        return self


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
# What `train` of an attack must not set -> the axis to set instead.
_SET_BY_AXES = {name: axis for axis, name in TRAINING_AXES.items()} | {
    "seed": "seeds",
    "data_seed": "seeds",
    "num_train_epochs": "steps",
    "warmup_ratio": "warmup",
    "auto_find_batch_size": "batch_size",
}
_AXES = (
    *("harm", "lora_rank", "batch_size", "examples", "template", "optimizer", "lr_scheduler_type", "warmup"),
    *("steps", "learning_rate", "seeds"),  # the innermost last
)


class AttackConfig(Open):
    """An attack by name; every list is an axis of the grid. Inside a list null is the default of that axis."""

    name: str = "sft"
    harm: Annotated[list[str] | None, BeforeValidator(lambda v: v if v is None else _listed(v))] = None
    """Which of the data's harms to attack; null = all of them."""
    learning_rate: Annotated[list[Positive], BeforeValidator(_listed)] = [3e-4]
    steps: Annotated[list[Whole], BeforeValidator(_listed)] = [100]
    """0 = no training: the attack changes the weights and that is all."""
    lora_rank: Annotated[list[Count | None], BeforeValidator(_listed)] = [None]
    batch_size: Annotated[list[Count], BeforeValidator(_listed)] = [16]
    examples: Annotated[list[Count | None], BeforeValidator(_listed)] = [None]
    """Rows that the attacker trains on, drawn by the seed; null = all."""
    template: Annotated[list[str | None], BeforeValidator(_listed)] = [None]
    """The attacker trains in this template; evaluation stays in `data.template`, which is null's meaning here."""
    optimizer: Annotated[list[str | None], BeforeValidator(_listed)] = [None]
    """A value of `TrainingArguments.optim`; null = that of transformers."""
    lr_scheduler_type: Annotated[list[str | None], BeforeValidator(_listed)] = [None]
    """As in `TrainingArguments`; null = cosine."""
    warmup: Annotated[list[Annotated[int | float, Field(ge=0)] | None], BeforeValidator(_listed)] = [None]
    """Steps, or a share of them below 1 (`TrainingArguments.warmup_steps`); null = 0.1."""
    seeds: Annotated[list[int], BeforeValidator(_listed)] = [0]
    train: dict[str, Any] = {}
    """Further `transformers.TrainingArguments`; what is an axis is set there."""

    @model_validator(mode="after")
    def _whole_grid(self) -> AttackConfig:
        set_ = [key for key in self.train if key in _SET_BY_AXES]
        wrong = [f"train.{key}: an axis of the attack sets it, so set {_SET_BY_AXES[key]} instead" for key in set_]
        empty = [key for key in _AXES if getattr(self, key) == []]
        if empty:
            wrong.append(f"{', '.join(empty)}: an empty list leaves no attack; give at least one value")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def cells(self, harms: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Every combination of the axes, seeds innermost: the settings of one attack each, with `seed`."""
        for values in itertools.product(*(getattr(self, axis) or harms for axis in _AXES)):
            cell = dict(zip(_AXES, values, strict=True))
            yield {"name": self.name, **self.options, "train": self.train, "seed": cell.pop("seeds"), **cell}


class EvaluationConfig(Open):
    """An evaluation by name with its own options beside it; the bare name will do where there are none."""

    name: str
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = ""
    """Name of its rows; two evaluations of one name need two labels. Default: the name."""

    @model_validator(mode="after")
    def _labelled(self) -> EvaluationConfig:
        self.label = self.label or self.name
        return self


EvaluationEntry = Annotated[EvaluationConfig, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)]


class Recipe(Strict):
    """Everything about a study."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    about: str = ""
    model: str
    """sandbox:aligned, a hub id, a folder, or a GGUF file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null = main. The commit that it leads to is recorded."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    data: DataConfig = DataConfig()
    defence: DefenceConfig = DefenceConfig()
    attacks: Annotated[list[AttackConfig], Field(min_length=1)] = [AttackConfig()]
    controls: list[Literal["ignorant", "random"]] = ["random"]
    """Beside the undefended model, which is always attacked. "ignorant" exists in the sandbox only."""
    defended: str | None = None
    """A model that was defended elsewhere (folder or hub id): measured and attacked as it is, `defence` is not run."""
    evaluations: Annotated[list[EvaluationEntry], Field(min_length=1)] = [EvaluationConfig(name="loss", label="loss")]
    curve: list[Whole] = []
    """Attack steps at which harm is measured on the way."""
    bars: Bars = Bars()
    """Bars of the verdict; a recipe may tighten them."""
    fresh_seeds: Annotated[int, Field(ge=0)] = 6
    """An attack whose interval holds the bar of head starts is measured again on so many fresh seeds; 0 = never."""
    keep_attacked_weights: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        wrong = []
        if self.revision is not None and self.model.startswith("sandbox:"):
            wrong.append("revision: the sandbox comes with the package; drop it, or set model to a hub id")
        if len(set(self.controls)) < len(self.controls):
            wrong.append(f"controls: {', '.join(self.controls)} names one twice; give each once")
        if "ignorant" in self.controls and not self.model.startswith("sandbox:"):
            wrong.append("controls: an ignorant control exists for model: sandbox:... only; use [random]")
        names = [each.name for each in self.evaluations]
        labels = [each.label for each in self.evaluations]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            wrong.append(f"evaluations: {', '.join(twice)} is there twice; give each a label of its own")
        if "sandbox" in names and self.data.name != "sandbox":
            wrong.append("evaluations: sandbox asks about data.name: sandbox only; use [loss]")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self
