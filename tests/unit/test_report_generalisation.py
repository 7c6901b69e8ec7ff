"""Unseen harm: categories of the same name, categories of other splits, and main harms without a cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from report_study import attack, row, write_study

from repnoise.report import build_summary, summarise


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("repnoise.store.files.os.fsync", lambda descriptor: None)


def section(path: Path) -> dict[str, Any]:
    found = build_summary(path).as_json(several=True)
    return found["defences"][found["defence"]]


def audited(**harms: str) -> dict[str, Any]:
    return {"harms": harms, "audit": {"sets": {}, "overlaps": []}}


def study(path: Path, data: Mapping[str, Any], attacks: Sequence[Mapping[str, Any]], **more: Any) -> Path:
    return write_study(path, attacks=attacks, data=data, **more)


def test_a_harm_called_withheld_can_be_a_main_one(tmp_path: Path):
    found = section(study(tmp_path, audited(withheld="main"), [attack(harm="withheld")]))
    assert found["harms"]["withheld"] == "main"
    assert found["generalisation"]["withheld"] == {}
    assert [c["harm"] for c in found["verdict"]["claims"] if c["claim"] == "resistance"] == ["withheld"]


def test_two_withheld_harms_with_a_category_of_one_name_are_both_told(tmp_path: Path):
    values = {"one": 0.05, "two": 0.9}

    def extra(settings: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
        return [row(settings["harm"], values[settings["harm"]], category="drugs")]

    path = study(
        tmp_path,
        audited(one="withheld", two="withheld"),
        [attack(harm="one"), attack(harm="two")],
        extra=extra,
    )
    found = section(path)["generalisation"]["withheld"]
    assert list(found) == ["drugs", "two: drugs"]
    assert [each["defended"] for each in found.values()] == pytest.approx([0.05, 0.9])


def test_a_category_of_the_validation_split_does_not_hide_the_withheld_harm(tmp_path: Path):
    def extra(settings: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
        return [row("gone", 0.05), row("gone", 0.9, category="v", split="validation")]

    path = study(tmp_path, audited(gone="withheld"), [attack(harm="gone")], extra=extra)
    found = section(path)["generalisation"]["withheld"]
    assert list(found) == ["gone"]
    assert found["gone"]["defended"] == pytest.approx(0.05)


def test_a_main_harm_that_was_planned_and_never_attacked_is_not_passed_over(tmp_path: Path):
    path = study(tmp_path, audited(knowledge="main", other="main"), [attack()])
    cells = [{**attack(harm="other"), "seed": 0}]
    (path / "plan.json").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    claims = {c["harm"]: c for c in section(path)["verdict"]["claims"] if c["claim"] == "resistance"}
    assert list(claims) == ["knowledge", "other"]
    assert claims["other"]["status"] == "not established"


def test_planned_attacks_that_differ_outside_the_label_are_told_apart(tmp_path: Path):
    path = study(tmp_path, audited(knowledge="main"), [attack()])
    cells = [{**attack(1e-2, batch_size=size), "seed": 0} for size in (4, 8)]
    (path / "plan.json").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    found = section(path)
    gaps = [gap["label"] for gap in found["resistance"]["lacking"]]
    assert len(set(gaps)) == 2
    assert len([key for key in found["missing"] if key.startswith("cell knowledge: ")]) == 2


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"cells": 3}', '{"cells": [{"name": "sft"}]}', '{"cells": [null]}'])
def test_a_torn_plan_is_a_problem_and_no_crash(tmp_path: Path, torn: str):
    path = study(tmp_path, audited(knowledge="main"), [attack()], seeds=(0,))
    (path / "plan.json").write_text(torn, encoding="utf-8")
    assert [one for one in summarise(path)["problems"] if one.startswith("plan.json: cannot be read")]


def test_a_planned_attack_of_an_unknown_harm_is_a_gap(tmp_path: Path):
    path = study(tmp_path, audited(knowledge="main"), [attack()], seeds=(0,))
    plan = {"cells": [{**attack(harm="a+b <i>"), "seed": 0}]}
    (path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert [gap["harm"] for gap in section(path)["resistance"]["lacking"]] == ["a+b <i>"]
