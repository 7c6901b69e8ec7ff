"""Named plug-ins: one file per defence, attack, evaluation or judge, found without a list kept by hand.

A registry looks in two places, both only when it is first asked: the modules of one package of ours, and the
entry points of installed third-party packages (group `repnoise.defences`, and so on).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import ConfigError

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
        near = difflib.get_close_matches(name, self._classes, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown {self.kind} {name!r}.{hint} Available: {', '.join(self.names())}.")

    def fields(self, name: str) -> list[str]:
        """Names of the options of the class called `name`."""
        cls = self.get(name)
        return [field.name for field in dataclasses.fields(cls) if field.init] if dataclasses.is_dataclass(cls) else []

    def build(self, name: str, options: Mapping[str, Any]) -> T:
        """The plug-in `name` with these options, each checked against the type of its field.

        Raises:
            ConfigError: an unknown plug-in or option.
            pydantic.ValidationError: values of the wrong type.
        """
        from pydantic import TypeAdapter  # here, since --help needs registries and not pydantic

        cls, known = self.get(name), self.fields(name)
        for key in options:
            if key not in known:  # pydantic would drop it without a word
                raise ConfigError(f"{self.kind} {name!r}, {key}: {unknown_key(key, known)}")
        if not dataclasses.is_dataclass(cls):
            return cls()
        return TypeAdapter(cls).validate_python(dict(options))


def unknown_key(key: str, allowed: Sequence[str]) -> str:
    """What to say of a key that does not exist."""
    near = difflib.get_close_matches(key, allowed, n=1)
    return f"unknown key.{f' Did you mean {near[0]!r}?' if near else ''} Allowed: {', '.join(allowed)}"
