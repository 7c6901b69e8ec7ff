"""From plain data to a checked recipe, with every error at its dotted field; and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import (
    ValidationError,
)

from ..registry import unknown_key
from .schema import Recipe


def check_recipe(raw: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    """The recipe, or None and every structural error as `dotted.field: message`."""
    try:
        return Recipe.model_validate(raw), []
    except ValidationError as error:
        return None, [_explain(each) for each in error.errors()]


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"] if "function" not in str(part)) or "recipe"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = unknown_key(str(error["loc"][-1]), _keys(error["loc"][:-1]))
    elif error["type"] == "missing":
        message = "is required and not there"
    elif not isinstance(error["input"], dict | list):
        message += f" (got {error['input']!r})"
    return f"{where}: {message}"


def _keys(path: Sequence[Any]) -> list[str]:
    """Keys of the model that stands at `path` in a recipe."""
    model: Any = Recipe
    for part in path:
        if isinstance(part, str) and part in getattr(model, "model_fields", {}):
            found = model.model_fields[part].annotation
            inner = [found, *get_args(found)]
            inner += [each for one in get_args(found) for each in get_args(one)]  # Optional[Annotated[Model, ...]]
            model = next((each for each in inner if hasattr(each, "model_fields")), found)
    return list(getattr(model, "model_fields", {}))


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default written out."""
    return recipe.model_dump(mode="json")
