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
    EvaluationConfig,
    Open,
    Recipe,
    SourceConfig,
    check_recipe,
    raw_recipe,
)
from .data import Pair, Row, load_pairs, load_rows, split
from .data.study import StudyData
from .defences import DEFENCES
from .errors import ConfigError, DataError
from .evaluations import EVALUATIONS
from .registry import Registry, unknown_key


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


def _plugin_errors(raw: Mapping[str, Any]) -> Iterator[str]:
    """What the plug-ins find wrong; works on raw data, so that structural errors elsewhere hide nothing."""
    defence = raw.get("defence", {})
    if isinstance(defence, dict):
        wrong = list(_option_errors(DEFENCES, defence, DefenceConfig, "defence"))
        yield from wrong
        given = [key for key in ("lora_rank", "load_in_4bit") if defence.get(key)]
        if given and not wrong:
            name = defence.get("name", DefenceConfig().name)
            options = {key: value for key, value in defence.items() if key not in DefenceConfig.model_fields}
            if DEFENCES.build(name, options).vector is not None:
                drop = " and ".join(given)
                yield f"defence.{given[0]}: {name} trains an adapter of its own; set rank and drop {drop}"
    attacks = raw.get("attacks", [])
    for index, attack in enumerate(attacks if isinstance(attacks, list) else []):
        if isinstance(attack, dict):
            yield from _option_errors(ATTACKS, attack, AttackConfig, f"attacks.{index}")
    evaluations = raw.get("evaluations", [])
    for index, evaluation in enumerate(evaluations if isinstance(evaluations, list) else []):
        values = {"name": evaluation} if isinstance(evaluation, str) else evaluation
        if isinstance(values, dict):
            yield from _option_errors(EVALUATIONS, values, EvaluationConfig, f"evaluations.{index}")


def _option_errors(registry: Registry[Any], values: Mapping[str, Any], config: type[Open], where: str) -> Iterator[str]:
    """Errors in the options that belong to the plug-in, and in `train`."""
    ours = list(config.model_fields)
    name = values.get("name", config.model_fields["name"].get_default())
    if isinstance(name, str):
        options = {str(key): value for key, value in values.items() if key not in ours}
        try:
            theirs = registry.fields(name)
            for key in [key for key in options if key not in theirs]:
                yield f"{where}.{key}: {unknown_key(key, list(dict.fromkeys([*theirs, *ours])))}"
            registry.build(name, {key: options[key] for key in options if key in theirs})
        except ValidationError as error:
            for each in error.errors():
                at = ".".join([where, *map(str, each["loc"])])
                yield f"{at}: {each['msg'].removeprefix('Value error, ')} (got {each['input']!r})"
        except ConfigError as error:
            yield f"{where}: {error}"
    train = values.get("train") if "train" in ours else None
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
    pairs = _pairs(config.pairs, config)
    withheld = [pair for pair in pairs if pair.category in config.withhold]
    further = {name: _pairs(source, config) for name, source in config.domains.items()}
    if config.withhold:
        pairs = _without(pairs, config.withhold)
        further["withheld"] = withheld
    halves = {name: split(each, {"attack": 0.5, "test": 0.5}, seed=config.seed) for name, each in further.items()}
    parts = split(
        pairs,
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
        attacks={"harmful": parts["attack"], **{name: half["attack"] for name, half in halves.items()}},
        test=parts["test"],
        tests={name: half["test"] for name, half in halves.items()},
        harmless_test=harmless["test"],
        template=config.template,
        max_length=config.max_length,
        allow_overlap=config.allow_overlap,
    )


def _without(pairs: list[Pair], categories: Sequence[str]) -> list[Pair]:
    """Pairs of other categories; their prompts are not among the withheld ones either."""
    found = sorted({pair.category for pair in pairs if pair.category is not None})
    unknown = [category for category in categories if category not in found]
    if unknown:
        raise DataError(
            f"data.withhold: {', '.join(unknown)} is no category of data.pairs."
            f" Categories there: {', '.join(found) or 'none (the source gives no category)'}."
        )
    hidden = {pair.prompt for pair in pairs if pair.category in categories}
    rest = [pair for pair in pairs if pair.prompt not in hidden]
    if not rest:
        raise DataError("data.withhold takes every pair: none is left for the defence. Withhold fewer categories.")
    return rest


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
        **{f"test pairs ({harm})": side(pairs, "harmful") for harm, pairs in data.tests.items()},
        "harmless test rows": data.harmless_test,
    }
    for name, rows in sets.items():
        if rows:
            try:
                RowDataset(rows, tokenizer, "rows", template=data.template, max_length=data.max_length)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
