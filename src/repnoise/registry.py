"""Named plug-ins: one file per defence, attack, evaluation or judge, found without a list kept by hand.

Options of a plug-in are fields of a dataclass, checked against their annotations (`Checked`).

A registry looks in two places, both only when it is first asked: the modules of one package of ours, and the
entry points of installed third-party packages (group `repnoise.defences`, and so on).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, get_type_hints

from .errors import ConfigError, OptionsError, explain, suggest, unknown_key

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Maps names to classes derived from `base`.

    Args:
        kind: the word used in messages ("defence").
        package: dotted name of the package whose modules register themselves when imported.
        base: every registered class must derive from it.
    """

    def __init__(self, kind: str, package: str, base: type[T]) -> None:
        self.kind, self.package, self.base = kind, package, base
        self._classes: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator. Raises `ConfigError` if the name is taken or the class has the wrong base."""

        def add(cls: C) -> C:
            if not issubclass(cls, self.base):
                raise ConfigError(
                    f"{self.kind} {name!r}: {cls.__qualname__} does not derive from {self.base.__name__}."
                    f" Make it a subclass of {self.base.__module__}.{self.base.__qualname__}."
                )
            taken = self._classes.get(name)
            if taken is not None and taken.__qualname__ != cls.__qualname__:
                raise ConfigError(
                    f"{self.kind} {name!r} is registered twice: {taken.__module__} and {cls.__module__}."
                    " Rename one of them."
                )
            self._classes[name] = cls
            return cls  # type: ignore[return-value]  # issubclass has narrowed it

        return add

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # first, so that a plug-in that asks the registry while it loads does not recurse
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, self.package + "."):
            importlib.import_module(module.name)
        for entry in entry_points(group=self.package):
            self.register(entry.name)(entry.load())

    def names(self) -> list[str]:
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class called `name`. Raises `ConfigError` with the nearest names otherwise."""
        self._load()
        if name in self._classes:
            return self._classes[name]
        hint = suggest(name, self._classes)
        raise ConfigError(f"unknown {self.kind} {name!r}.{hint} Available: {', '.join(self.names())}.")

    def fields(self, name: str) -> list[str]:
        """Names of the options of the class called `name`."""
        cls = self.get(name)
        return [field.name for field in dataclasses.fields(cls) if field.init] if dataclasses.is_dataclass(cls) else []

    def build(self, name: str, options: Mapping[str, Any]) -> T:
        """The plug-in `name` with these options, each checked against the annotation of its field.

        Raises:
            ConfigError: an unknown plug-in or option, options that contradict each other; `OptionsError` for values of
                the wrong type or beyond their range.
        """
        cls, known = self.get(name), self.fields(name)
        for key in options:
            if key not in known:
                raise ConfigError(f"{self.kind} {name!r}, {key}: {unknown_key(key, known)}")
        return cls(**checked(cls, options)) if dataclasses.is_dataclass(cls) else cls()


class Checked:
    """Base of dataclasses whose fields are options: built in Python or from a recipe, they are checked alike.

    A range is declared where the field is (`alpha: Positive = 1.0`); `__post_init__` of a subclass says what no single
    field can say, after `super().__post_init__()`.
    """

    def __post_init__(self) -> None:
        for name, value in checked(type(self), vars(self)).items():
            object.__setattr__(self, name, value)  # frozen ones, too


def checked(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of the dataclass `cls`, as their annotations have them (1e-3 for "1e-3").

    Raises:
        OptionsError: with a line for each wrong value and for each field without a default that has none.
    """
    from pydantic import ValidationError  # here, since --help needs registries and not pydantic

    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    lines, right = [], {}
    for name, adapter in _adapters(cls).items():
        if name in values:
            try:
                right[name] = adapter.validate_python(values[name])
            except ValidationError as error:
                lines += explain(error, name)
        elif fields[name].default is fields[name].default_factory:  # both MISSING
            lines.append(f"{name}: is required and not there")
    if lines:
        raise OptionsError(f"{cls.__name__}: {'; '.join(lines)}", lines)
    return right


@functools.cache
def _adapters(cls: type) -> dict[str, Any]:
    """Field -> what validates it."""
    from pydantic import TypeAdapter

    hints = get_type_hints(cls, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(cls) if field.init}
