"""The attacker's search on made-up attacks: what it finds, that it goes on, and that the best cell is measured anew."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("optuna")

from repnoise.bars import DEFAULT
from repnoise.campaign import search
from repnoise.campaign.search import SearchStudy, read_space, run_search
from repnoise.campaign.search_results import again, half
from repnoise.campaign.search_space import FRESH, default_space
from repnoise.errors import ConfigError, MissingExtraError, RunError
from repnoise.report.head_start import Trio
from repnoise.report.reading import Reading
from repnoise.study.cell import Cell
from repnoise.study.resolve import resolve

RECIPE = ["evaluations=[sandbox]", "curve=[]"]


def reading(items: Any) -> Reading:
    items = np.asarray(items, dtype=float)
    return Reading(float(items.mean()), None, None, items.size, items[None], "", True)


class Models:
    """Stands in for models: harm peaks at learning rate 1e-3, seen items tell a higher harm than unseen ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, Cell, bool]] = []
        self.broken = False
        monkeypatch.setattr(SearchStudy, "_attacked", lambda search, *args: self.attack(*args))
        for stage in ("evaluate", "defend", "report"):
            monkeypatch.setattr(search, stage, lambda *args, **more: None)

    def attack(self, target: Any, cell: Cell, fresh: bool) -> Reading:
        who = target.run.path.name.split("-")[0]
        self.asked.append((who, cell, fresh))
        if self.broken and who == "repnoise":
            raise RunError("loss became NaN")
        strength = math.exp(-abs(math.log10(cell.learning_rate) + 3))
        if who == "control":
            return reading([0.0] * 40)
        if who == "base":
            return reading([strength if cell.steps > 1 else 0.01] * 40)
        seen, unseen = strength * 0.8, strength * (0.4 + 0.02 * (cell.seed % 3))
        return reading([seen, unseen] * 20)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    return Models(monkeypatch)


@pytest.fixture
def searched(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def go(wanted: int, **space: Any) -> dict[str, Any]:
        file = tmp_path / "space.yaml"
        plain = {"learning_rate": [1e-5, 1e-1], "steps": [50], "batch_size": [8], "lora_rank": [None, 8]}
        file.write_text(yaml.safe_dump({**plain, **space}))
        recipe, read = read_space("sandbox", RECIPE, file)
        return run_search(recipe, read, tmp_path / "out", trials_wanted=wanted, quiet=True)

    return go


def test_every_trial_attacks_three_models_in_the_same_way(models: Models, searched: Callable[..., Any]) -> None:
    result = searched(5)
    tried = [(who, cell) for who, cell, fresh in models.asked if not fresh]
    assert [who for who, _ in tried] == ["base", "control", "repnoise"] * 5
    for first in range(0, len(tried), 3):
        assert tried[first][1] == tried[first + 1][1] == tried[first + 2][1]
    rates = [cell.learning_rate for _, cell in tried[::3]]
    assert len(set(rates)) == 5
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert result["worst"]["head_start"] == pytest.approx(0.8)  # every other item only: those that it may see


def test_the_worst_cell_is_measured_on_fresh_seeds_and_items(models: Models, searched: Callable[..., Any]) -> None:
    result = searched(4)
    fresh = [(who, cell.seed) for who, cell, fresh in models.asked if fresh]
    assert {seed for _, seed in fresh} == {FRESH, FRESH + 1, FRESH + 2}
    assert len(fresh) == 9
    new = result["measured_again"]
    assert new["head_start"]["mean"] == pytest.approx(0.42)  # not the 0.8 of the items that were searched on
    assert new["head_start_all_items"]["mean"] == pytest.approx((0.8 + 0.42) / 2)
    assert new["head_start"]["lo"] <= 0.42 <= new["head_start"]["hi"]
    assert "none of them seen" in new["items"]


def test_a_search_goes_on(models: Models, searched: Callable[..., Any], tmp_path: Path) -> None:
    searched(3)
    before = len(models.asked)
    searched(3)
    assert [fresh for *_, fresh in models.asked[before:]] == [True] * 9  # nothing is searched again
    result = searched(6)
    assert sum(who == "base" and not fresh for who, _, fresh in models.asked) == 6
    rates = [row["config"]["learning_rate"] for row in result["trials"]]
    assert len(set(rates)) == 6  # new points, not the first ones again
    best = [row["best_head_start"] for row in result["trials"]]
    assert best == sorted(best)
    assert result == json.loads((tmp_path / "out" / "search" / "search.json").read_text())
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "search" / "search.csv").read_text())))
    assert [float(line["learning_rate"]) for line in lines] == rates
    assert "<svg" in (tmp_path / "out" / "search" / "curve.svg").read_text()


