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

_OF_EVALUATION = "nothing is evaluated while it trains; name evaluations in the recipe"
_OF_THE_HUB = "the model is saved in the study's folder and uploaded by nobody"
NOT_HONOURED = {  # field of TrainingArguments: why a value of it would do nothing here, or something else
    "label_smoothing_factor": "the loss is the objective's own",
    "use_liger_kernel": "its fused loss stands in for the objective's",
    "liger_kernel_config": "its fused loss stands in for the objective's",
    "train_sampling_strategy": "pairs are drawn at random, with streams of several lengths; they have no one length",
    "length_column_name": "pairs have no column of lengths",
    "auto_find_batch_size": "another batch size makes another experiment; set per_device_train_batch_size",
    "resume_from_checkpoint": "an interrupted training goes on by itself; run the same command again",
    "save_only_model": "a checkpoint without the optimiser cannot be gone on from",
    "ignore_data_skip": "a resumed training would see other pairs than an uninterrupted one",
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _OF_EVALUATION),
    **dict.fromkeys(
        ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval", "do_predict"), _OF_EVALUATION
    ),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches"), _OF_EVALUATION
    ),
    **dict.fromkeys(("eval_use_gather_object", "batch_eval_metrics", "include_for_metrics"), _OF_EVALUATION),
    **dict.fromkeys(("prediction_loss_only", "bf16_full_eval", "fp16_full_eval", "label_names"), _OF_EVALUATION),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"), _OF_THE_HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _OF_THE_HUB),
}


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
        elif key in NOT_HONOURED and value not in (None, _default(key)):
            yield f"{where}.{key}: cannot be set here: {NOT_HONOURED[key]}. Drop it."
        else:
            right[key] = value
    try:
        training_arguments(right, Path("unused"), where)
    except ConfigError as error:
        yield str(error)


def _default(key: str) -> Any:
    """Of `TrainingArguments`; the value of an enumeration, as recipes write it."""
    found = next(each for each in dataclasses.fields(TrainingArguments) if each.name == key)
    value = found.default_factory() if found.default_factory is not dataclasses.MISSING else found.default
    return value.value if isinstance(value, Enum) else value


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
