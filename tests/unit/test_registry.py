"""Registries: names, wrong classes, collisions, entry points."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from repnoise import registry as module
from repnoise.defences import DEFENCES
from repnoise.errors import ConfigError, OptionsError
from repnoise.recipes.ranges import Weight
from repnoise.registry import Checked, Registry


class Base:
    pass


@pytest.fixture
def fruits() -> Registry[Base]:
    found: Registry[Base] = Registry("fruit", "repnoise.judges", Base)  # any package will do: it registers nothing here

    @found.register("apple")
    class Apple(Base):
        pass

    return found


def test_a_registered_class_is_found(fruits: Registry[Base]) -> None:
    assert fruits.get("apple").__name__ == "Apple"
    assert fruits.names() == ["apple"]


def test_an_unknown_name_gets_the_nearest_and_all(fruits: Registry[Base]) -> None:
    with pytest.raises(ConfigError, match=r"unknown fruit 'aple'. Did you mean 'apple'\? Available: apple"):
        fruits.get("aple")
    with pytest.raises(ConfigError, match=r"unknown fruit 'zzz'. Available: apple"):
        fruits.get("zzz")


def test_a_wrong_base_is_refused(fruits: Registry[Base]) -> None:
    with pytest.raises(ConfigError, match="does not derive from Base"):
        fruits.register("stone")(object)


def test_a_name_taken_is_refused_and_reloading_is_not(fruits: Registry[Base]) -> None:
    with pytest.raises(ConfigError, match="'apple' is registered twice"):

        @fruits.register("apple")
        class Pear(Base):
            pass

    fruits.register("apple")(fruits.get("apple"))


def test_third_parties_register_through_entry_points(fruits: Registry[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    class Plum(Base):
        pass

    monkeypatch.setattr(EntryPoint, "load", lambda self: Plum)
    seen: dict[str, Any] = {}

    def entry_points(**wanted: Any) -> list[EntryPoint]:
        seen.update(wanted)
        return [EntryPoint("plum", "elsewhere:Plum", wanted["group"])]

    monkeypatch.setattr(module, "entry_points", entry_points)
    assert fruits.get("plum") is Plum
    assert seen == {"group": "repnoise.judges"}


@dataclass(frozen=True, kw_only=True)
class Cake(Checked):
    weight: Weight
    layers: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight > 9 and not self.layers:
            raise ConfigError("heavy without layers")


def test_options_are_checked_however_the_dataclass_is_built(fruits: Registry[Base]) -> None:
    fruits.base = Cake  # type: ignore[assignment]
    fruits.register("cake")(Cake)  # type: ignore[type-var]
    for build in (lambda **given: Cake(**given), lambda **given: fruits.build("cake", given)):
        cake: Any = build(weight="1e-3", layers=[[1, 2]])
        assert (cake.weight, cake.layers) == (0.001, [(1, 2)])
        with pytest.raises(
            OptionsError, match=r"^Cake: weight: .*greater than or equal to 0 \(got -1\); layers"
        ) as caught:
            build(weight=-1, layers=3)
        assert [line.split(":")[0] for line in caught.value.lines] == ["weight", "layers"]
        with pytest.raises(ConfigError, match="heavy without layers"):
            build(weight=10)
        assert pickle.loads(pickle.dumps(caught.value)).lines == caught.value.lines  # from a worker process
    with pytest.raises(OptionsError, match="weight: is required and not there"):
        fruits.build("cake", {})
    assert pickle.loads(pickle.dumps(cake)) == cake == copy.deepcopy(cake)


def test_our_own_defence_is_found_by_its_file() -> None:
    assert "repnoise" in DEFENCES.names()
