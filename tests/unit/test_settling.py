"""What is measured again on fresh seeds, and what is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_study import FULL, write_model, write_study

from repnoise.report.cells import FRESH
from repnoise.report.reading import PLAN
from repnoise.store import files
from repnoise.store.run import Run
from repnoise.study.cell import Cell
from repnoise.study.settling import undecided, write_plan


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)


def study(path: Path, fresh_seeds: int = 6, done: frozenset[str] = frozenset()) -> Any:
    """As much of a study as `undecided` looks at, with the attacks of FULL."""

    def target(name: str) -> Any:
        return SimpleNamespace(run=Run(path / name))

    return SimpleNamespace(
        folder=path,
        recipe=SimpleNamespace(fresh_seeds=fresh_seeds),
        base=lambda: target("base"),
        controls=lambda: [target("control-random"), target("control-ignorant")],
        defended=lambda: target("repnoise-0123456789"),
        cells=lambda: [Cell.of({**settings, "seed": seed}) for settings in FULL for seed in (0, 1, 2)],
        is_attacked=lambda one, cell: one.run.path.name in done,
    )


def wide(settings: Mapping[str, Any], seed: int) -> float:
    """One cell of FULL whose seeds differ: a mean head start of 0.15."""
    return 0.05 + (0.15 + 0.1 * (seed - 1) if settings == FULL[0] else 0.01) * 0.85


def test_a_cell_that_cannot_tell_is_asked_again_on_the_models_that_a_head_start_needs(tmp_path: Path) -> None:
    write_study(tmp_path, wide, attacks=FULL)
    todo = undecided(study(tmp_path))
    assert len(todo) == 6 * 3
    assert {cell.seed for _, cell in todo} == set(range(FRESH, FRESH + 6))
    assert {cell.recorded()["learning_rate"] for _, cell in todo} == {FULL[0]["learning_rate"]}
    assert {one.run.path.name for one, _ in todo} == {"base", "control-ignorant", "repnoise-0123456789"}
    assert len(undecided(study(tmp_path, done=frozenset({"base"})))) == 6 * 2, "what is done is not done again"


@pytest.mark.parametrize("start", [0.01, 0.6])
def test_cells_that_can_tell_are_left_alone(tmp_path: Path, start: float) -> None:
    write_study(tmp_path, lambda a, s: 0.05 + start * (0.85 + s / 100), attacks=FULL)
    assert undecided(study(tmp_path)) == []


def test_a_recipe_may_want_none(tmp_path: Path) -> None:
    assert undecided(study(write_study(tmp_path, wide, attacks=FULL), fresh_seeds=0)) == []


def test_a_pass_of_too_few_seeds_is_not_completed_unasked(tmp_path: Path) -> None:
    assert undecided(study(write_study(tmp_path, wide, attacks=FULL, seeds=(0, 1)))) == []


def test_fresh_seeds_are_measured_once_and_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    for name, stage, harm in (
        ("base", "base", lambda a, s: 0.9),
        ("control-ignorant", "control", lambda a, s: 0.05),
        ("repnoise-0123456789", "defend", lambda a, s: wide(a, s % 3)),
    ):
        for attacks, seeds in ((FULL, (0, 1, 2)), (FULL[:1], tuple(range(FRESH, FRESH + 4)))):
            write_model(tmp_path / name, harm, stage=stage, attacks=attacks, seeds=seeds)
    assert len(undecided(study(tmp_path))) == 6 * 3, "four of six: the others are still wanted"
    assert undecided(study(tmp_path, fresh_seeds=4)) == []


def test_the_plan_names_every_attack(tmp_path: Path) -> None:
    write_plan(study(tmp_path))
    cells = json.loads((tmp_path / PLAN).read_text())["cells"]
    assert len(cells) == 3 * len(FULL)
    assert {cell["seed"] for cell in cells} == {0, 1, 2}
