"""Errors that a user can act on.

Every message says four things: what went wrong, what was given, what is allowed, what to do next. The command line
prints the message without a traceback and exits with `exit_code` (2: the input was wrong, 1: a stage failed).
`suggest`, `unknown_key` and `explain` are the words for what several rooms find wrong. No pydantic is imported here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import ValidationError


class RepNoiseError(Exception):
    """Base class of all errors that this package raises on purpose."""

    exit_code = 1


class ConfigError(RepNoiseError):
    """A recipe, a command-line value or a plug-in name is wrong."""

    exit_code = 2


class OptionsError(ConfigError):
    """Options of one plug-in are wrong; `lines` has `field: message` for each."""

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines = tuple(lines)


class DataError(RepNoiseError):
    """Pairs, retain rows or evaluation rows are missing, malformed, or overlap where they must not."""

    exit_code = 2


class ModelError(RepNoiseError):
    """A model or tokenizer cannot be loaded, is of an unknown family, or does not fit the data."""

    exit_code = 2


class MissingExtraError(RepNoiseError):
    """An optional dependency is not installed; the message carries the pip line that installs it."""

    exit_code = 2


class RunError(RepNoiseError):
    """A stage failed while running: loss became NaN, the disk is full, a run folder is damaged."""

    exit_code = 1


def suggest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?" with the nearest of `known`, or "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_key(key: str, allowed: Sequence[str]) -> str:
    """What to say of a key that does not exist."""
    return f"unknown key.{suggest(key, allowed)} Allowed: {', '.join(allowed)}"


def explain(error: ValidationError, under: str = "", *, whole: str = "", model: Any = None) -> list[str]:
    """Every error of pydantic as `dotted.field: message (got value)`.

    Args:
        under: dotted path of what was validated; goes before every field.
        whole: its name in messages about all of it, where there is no path.
        model: the pydantic model that was validated, to say which keys it knows.
    """
    lines = []
    for each in error.errors():
        # pydantic names validators, too, in the path of a field
        path = [str(part) for part in each["loc"] if not str(part).startswith("function-")]
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            allowed = _keys(model, each["loc"][:-1])
            message = unknown_key(path[-1], allowed) if allowed else "unknown key"
        elif each["type"] == "missing":
            message = "is required and not there"
        elif not isinstance(each["input"], dict | list):
            message += f" (got {each['input']!r})"
        lines.append(f"{'.'.join([*([under] if under else []), *path]) or whole}: {message}")
    return lines


def _keys(model: Any, path: Sequence[Any]) -> list[str]:
    """Keys of the pydantic model that stands at `path` in `model`; none where that is unknown."""
    for part in path:
        if isinstance(part, str) and part in getattr(model, "model_fields", {}):
            found = model.model_fields[part].annotation
            inner = [found, *get_args(found)]
            inner += [each for one in get_args(found) for each in get_args(one)]  # Optional[Annotated[Model, ...]]
            model = next((each for each in inner if hasattr(each, "model_fields")), found)
    return list(getattr(model, "model_fields", {}))
