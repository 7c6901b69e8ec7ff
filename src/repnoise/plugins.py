"""From a recipe to objects: plug-ins with their options, training arguments, data. Every error at once."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from transformers import TrainingArguments

from .attacks import ATTACKS
from .config import (
    AttackConfig,
    DataConfig,
    DefenceConfig,
    Recipe,
    SourceConfig,
    check_recipe,
    raw_recipe,
    unknown_key,
)
from .data import Pair, Row, load_pairs, load_rows, split
from .data.study import StudyData
from .defences import DEFENCES
from .errors import ConfigError, DataError
from .evaluations import EVALUATIONS
from .registry import Registry


def resolve(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and check all of it, plug-ins and their options included.

    Raises:
        ConfigError: with every error, one line each.
    """
    raw = raw_recipe(name, overrides)
    recipe, errors = check_recipe(raw)
    errors = [*errors, *_plugin_errors(raw)]
    if errors or recipe is None:
        lines = "\n  ".join(errors)
        raise ConfigError(
            f"the recipe {name} has {len(errors)} error{'s' if len(errors) != 1 else ''}:\n  {lines}\n"
            "Mend them and run again; `repnoise recipes show sandbox` prints one that is right."
        )
    return recipe


def build(registry: Registry[Any], name: str, options: Mapping[str, Any]) -> Any:
    """The plug-in `name` with these options, each checked against the type of its field.

    Raises:
        ConfigError: an unknown plug-in or option.
        ValidationError: values of the wrong type.
    """
    cls, known = registry.get(name), _fields(registry, name)
    for key in options:
        if key not in known:  # pydantic would drop it without a word
            raise ConfigError(f"{registry.kind} {name!r}, {key}: {unknown_key(key, known)}")
    return TypeAdapter(cls).validate_python(dict(options))


def _fields(registry: Registry[Any], name: str) -> list[str]:
    cls = registry.get(name)
    return [field.name for field in dataclasses.fields(cls) if field.init] if dataclasses.is_dataclass(cls) else []


def _plugin_errors(raw: Mapping[str, Any]) -> Iterator[str]:
    """What the plug-ins find wrong; works on raw data, so that structural errors elsewhere hide nothing."""
    defence = raw.get("defence", {})
    if isinstance(defence, dict):
        yield from _option_errors(DEFENCES, defence, DefenceConfig, "defence")
    attacks = raw.get("attacks", [])
    for index, attack in enumerate(attacks if isinstance(attacks, list) else []):
        if isinstance(attack, dict):
            yield from _option_errors(ATTACKS, attack, AttackConfig, f"attacks.{index}")
    evaluations = raw.get("evaluations", [])
    for index, name in enumerate(evaluations if isinstance(evaluations, list) else []):
        if isinstance(name, str):
            try:
                EVALUATIONS.get(name)
            except ConfigError as error:
                yield f"evaluations.{index}: {error}"


def _option_errors(
    registry: Registry[Any], values: Mapping[str, Any], config: type[DefenceConfig | AttackConfig], where: str
) -> Iterator[str]:
    """Errors in the options that belong to the plug-in, and in `train`."""
    ours = list(config.model_fields)
    name = values.get("name", config.model_fields["name"].default)
    if isinstance(name, str):
        options = {str(key): value for key, value in values.items() if key not in ours}
        try:
            theirs = _fields(registry, name)
            for key in [key for key in options if key not in theirs]:
                yield f"{where}.{key}: {unknown_key(key, list(dict.fromkeys([*theirs, *ours])))}"
            build(registry, name, {key: options[key] for key in options if key in theirs})
        except ValidationError as error:
            for each in error.errors():
                at = ".".join([where, *map(str, each["loc"])])
                yield f"{at}: {each['msg'].removeprefix('Value error, ')} (got {each['input']!r})"
        except ConfigError as error:
            yield f"{where}: {error}"
    train = values.get("train")
    if isinstance(train, dict):
        yield from _train_errors(train, f"{where}.train")


@cache
def _train_fields() -> dict[str, Any]:
    hints = typing.get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init and f.name != "output_dir"}


def _train_errors(values: Mapping[str, Any], where: str) -> Iterator[str]:
    right = {}
    for key, value in values.items():
        if key not in _train_fields():
            near = difflib.get_close_matches(str(key), _train_fields(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            yield f"{where}.{key}: not a field of transformers.TrainingArguments.{hint}"
        elif value is not None and (problem := _mistyped(_train_fields()[key], value)):
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


# ---- data -----------------------------------------------------------------------------------------------


def load_data(recipe: Recipe) -> StudyData:
    """All data of the study; refuses overlapping prompts."""
    config = recipe.data
    if config.name == "sandbox":
        from .sandbox.data import study_data

        return study_data()
    assert config.pairs is not None  # the recipe model has checked both
    assert config.retain is not None
    parts = split(
        _pairs(config.pairs, config),
        {str(name): size for name, size in config.sizes.items()},
        seed=config.seed,
    )
    for name, source in (("attack", config.attack), ("test", config.test)):
        if source is not None:
            parts[name] = _pairs(source, config)
    harmless = split(
        _rows(config.retain, config),
        {str(name): size for name, size in config.harmless_sizes.items()},
        seed=config.seed,
    )
    if config.harmless_test is not None:
        harmless["test"] = _rows(config.harmless_test, config)
    return StudyData(
        defence=parts["defence"],
        retain=harmless["retain"],
        attacks={"harmful": parts["attack"]},
        test=parts["test"],
        harmless_test=harmless["test"],
        template=config.template,
        max_length=config.max_length,
        allow_overlap=config.allow_overlap,
    )


def _pairs(source: SourceConfig, config: DataConfig) -> list[Pair]:
    fields = config.fields if source.fields is None else source.fields
    options = config.options if source.options is None else source.options
    return load_pairs(source.source, split=source.split, limit=source.limit, fields=fields, options=options)


def _rows(source: SourceConfig, config: DataConfig) -> list[Row]:
    options = config.options if source.options is None else source.options
    return load_rows(source.source, split=source.split, limit=source.limit, fields=source.fields, options=options)


def check_lengths(data: StudyData, tokenizer: Any) -> None:
    """Every prompt leaves room for an answer; else `DataError` now and not hours later, at the attack."""
    from .data import RowDataset, side

    sets: dict[str, list[Row]] = {
        "defence pairs": side(data.defence, "harmful"),
        "refusals of the defence pairs": side(data.defence, "harmless"),
        "retain rows": data.retain,
        **{f"attack pairs ({harm})": side(pairs, "harmful") for harm, pairs in data.attacks.items()},
        "test pairs": side(data.test, "harmful"),
        "harmless test rows": data.harmless_test,
    }
    for name, rows in sets.items():
        if rows:
            try:
                RowDataset(rows, tokenizer, "rows", template=data.template, max_length=data.max_length)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
