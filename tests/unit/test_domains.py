"""A defence on some categories of its pairs only: what the cross-domain table is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from repnoise.campaign.sweep_file import read_sweep
from repnoise.errors import ConfigError
from repnoise.report.comparison import cost_of
from repnoise.report.reading import load
from repnoise.study import defending
from repnoise.study.resolve import resolve
from repnoise.study.study import Study

torch.set_num_threads(1)

SHORT = ["defence.train.max_steps=1", "defence.train.per_device_train_batch_size=2", "evaluations=[loss]"]


def test_the_defence_sees_its_categories_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    given = defending.ObjectiveTrainer
    monkeypatch.setattr(defending, "evaluate", lambda *args: None)
    for name, changes in (("all", []), ("insults", ["defence.categories=insult"])):
        monkeypatch.setattr(
            defending,
            "ObjectiveTrainer",
            lambda name=name, **more: seen.update({name: more["train_dataset"]}) or given(**more),
        )
        defending.defend(Study(resolve("sandbox", [*SHORT, *changes]), tmp_path, quiet=True))
    assert {pair.category for pair in seen["insults"]} == {"insult"}
    assert len(seen["all"]) == 610
    costs = {cost_of(model).pairs for model in load(tmp_path, rows=False).defences}
    assert costs == {610, 160}  # two folders: a defence of other categories is another one
    assert set(Study(resolve("sandbox", ["defence.categories=insult"]), tmp_path).data.attacks) >= {"knowledge"}


@pytest.mark.parametrize("wrong", ["[insult, insults]", "[]"])
def test_categories_that_are_not_there(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"defence\.categories: .*Categories there: currents, insult"):
        _ = Study(resolve("sandbox", [f"defence.categories={wrong}"]), tmp_path).data


def test_the_shipped_matrix_covers_all_pairs() -> None:
    recipes = read_sweep("sandbox-domains").recipes
    named = [category for recipe in recipes.values() for category in recipe.defence.categories or []]
    data = Study(resolve("sandbox"), Path("unused")).data
    assert sorted(named) == sorted({pair.category for pair in data.defence if pair.category})
