"""From a recipe to objects: plug-ins with their options, training arguments, data. Every error at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..attacks import ATTACKS
from ..defences import DEFENCES
from ..errors import ConfigError, OptionsError, unknown_key
from ..evaluations import EVALUATIONS
from ..recipes.checking import check_recipe, dump
from ..recipes.reading import raw_recipe
from ..recipes.schema import TRAINING_AXES, AttackConfig, DefenceConfig, EvaluationConfig, Open, Recipe
from ..registry import Registry
from ..training.arguments import ATTACK_DEFAULTS, DEFENCE_DEFAULTS, train_errors
from .identity import options_of

_HOME = re.compile(r"(?P<kind>([A-Za-z]\w+:)?)(?P<path>~(/.*)?)")


def resolve(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and check all of it, plug-ins and their options included.

    Raises:
        ConfigError: with every error, one line each.
    """
    raw = _at_home(raw_recipe(name, overrides))
    recipe, errors = check_recipe(raw)
    errors = [*errors, *_plugin_errors(raw), *_revision_errors(recipe)]
    if errors or recipe is None:
        lines = "\n  ".join(errors)
        raise ConfigError(
            f"the recipe {name} has {len(errors)} error{'s' if len(errors) != 1 else ''}:\n  {lines}\n"
            "Mend them and run again; `repnoise recipes show sandbox` prints one that is right."
        )
    return recipe


def _at_home(value: Any) -> Any:
    """Data with `~` in every path spelled out, also in that of a source (`beavertails:~/rows`)."""
    if isinstance(value, dict):
        return {key: _at_home(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    found = _HOME.fullmatch(value) if isinstance(value, str) else None
    return value if found is None else found["kind"] + os.path.expanduser(found["path"])


def _revision_errors(recipe: Recipe | None) -> Iterator[str]:
    if recipe is not None and recipe.revision is not None and Path(recipe.model).exists():
        yield f"revision: {recipe.model} is a folder on this machine and has none. Drop it, or give a hub id as model."


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
        except OptionsError as error:
            yield from (f"{where}.{line}" for line in error.lines)
        except ConfigError as error:
            yield f"{where}: {error}"
    train = values.get("train") if "train" in ours else None
    if isinstance(train, dict):
        yield from train_errors(train, f"{where}.train")


def written_out(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default in it, those of plug-ins and training too: itself a recipe, of the
    same results.
    """
    found = dump(recipe)
    defence = recipe.defence
    found["defence"] |= options_of(DEFENCES.build(defence.name, defence.options))
    found["defence"]["train"] = {**_given(DEFENCE_DEFAULTS), **defence.train}
    for attack, entry in zip(recipe.attacks, found["attacks"], strict=True):
        axes = {axis: entry[axis] for axis in AttackConfig.model_fields}
        entry |= options_of(ATTACKS.build(attack.name, attack.options)) | axes
        for axis, name in TRAINING_AXES.items():
            if name in ATTACK_DEFAULTS:
                entry[axis] = [ATTACK_DEFAULTS[name] if value is None else value for value in entry[axis]]
        further = {key: value for key, value in ATTACK_DEFAULTS.items() if key not in TRAINING_AXES.values()}
        entry["train"] = {**_given(further), **attack.train}
    for evaluation, entry in zip(recipe.evaluations, found["evaluations"], strict=True):
        entry |= options_of(EVALUATIONS.build(evaluation.name, evaluation.options))
    return found


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
