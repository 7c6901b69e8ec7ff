"""From plain data to a checked recipe, with every error at its dotted field; and back."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ..errors import explain
from .schema import Recipe


def check_recipe(raw: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    """The recipe, or None and every structural error as `dotted.field: message`."""
    try:
        return Recipe.model_validate(raw), []
    except ValidationError as error:
        return None, explain(error, whole="recipe", model=Recipe)


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default written out."""
    return recipe.model_dump(mode="json")
