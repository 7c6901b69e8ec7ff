"""Sweep files: a recipe, several defences, the attacks that all of them face. Every error at once.

sweep: mine
recipe: sandbox                      # a shipped recipe, or a file beside this one
overrides: [seed=1]                  # changes to the recipe, as on the command line
attacks: [{name: sft, learning_rate: [3e-4, 1e-3], steps: 100, seeds: [0, 1, 2]}]
budget: {steps: 700}                 # optional; who used more is marked in the table
defences:
  - {label: deep, from: sandbox}     # the defence of another recipe, with changes beside it
  - {label: mild, from: sandbox, alpha: 0.5, train: {max_steps: 100}}
  - {label: theirs, defended: folder-or-hub-id}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from ..errors import ConfigError, explain, suggest
from ..recipes.reading import RECIPES, raw_recipe, recipe_names
from ..recipes.schema import Open, Recipe, Strict
from ..study.resolve import resolve

SWEEPS = RECIPES / "sweeps"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Entry(Open):
    """One defence of a sweep; keys that are not listed here are its options."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)
    label: Name | None = None
    """Its name in the table; needed where one defence comes in several settings. Default: the name."""
    name: str | None = None
    base: str | None = Field(default=None, alias="from")
    """A recipe whose `defence` is the starting point."""
    train: dict[str, Any] = Field(default_factory=dict)
    defended: str | None = None
    """A model that was defended elsewhere, instead of a defence."""

    @model_validator(mode="after")
    def _one_origin(self) -> Entry:
        if self.defended is not None:
            if self.name or self.base or self.train or self.options:
                raise ValueError("a given model (defended) is taken as it is; drop every other key but label")
            if self.label is None:
                raise ValueError("a given model (defended) needs a label")
        elif self.name is None and self.base is None:
            raise ValueError("give the name of a defence, `from: RECIPE`, or `defended: MODEL`")
        return self


class Budget(Strict):
    """What a defence may use; more is marked in the table. Default: what the median defence used."""

    steps: Annotated[int, Field(ge=1)] | None = None
    examples: Annotated[int, Field(ge=1)] | None = None
    """Pairs shown to the model, repetitions counted: steps times batch size."""


class SweepFile(Strict):
    """The sweep as it is written."""

    sweep: Name
    about: str = ""
    recipe: str
    overrides: list[str] = Field(default_factory=list)
    attacks: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    budget: Budget = Budget()
    defences: Annotated[list[Entry], Field(min_length=1)]


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: one recipe for each label, equal but for the defence."""

    name: str
    about: str
    base: str
    recipes: dict[str, Recipe]
    budget: dict[str, int | None] = field(default_factory=dict)


# ---- reading ----------------------------------------------------------------------------------------------


def sweep_names() -> list[str]:
    """Names of the sweeps that ship with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in SWEEPS.iterdir() if entry.name.endswith(".yaml"))


def read_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Load a sweep, shipped or a .yaml file, and check all of it.

    Args:
        overrides: `dotted.key=value`; keys of the sweep file (`defences.0.beta=1`) change it, all others the recipe.

    Raises:
        ConfigError: with every error, one line each.
    """
    path = _file(name)
    written = raw_recipe(str(path))
    ours = [each for each in overrides if _is_ours(each, written)]
    raw = raw_recipe(str(path), ours)
    try:
        file = SweepFile.model_validate(raw)
    except ValidationError as error:
        raise _refused(name, explain(error, whole="sweep", model=SweepFile)) from error
    base = _beside(file.recipe, path)
    shared = [*file.overrides, *(each for each in overrides if each not in ours)]
    if file.attacks is not None:
        shared.append(f"attacks={json.dumps(file.attacks)}")
    errors: list[str] = []
    recipes: dict[str, Recipe] = {}
    for index, entry in enumerate(file.defences):
        where = f"defences.{index}"
        try:
            label, change = _defence(entry, path)
            recipe = resolve(base, [*shared, change])
        except ConfigError as error:
            errors += [line for line in _lines(error, where) if line not in errors]
            continue
        if label in recipes:
            errors.append(f"{where}: {label} is there twice; give each a label of its own")
        same = [other for other, known in recipes.items() if known == recipe]
        if same:
            errors.append(f"{where}: {label} has the same settings as {same[0]}; change one or drop it")
        recipes[label] = recipe
    taken = sorted({"base", "control-ignorant", "control-random"} & set(recipes))
    if taken:
        errors.append(f"defences: {', '.join(taken)} has a meaning of its own; choose another label")
    if errors:
        raise _refused(name, errors)
    return Sweep(file.sweep, file.about, file.recipe, recipes, file.budget.model_dump())


def _file(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"there is no sweep file {name}. Shipped sweeps: {', '.join(sweep_names())}.")
        return path
    if name not in sweep_names():
        known = sweep_names()
        raise ConfigError(
            f"there is no sweep {name!r}.{suggest(name, known)} Shipped: {', '.join(known)}."
            " A file of your own ends in .yaml."
        )
    return Path(str(SWEEPS / f"{name}.yaml"))


def _is_ours(override: str, raw: dict[str, Any]) -> bool:
    first = override.partition("=")[0].split(".")[0]
    return first in SweepFile.model_fields and (first != "attacks" or raw.get("attacks") is not None)


def _beside(recipe: str, sweep: Path) -> str:
    """A recipe file is looked for beside the sweep file first."""
    near = sweep.parent / recipe
    return str(near) if recipe not in recipe_names() and near.is_file() else recipe


def _defence(entry: Entry, path: Path) -> tuple[str, str]:
    """The label, and the override that puts this defence into the recipe."""
    if entry.defended is not None:
        return str(entry.label), f"defended={json.dumps(entry.defended)}"
    values: dict[str, Any] = {}
    if entry.base is not None:
        found = raw_recipe(_beside(entry.base, path)).get("defence")
        values = dict(found) if isinstance(found, dict) else {}
        if entry.name is not None and entry.name != values.get("name", "repnoise"):
            raise ConfigError(f"name: {entry.name} is not the defence of {entry.base}; drop `name` or `from`")
    values.update(entry.options)
    values["train"] = {**(values.get("train") or {}), **entry.train}
    values["name"] = entry.name or values.get("name", "repnoise")
    return entry.label or str(values["name"]), f"defence={json.dumps(values)}"


def _lines(error: ConfigError, where: str) -> list[str]:
    """The single errors of a recipe that was refused, those of the defence under their place in the sweep."""
    lines = [line[2:] for line in str(error).splitlines() if line.startswith("  ")]
    if not lines:
        return [f"{where}: {error}"]
    ours = ("defence.", "defence:")
    return [where + line.removeprefix("defence") if line.startswith(ours) else line for line in lines]


def _refused(name: str, errors: Sequence[str]) -> ConfigError:
    lines = "\n  ".join(errors)
    return ConfigError(
        f"the sweep {name} has {len(errors)} error{'s' if len(errors) != 1 else ''}:\n  {lines}\n"
        "Mend them and run again; docs/comparison.md shows one that is right."
    )
