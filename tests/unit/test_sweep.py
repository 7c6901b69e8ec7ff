"""Sweep files: what is read, how it is overridden, every error at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from repnoise.campaign.sweep_file import read_sweep, sweep_names
from repnoise.errors import ConfigError
from repnoise.study.resolve import resolve

ATTACKS = [{"name": "sft", "harm": "knowledge", "learning_rate": [1e-3], "steps": 2, "seeds": [0]}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def make(defences: Any, **more: Any) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"sweep": "mine", "recipe": "sandbox", "defences": defences, **more}))
        return str(path)

    return make


@pytest.mark.parametrize("name", sweep_names())
def test_shipped_sweeps_are_right(name: str) -> None:
    sweep = read_sweep(name)
    assert len(sweep.recipes) >= 2
    shared = [recipe.model_copy(update={"defence": None}) for recipe in sweep.recipes.values()]
    assert all(each == shared[0] for each in shared)


def test_all_defences_meet_the_same_attacks(write: Callable[..., str]) -> None:
    deep = {"label": "deep", "from": "sandbox", "alpha": 0.5, "train": {"max_steps": 7}}
    sweep = read_sweep(write([deep, {"name": "repnoise", "beta": 0.1}], attacks=ATTACKS, overrides=["seed=3"]))
    assert list(sweep.recipes) == ["deep", "repnoise"]
    first, second = sweep.recipes.values()
    known = resolve("sandbox").defence
    assert first.defence.options == {**known.options, "alpha": 0.5}
    assert first.defence.train == {**known.train, "max_steps": 7}
    assert second.defence.options == {"beta": 0.1}
    assert first.attacks == second.attacks
    assert [attack.steps for attack in first.attacks] == [[2]]
    assert first.seed == second.seed == 3


def test_overrides_reach_the_sweep_or_the_recipe(write: Callable[..., str]) -> None:
    defences = [{"label": "a", "name": "repnoise"}, {"label": "b", "name": "repnoise", "beta": 0.1}]
    changed = ["defences.1.beta=0.9", "seed=5", "attacks.0.steps=9", "budget.steps=4"]
    own = read_sweep(write(defences, attacks=ATTACKS), changed)
    assert own.recipes["b"].defence.options == {"beta": 0.9}
    assert own.budget["steps"] == 4
    assert {recipe.seed for recipe in own.recipes.values()} == {5}
    assert {attack.steps[0] for recipe in own.recipes.values() for attack in recipe.attacks} == {9}
    base = read_sweep(write(defences), ["attacks.0.steps=9"])  # the recipe's attacks, for there are no others
    assert base.recipes["a"].attacks[0].steps == [9]
    assert len(base.recipes["a"].attacks) == 2


def test_a_given_model_is_no_defence(write: Callable[..., str]) -> None:
    sweep = read_sweep(write([{"name": "repnoise"}, {"label": "theirs", "defended": "some/model"}]))
    assert sweep.recipes["theirs"].defended == "some/model"
    with pytest.raises(ConfigError, match=r"drop every other key but label"):
        read_sweep(write([{"label": "x", "defended": "some/model", "name": "repnoise"}]))
    with pytest.raises(ConfigError, match=r"defences\.0: .*needs a label"):
        read_sweep(write([{"defended": "some/model"}]))


def test_a_recipe_beside_the_sweep(write: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("study: own\nmodel: sandbox:aligned\ncontrols: [ignorant]\n")
    sweep = read_sweep(write([{"name": "repnoise"}], recipe="base.yaml"))
    assert sweep.recipes["repnoise"].study == "own"


def test_every_error_at_once(write: Callable[..., str]) -> None:
    defences = [
        {"name": "repnoise", "alhpa": 1.0},
        {"label": "b", "name": "repnoise", "beta": -1.0, "train": {"max_stepz": 3}},
        {"label": "c", "from": "sandbox", "name": "another"},
    ]
    with pytest.raises(ConfigError) as caught:
        read_sweep(write(defences, attacks=[{"name": "sfft"}]))
    text = str(caught.value)
    assert "defences.0.alhpa: unknown" in text.lower() or "defences.0.alhpa" in text
    assert "defences.1" in text
    assert "defences.1.beta: Input should be greater than or equal to 0 (got -1.0)" in text
    assert "defences.1.train.max_stepz" in text
    assert "defences.2: name: another is not the defence of sandbox" in text
    assert text.count("sfft") == 1  # an error of the recipe stands there once, not once for each defence


@pytest.mark.parametrize(
    ("defences", "message"),
    [
        ([{"name": "repnoise"}, {"name": "repnoise", "beta": 0.1}], r"repnoise is there twice; give each a label"),
        ([{"name": "repnoise"}, {"label": "b", "name": "repnoise"}], r"b has the same settings as repnoise"),
        ([{"label": "base", "name": "repnoise"}], r"base has a meaning of its own"),
        ([{"label": "a/b", "name": "repnoise"}], r"defences\.0\.label"),
        ([{"label": "a"}], r"give the name of a defence, `from: RECIPE`, or `defended: MODEL`"),
        ([], r"defences: List should have at least 1 item"),
    ],
)
def test_what_cannot_be_compared(write: Callable[..., str], defences: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sweep(write(defences))


def test_unknown_names(write: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=r"no sweep 'sandbox-comparisn'\. Did you mean 'sandbox-comparison'\?"):
        read_sweep("sandbox-comparisn")
    with pytest.raises(ConfigError, match=r"there is no sweep file nowhere\.yaml"):
        read_sweep("nowhere.yaml")
    with pytest.raises(ConfigError, match=r"defenses: .*defences"):
        read_sweep(write([{"name": "repnoise"}], defenses=[]))
    with pytest.raises(ConfigError, match=r"budget\.stepz"):
        read_sweep(write([{"name": "repnoise"}], budget={"stepz": 1}))
