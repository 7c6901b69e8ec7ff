"""What an attacker's search may vary: kinds of attack and their axes. Checked as a whole before any trial."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ..attacks import ATTACKS
from ..errors import ConfigError, explain
from ..recipes.reading import parse_yaml
from ..recipes.schema import Open, Recipe
from ..report.cells import FRESH
from ..study.resolve import resolve

AXES = ("learning_rate", "steps", "batch_size", "lora_rank")


class Space(Open):
    """What the attacker may vary. Further keys are axes of an attack (`optimizer: [adamw_torch, sgd]`), each a list."""

    attack: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    """Kinds: a name, or a name with options, `{name: mixed, poison: 0.1}`."""
    harm: str
    learning_rate: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=2)]
    """[least, most], drawn on a logarithmic scale; one value fixes it."""
    steps: Annotated[list[int], Field(min_length=1)]
    batch_size: Annotated[list[int], Field(min_length=1)]
    lora_rank: Annotated[list[int | None], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)] = [0]  # noqa: RUF012
    """Seeds of one trial; its head start is their mean."""
    seed: int = 0
    """Of the sampler."""

    @model_validator(mode="after")
    def _plain(self) -> Space:
        if len(self.learning_rate) == 2 and self.learning_rate[0] > self.learning_rate[1]:
            raise ValueError("learning_rate: write the lower end first")
        wrong = [key for key, value in self.options.items() if not isinstance(value, list) or not value]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: must be a list of choices with one value at least")
        if any(seed >= FRESH for seed in self.seeds):
            raise ValueError(f"seeds: {FRESH} and above are kept for the fresh measurement")
        return self

    def kinds(self) -> dict[str, dict[str, Any]]:
        """In words -> name and options."""
        named = [{"name": kind} if isinstance(kind, str) else kind for kind in self.attack]
        return {" ".join([str(k.get("name")), *(f"{o}={v}" for o, v in k.items() if o != "name")]): k for k in named}

    def ranks(self, kind: dict[str, Any]) -> list[int | None]:
        """Those of `lora_rank` that the kind takes: some attacks choose for themselves which weights they train."""
        options = {key: value for key, value in kind.items() if key != "name"}

        def takes(rank: int | None) -> bool:
            try:
                ATTACKS.build(kind["name"], {**options, "lora_rank": rank})
            except ConfigError:
                return False
            return True

        return [rank for rank in self.lora_rank if takes(rank)]

    def config(self, kind: dict[str, Any], seeds: Sequence[int], **axes: Any) -> dict[str, Any]:
        return {**kind, "harm": self.harm, **axes, "seeds": list(seeds)}


def default_space(recipe: Recipe) -> dict[str, Any]:
    """The recipe's attacks with room around them: rates by a factor of ten, fewer steps, half and double batches."""
    rates = [rate for attack in recipe.attacks for rate in attack.learning_rate]
    steps = [n for attack in recipe.attacks for n in attack.steps if n > 0] or [100]
    batches = {size for attack in recipe.attacks for size in attack.batch_size}
    ranks = {rank for attack in recipe.attacks for rank in attack.lora_rank if rank is not None} or {8}
    kinds = [{"name": attack.name, **attack.options} for attack in recipe.attacks]
    harms = [harm for attack in recipe.attacks for harm in attack.harm or []]
    sizes = batches | {size // 2 for size in batches if size > 1} | {size * 2 for size in batches}
    return {
        "attack": [kind for index, kind in enumerate(kinds) if kind not in kinds[:index]],
        "harm": harms[0] if harms else "knowledge" if recipe.data.name == "sandbox" else "harmful",
        "learning_rate": [min(rates) / 10, max(rates) * 10],
        "steps": sorted({*steps, *(max(1, n // 2) for n in steps), *(max(1, n // 4) for n in steps)}),
        "batch_size": sorted(sizes),
        "lora_rank": [None, *sorted(ranks)],
    }


def read_space(recipe_name: str, overrides: Sequence[str], file: Path | None) -> tuple[Recipe, Space]:
    """The recipe and the space, checked together, so that no trial stumbles over an option.

    Args:
        file: YAML with the keys of `Space`; what it leaves out comes from the recipe's attacks. None: all of it.

    Raises:
        ConfigError: with every error, one line each.
    """
    recipe = resolve(recipe_name, overrides)
    raw = default_space(recipe)
    if file is not None:
        try:
            given = parse_yaml(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the search space {file}: {error}") from error
        if not isinstance(given, dict):
            raise ConfigError(f"the search space {file} must be a mapping of keys, got {type(given).__name__}.")
        raw.update(given)
    try:
        space = Space.model_validate(raw)
    except ValidationError as error:
        lines = explain(error, whole="space", model=Space)
        raise ConfigError(
            "the search space has errors:\n  " + "\n  ".join(lines) + "\nSee `repnoise search --help`."
        ) from error
    axes = {key: getattr(space, key) for key in AXES} | space.options
    grid = [space.config(kind, space.seeds, **axes) for kind in space.kinds().values()]
    resolve(recipe_name, [*overrides, f"attacks={json.dumps(grid)}"])
    without = [words for words, kind in space.kinds().items() if not space.ranks(kind)]
    if without:
        raise ConfigError(
            f"lora_rank: {', '.join(without)} takes none of {space.lora_rank}."
            " Add null, which is full fine-tuning, to the space."
        )
    return recipe, space