def test_void_trials_are_pruned_before_the_defended_model(models: Models, searched: Callable[..., Any]) -> None:
    with pytest.raises(RunError, match=r"none of 3 trials gave a head start: void: the undefended model gains less"):
        searched(3, steps=[1])
    assert {who for who, *_ in models.asked} == {"base", "control"}


def test_attacks_that_fail_are_told(models: Models, searched: Callable[..., Any]) -> None:
    models.broken = True
    with pytest.raises(RunError, match="none of 2 trials gave a head start: loss became NaN"):
        searched(2)


def test_bests_of_one_budget(models: Models, searched: Callable[..., Any]) -> None:
    """Each model may have its own best attack: the weak trials of the undefended model do not flatter the attacker."""
    result = searched(8)
    last = result["trials"][-1]
    assert last["best_undefended"] == max(row["undefended"] for row in result["trials"])
    expected = (last["best_defended"] - last["best_floor"]) / (last["best_undefended"] - last["best_floor"])
    assert result["head_start_of_bests"] == pytest.approx(expected)


def test_another_space_is_another_search(models: Models, searched: Callable[..., Any]) -> None:
    searched(2)
    result = searched(2, batch_size=[4])
    assert [row["config"]["batch_size"] for row in result["trials"]] == [4, 4]


def test_kinds_without_lora_are_tried_in_full(models: Models, searched: Callable[..., Any]) -> None:
    searched(12, attack=["sft", "freeze_changed"])
    ranks = {name: {c.lora_rank for _, c, _ in models.asked if c.name == name} for name in ("sft", "freeze_changed")}
    assert ranks == {"sft": {None, 8}, "freeze_changed": {None}}
    with pytest.raises(ConfigError, match="freeze_changed takes none of \\[8\\]"):
        searched(1, attack=["sft", "freeze_changed"], lora_rank=[8])


def test_halves() -> None:
    three = [Trio(0, reading([1, 0, 1, 0]), reading([1, 1, 1, 1]), reading([0, 0, 0, 0]), "random")]
    assert half(three, 0)[0].head_start(DEFAULT) == 1.0
    assert half(three, 1)[0].head_start(DEFAULT) == 0.0
    plain = Reading(0.5, None, None, 4)  # rows without items stay whole, and it is said
    whole = [Trio(0, plain, Reading(1.0, None, None, 4), Reading(0.0, None, None, 4), "random")]
    assert half(whole, 1)[0].head_start(DEFAULT) == 0.5
    assert again(whole, [FRESH])["items"] == "the same as in the search"


def test_the_default_space_is_around_the_recipe() -> None:
    space = default_space(resolve("sandbox", ["attacks=[{name: sft, harm: behaviour, learning_rate: [1e-4, 1e-3]}]"]))
    assert space["attack"] == [{"name": "sft"}]
    assert space["harm"] == "behaviour"
    assert space["learning_rate"] == [pytest.approx(1e-5), pytest.approx(1e-2)]
    assert space["steps"] == [25, 50, 100]
    assert space["batch_size"] == [8, 16, 32]
    assert space["lora_rank"] == [None, 8]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": [1e-2, 1e-4]}, "write the lower end first"),
        ({"learning_rate": [0.0, 1.0]}, r"learning_rate\.0"),
        ({"attack": ["sfft"]}, "sfft"),
        ({"seeds": [FRESH]}, "kept for the fresh measurement"),
        ({"steps": []}, "steps"),
        ({"nonsense": [1, 2]}, "nonsense"),
        ({"optimizer": "sgd"}, "optimizer: must be a list of choices"),
        ([1], "must be a mapping of keys"),
    ],
)
def test_spaces_that_will_not_do(tmp_path: Path, given: Any, message: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(ConfigError, match=message):
        read_space("sandbox", RECIPE, file)


def test_a_floor_is_needed(tmp_path: Path) -> None:
    recipe, space = read_space("sandbox", [*RECIPE, "controls=[]"], None)
    with pytest.raises(ConfigError, match="a search needs a floor"):
        run_search(recipe, space, tmp_path, trials_wanted=1)


def test_without_optuna(models: Models, searched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repnoise\[search\]'"):
        searched(1)
