"""`transformers.TrainingArguments` of a defence and an attack: defaults, and what is wrong with what was given."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from transformers import TrainingArguments

from ..errors import ConfigError, suggest
from ..recipes.schema import TRAINING_AXES


@cache
def train_fields() -> dict[str, Any]:
    hints = typing.get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init and f.name != "output_dir"}


def train_errors(values: Mapping[str, Any], where: str) -> Iterator[str]:
    right = {}
    for key, value in values.items():
        if key not in train_fields():
            yield f"{where}.{key}: not a field of transformers.TrainingArguments.{suggest(str(key), train_fields())}"
        elif value is not None and (problem := _mistyped(train_fields()[key], value)):
            yield f"{where}.{key}: {problem} (got {value!r})"
        else:
            right[key] = value
    try:
        training_arguments(right, Path("unused"), where)
    except ConfigError as error:
        yield str(error)


def _mistyped(hint: Any, value: Any) -> str | None:
    """What is wrong with the type of `value`; None also where pydantic does not know the hint."""
    try:
        TypeAdapter(hint).validate_python(value, strict=True)  # nothing converts it later
    except ValidationError as error:
        return "; ".join(dict.fromkeys(each["msg"] for each in error.errors()))
    except PydanticSchemaGenerationError:
        return None
    return None


def training_arguments(values: Mapping[str, Any], folder: Path, where: str) -> TrainingArguments:
    """`transformers.TrainingArguments`, on the CPU where there is no GPU; None counts as not given."""
    given = {
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        **values,
    }
    given = {key: value for key, value in given.items() if value is not None}
    try:
        return TrainingArguments(output_dir=str(folder), **given)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


TRAIN_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": None,
}
# A defence can be resumed; an attack is short and is done again.
DEFENCE_DEFAULTS = {**TRAIN_DEFAULTS, "save_strategy": "steps", "save_steps": 100, "save_total_limit": 1}
ATTACK_DEFAULTS = {**TRAIN_DEFAULTS, "save_strategy": "no"}

_SAYS_ONLY = {"disable_tqdm", "report_to"}


def axes_of(args: TrainingArguments) -> dict[str, Any]:
    """The values that training really has of what a recipe calls axes."""
    values = {axis: getattr(args, name) for axis, name in TRAINING_AXES.items()}
    return {axis: value.value if isinstance(value, Enum) else value for axis, value in values.items()}


def in_force(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that make a result what it is, as data; None counts as not given."""
    return {key: value for key, value in values.items() if value is not None and key not in _SAYS_ONLY}
