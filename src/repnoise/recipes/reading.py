"""From a name or a file to plain data: YAML, shipped recipes, `dotted.key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, suggest

RECIPES = resources.files("repnoise") / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML whose 1e-4 is a number (YAML 1.1 wants 1.0e-4), and that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, or of a file. A path wins if it looks like one."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"there is no recipe file {name}. Shipped recipes: {', '.join(recipe_names())}.")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the recipe {name}: {error}") from error
    if name not in recipe_names():
        known = recipe_names()
        raise ConfigError(
            f"there is no recipe {name!r}.{suggest(name, known)} Shipped: {', '.join(known)}."
            " A file of your own ends in .yaml."
        )
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def raw_recipe(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe as plain data, with `dotted.key=value` overrides (values are YAML) applied."""
    raw = parse_yaml(recipe_text(name), name)
    if not isinstance(raw, dict):
        raise ConfigError(f"the recipe {name} must be a mapping of keys, got {type(raw).__name__}.")
    for override in overrides:
        _override(raw, override)
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"{override!r} is not an override. Write dotted.key=value, for example defence.alpha=2.")
    at: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        if isinstance(at, list) and part.isdigit() and int(part) < len(at):
            at = at[int(part)]
        elif isinstance(at, dict):
            if at.get(part) is None:
                at[part] = {}
            at = at[part]
        else:
            raise ConfigError(_dead_end(override, at, parents[:depth], part))
    parsed = parse_yaml(value, f"the value of {override!r}")
    if isinstance(at, dict):
        at[last] = parsed
    elif isinstance(at, list) and last.isdigit() and int(last) < len(at):
        at[int(last)] = parsed
    else:
        raise ConfigError(_dead_end(override, at, parents, last))


def _dead_end(override: str, at: Any, path: Sequence[str], part: str) -> str:
    where = ".".join(path)
    if isinstance(at, list):
        return f"{override!r}: {where} is a list; instead of {part!r} give a number from 0 to {len(at) - 1}."
    return f"{override!r}: {where} is a plain value and has no {part!r}. Set {where} itself."
