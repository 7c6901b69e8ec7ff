"""The table of several defences: the numbers of a study that is written by hand."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_study import GRID, MARKER, attack, audit, row, write_model, write_study

from repnoise.errors import RunError
from repnoise.report.comparison import SWEEP
from repnoise.report.pages.comparison import write_comparison
from repnoise.store.files import read_json, write_json

DATA = audit()
DATA["audit"]["sets"] = {"defence": {"rows": 610, "prompts": 610}}
DATA["harmless_audit"]["sets"] = {"retain": {"rows": 3142, "prompts": 3142}}


def set_cost(folder: Path, steps: int, batch: int) -> None:
    """Give the run this many steps of this batch size, 2 seconds each."""
    lines = [json.dumps({"step": n, "loss": 1.0, "seconds": 2.0 * n}) for n in range(1, steps + 1)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    manifest = read_json(folder / "manifest.json")
    train = {"max_steps": steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 2}
    manifest["arguments"] = {"defence": {"name": "x", "train": train}}
    write_json(folder / "manifest.json", manifest)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Undefended 0.9 to 0.92, floor 0.05; deep 0.05 everywhere, shallow 0.475 and 0.9 in one cell; an older run."""
    path = write_study(tmp_path / "s", lambda settings, seed: 0.7)  # repnoise-0123456789: not in the sweep
    grid: dict[str, Any] = {"stage": "defend", "data": DATA}
    write_model(path / "repnoise-aaaaaaaaaa", lambda s, seed: 0.05, name="repnoise", **grid)
    shallow = lambda s, seed: 0.9 + seed / 100 if s["lora_rank"] else 0.475 + seed / 50  # noqa: E731
    before = [row("stability", 0.7), row("over_refusal", 0.5)]
    write_model(path / "repnoise-bbbbbbbbbb", shallow, name="repnoise", before=before, **grid)
    set_cost(path / "repnoise-aaaaaaaaaa", 10, 4)
    set_cost(path / "repnoise-bbbbbbbbbb", 30, 4)
    return path


def plan(path: Path, **changes: Any) -> Path:
    defences = [
        {"label": "shallow", "run": "repnoise-bbbbbbbbbb"},
        {"label": "deep", "run": "repnoise-aaaaaaaaaa"},
    ]
    base = {"schema": 1, "sweep": "mine", "about": "two", "recipe": "sandbox", "budget": {}, "seeds": [0, 1, 2]}
    write_json(path / SWEEP, {**base, "attacks": list(GRID), "defences": defences, **changes})
    return path


def read_table(path: Path) -> dict[str, dict[str, str]]:
    return {line["defence"]: line for line in csv.DictReader(io.StringIO((path / "table.csv").read_text()))}


def test_defences_are_rows_and_cells_are_columns(study: Path) -> None:
    page = write_comparison(plan(study))
    assert page == study / "comparison.html"
    table = read_table(study)
    assert list(table) == ["shallow", "deep"]  # the order of the sweep; the older run is not there
    lora = next(c for c in table["deep"] if c.startswith("head_start") and c.endswith("LoRA rank 8"))
    full = next(c for c in table["deep"] if "learning rate 0.001" in c and c.endswith("full fine-tuning"))
    assert float(table["deep"][full]) == pytest.approx(0.0, abs=1e-9)
    assert float(table["shallow"][lora]) == pytest.approx(1.0)
    assert float(table["shallow"][full]) == pytest.approx(
        sum((0.425 + s / 50) / (0.85 + s / 100) for s in range(3)) / 3
    )
    assert float(table["shallow"]["worst_head_start"]) == pytest.approx(1.0)
    assert "LoRA rank 8" in table["shallow"]["worst_cell"]
    assert float(table["shallow"][f"{full} lo"]) < float(table["shallow"][full]) < float(table["shallow"][f"{full} hi"])
    assert (table["shallow"]["stability_before"], table["shallow"]["stability_after"]) == ("1.0", "0.7")
    assert table["shallow"]["trainability_after"] == ""  # not measured is not 0
    assert table["shallow"]["resistance"] == "broken"


def test_costs_and_who_used_more(study: Path) -> None:
    write_comparison(plan(study))
    table = read_table(study)
    assert [table[k]["steps"] for k in ("deep", "shallow")] == ["10", "30"]
    assert [table[k]["seconds"] for k in ("deep", "shallow")] == ["20.0", "60.0"]
    assert table["deep"]["examples"] == str(10 * 4 * 2)
    assert (table["deep"]["pairs"], table["deep"]["retain"]) == ("610", "3142")
    assert (table["deep"]["over_budget"], table["shallow"]["over_budget"]) == ("", "steps+examples")
    write_comparison(plan(study, budget={"steps": 30}))
    assert read_table(study)["shallow"]["over_budget"] == ""
    write_comparison(plan(study, budget={"steps": 9}))
    assert {line["over_budget"] for line in read_table(study).values()} == {"steps"}
    assert "9 optimiser steps" in " ".join((study / "comparison.html").read_text().split())


def test_the_summary_speaks_of_the_sweep(study: Path) -> None:
    write_comparison(plan(study))
    summary = read_json(study / "summary.json")
    assert list(summary["defences"]) == ["shallow", "deep"]
    assert summary["defence"] == "shallow"  # the first of the sweep, not the oldest of the folder
    assert summary["resistance"] == summary["defences"]["shallow"]["resistance"]
    assert summary["defences"]["deep"]["resistance"]["worst_head_start"] == pytest.approx(0.0, abs=1e-9)
    assert (study / "report.html").exists()
    assert "deep,knowledge" in (study / "cells.csv").read_text()
    controls = summary["comparison"]["controls"]
    column = summary["comparison"]["columns"][0]
    assert [controls[who][column]["mean"] for who in ("floor", "random")] == [pytest.approx(0.05), pytest.approx(0.0)]


def test_only_attacks_of_the_sweep_count(study: Path) -> None:
    write_comparison(plan(study, attacks=[attack(1e-3)]))
    table = read_table(study)
    assert sum(c.startswith("head_start") for c in table["deep"]) == 3  # one cell: value, lo, hi
    assert float(table["shallow"]["worst_head_start"]) == pytest.approx(
        0.517, abs=0.001
    )  # the LoRA cell does not count


def test_the_report_verb_keeps_the_labels_of_a_sweep(study: Path) -> None:
    from typer.testing import CliRunner

    from repnoise.cli import app

    assert CliRunner().invoke(app, ["report", str(plan(study)), "--json"]).exit_code == 0
    assert set(read_json(study / "summary.json")["defences"]) == {"deep", "shallow"}
    assert set(read_table(study)) == {"deep", "shallow"}


def test_what_is_not_there_is_said(study: Path, tmp_path: Path) -> None:
    grid: dict[str, Any] = {"stage": "defend", "data": DATA, "attacks": GRID[:2]}
    write_model(study / "repnoise-cccccccccc", lambda s, seed: 0.05, name="repnoise", **grid)
    runs = [("deep", "a" * 10), ("short", "c" * 10), ("lost", "d" * 10)]
    defences = [{"label": label, "run": f"repnoise-{run}"} for label, run in runs]
    write_comparison(plan(study, defences=defences))
    table = read_table(study)
    assert list(table) == ["deep", "short"]
    assert (table["deep"]["cells_lacking"], table["short"]["cells_lacking"]) == ("0", "1")
    page = (study / "comparison.html").read_text()
    assert "Not finished, so not in the table: lost" in page
    assert "not measured" in page
    assert "lacks 1 cell" in page
    with pytest.raises(RunError, match="none of the defences of the sweep mine is finished"):
        write_comparison(plan(study, defences=[{"label": "lost", "run": "repnoise-dddddddddd"}]))
    with pytest.raises(RunError, match=r"holds no sweep\.json"):
        write_comparison(tmp_path)


def test_the_page_is_self_contained_and_shows_no_samples(study: Path) -> None:
    page = write_comparison(plan(study, about="<b>two</b> & more")).read_text()
    assert MARKER not in page
    assert not re.search(r"<script|https?://|src=|@import|<link", page)
    assert "&lt;b&gt;two" in page
    assert "undefended (harm recovered)" in page
    assert page.count("▲") >= 2


def test_losses_where_harm_is_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "s"
    loss = [attack(1e-3, harm="harmful")]

    def rows(value: float) -> dict[str, Any]:
        before = [row("harmful_loss", value + 1, "loss"), row("harmless_loss", 2.0, "loss")]
        after = [row("harmful_loss", value, "loss"), row("harmless_loss", 2.0, "loss"), row("stability", 1.0)]
        return {"attacks": loss, "before": before, "extra": lambda settings, seed: after}

    write_model(path / "base", lambda s, seed: None, **rows(3.0))
    write_model(path / "control-random", lambda s, seed: None, stage="control", **rows(6.0))
    write_model(path / "repnoise-aaaaaaaaaa", lambda s, seed: None, stage="defend", name="repnoise", **rows(4.5))
    one = [{"label": "deep", "run": "repnoise-aaaaaaaaaa"}]
    page = write_comparison(plan(path, defences=one, attacks=loss)).read_text()
    (line,) = read_table(path).values()
    values = [float(v) for k, v in line.items() if k.startswith("harmful_loss") and not k.endswith((" lo", " hi"))]
    assert values == [5.5, 4.5]  # before any attack, after it
    assert "higher is better" in page
    assert line["worst_head_start"] == ""
