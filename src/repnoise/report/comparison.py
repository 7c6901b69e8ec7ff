"""Several defences of one study side by side: defences as rows, attacks as columns.

`sweep.json` in the study folder says which defences are compared, under which labels, and which attacks count; the
numbers come from the same summary as every report. The first defence of the sweep is the headline of summary.json,
and runs of the folder that the sweep does not name are left out.

Head starts come with their 95 % interval over seeds and items. Where harm is a loss, which has no upper end, the
columns are harmful losses after the attack instead, and higher is better.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from repnoise.errors import RunError
from repnoise.report.cells import identity
from repnoise.report.manifests import Settings
from repnoise.report.reading import Model, Study
from repnoise.report.records import Cell, Estimate, LossRow, OverRefusal, Section, Stability, Summary, Trainability
from repnoise.report.resistance import in_full, worst_of
from repnoise.store.files import read_json, read_jsonl
from repnoise.store.run import SCHEMA

SWEEP = "sweep.json"
TOLERANCE = 1.05  # more than this share of the budget is marked
COSTS: tuple[Literal["steps", "examples"], ...] = ("steps", "examples")


@dataclass(frozen=True)
class Cost:
    """What a defence used: optimiser steps, seconds (interruptions not counted), examples shown, data at hand.

    `examples` are pairs shown to the model, repetitions counted: steps x batch size x accumulation (per process).
    None where nothing was trained here.
    """

    steps: int | None
    seconds: float | None
    examples: int | None
    pairs: int | None
    retain: int | None


@dataclass(frozen=True)
class Column:
    """One attack cell of one defence; `value` is its head start, or its harmful loss."""

    value: Estimate | None
    says: str | None
    void: bool = False
    degenerate: bool = False
    ruined: bool = False
    seeds: int = 0


@dataclass(frozen=True)
class TableRow:
    """One defence. `worst_interval` is None where the worst cell counts as 0 because the model has collapsed."""

    label: str
    name: str
    run: str
    status: str
    cells: dict[str, Column | None]
    worst: float | None
    worst_interval: Estimate | None
    worst_cell: str | None
    usable_worst: float | None
    lacks: int
    stability: Stability | None
    trainability: Trainability | None
    over_refusal: OverRefusal | None
    collapsed: bool
    cost: Cost
    resistance: list[str]
    over: list[str]


@dataclass(frozen=True)
class Table:
    """The comparison. `absent`: defences of the sweep that are not finished; `controls`: harm recovered from the
    undefended model, the floor and random weights, per column."""

    kind: Literal["head_start", "harmful_loss"]
    columns: list[str]
    rows: list[TableRow]
    absent: list[str]
    controls: dict[str, dict[str, Estimate | None]]
    budget: dict[str, float | None]
    data: dict[str, list[int]]
    seeds: list[int]


@dataclass(frozen=True)
class Plan:
    """What a sweep says in sweep.json. `defences`: label -> run folder; `attacks`: those that count, empty for all."""

    sweep: str
    about: str
    recipe: str
    budget: dict[str, float | None]
    attacks: list[Settings]
    seeds: list[int]
    defences: dict[str, str]


def read_plan(folder: Path) -> Plan:
    if not (folder / SWEEP).is_file():
        raise RunError(
            f"{folder} holds no {SWEEP}: it is no sweep. Run `repnoise sweep`, or `repnoise report` instead."
        )
    found = read_json(folder / SWEEP)
    try:
        if found.pop("schema") == SCHEMA:
            attacks = [Settings.of(each) for each in found.pop("attacks")]
            defences = {each["label"]: each["run"] for each in found.pop("defences")}
            known = {key: value for key, value in found.items() if key in Plan.__dataclass_fields__}
            return Plan(attacks=attacks, defences=defences, **known)
    except (AttributeError, KeyError, TypeError):
        pass
    raise RunError(f"{folder / SWEEP} is of another version. Run `repnoise sweep` again.")


def relabelled(summary: Summary, plan: Plan, study: Study) -> Summary:
    """The summary with the sweep's defences only, under their labels, the first of them as the headline."""
    names = {model.folder.name: model.name for model in study.defences}
    found = {label: summary.defences[names[run]] for label, run in plan.defences.items() if run in names}
    if not found:
        raise RunError(
            f"none of the defences of the sweep {plan.sweep} is finished in {study.path}."
            " Run `repnoise sweep` again to see why."
        )
    return replace(summary, defence=next(iter(found)), defences=found)


def compare(summary: Summary, plan: Plan, study: Study) -> Table:
    """The table of a summary under the labels of its sweep."""
    wanted = {identity(each.key) for each in plan.attacks}
    models = {model.folder.name: model for model in study.defences}
    cells = {label: _cells(part, wanted) for label, part in summary.defences.items()}
    bounded = any(cells.values())
    losses = {label: {} if bounded else _losses(part, wanted) for label, part in summary.defences.items()}
    names = {key: words for found in cells.values() for key, (words, _) in found.items()}
    names |= {key: words for found in losses.values() for key, (words, _) in found.items()}
    rows = []
    for label, part in summary.defences.items():
        columns = {
            words: _column(cells[label][key][1]) if key in cells[label] else _loss(losses[label].get(key))
            for key, words in names.items()
        }
        row = _row(label, part, columns, [cell for _, cell in cells[label].values()], models[plan.defences[label]])
        if row.lacks < len(names) or not names:  # never attacked: it has no place here
            rows.append(row)
    budget = _budget(rows, plan.budget)
    rows = [replace(row, over=[key for key in COSTS if _over(getattr(row.cost, key), budget[key])]) for row in rows]
    return Table(
        kind="head_start" if bounded else "harmful_loss",
        columns=list(names.values()),
        rows=rows,
        absent=[label for label in plan.defences if label not in {row.label for row in rows}],
        controls=_controls(cells, next(iter(summary.defences.values())), names, bounded),
        budget=budget,
        data={
            key: sorted({value for row in rows if (value := getattr(row.cost, key)) is not None})
            for key in ("pairs", "retain")
        },
        seeds=plan.seeds,
    )


def _cells(part: Section, wanted: set[str]) -> dict[str, tuple[str, Cell]]:
    found = part.resistance.head_start_by_cell
    return {cell.id: (in_full(cell), cell) for cell in found if not wanted or cell.id in wanted}


def _losses(part: Section, wanted: set[str]) -> dict[str, tuple[str, LossRow]]:
    return {
        row.id or "": (row.label, row)
        for row in part.losses
        if row.model == "defended" and row.harmful_loss and (row.id is None or not wanted or row.id in wanted)
    }


def _column(cell: Cell) -> Column:
    return Column(cell.head_start, cell.says, cell.void, cell.degenerate, cell.ruined, cell.n_seeds)


def _loss(found: tuple[str, LossRow] | None) -> Column | None:
    return None if found is None else Column(found[1].harmful_loss, None, seeds=found[1].n_seeds)


def _row(label: str, part: Section, columns: dict[str, Column | None], cells: Sequence[Cell], model: Model) -> TableRow:
    valid = [cell for cell in cells if cell.head_start is not None]
    worst, usable = worst_of(valid), worst_of(cell for cell in valid if not cell.ruined)
    start = worst.head_start if worst else None
    return TableRow(
        label=label,
        name=str(model.manifest.name),
        run=model.folder.name,
        status=part.verdict.status,
        cells=columns,
        worst=worst.counted if worst else None,
        worst_interval=start if worst and start and worst.counted == start.mean else None,
        worst_cell=in_full(worst) if worst else None,
        usable_worst=usable.counted if usable else None,
        lacks=sum(column is None for column in columns.values()),
        stability=part.stability,
        trainability=part.trainability,
        over_refusal=part.over_refusal,
        collapsed=part.before.collapsed,
        cost=cost_of(model),
        resistance=[claim.status for claim in part.verdict.claims if claim.claim == "resistance"],
        over=[],
    )


def cost_of(model: Model) -> Cost:
    log = model.folder / "train.jsonl"
    last: dict[str, Any] = next(reversed(read_jsonl(log, torn_end=True)), {}) if log.exists() else {}
    manifest, train = model.manifest, model.manifest.train or {}
    batch = int(train.get("per_device_train_batch_size") or 8)  # the default of transformers
    accumulated = int(train.get("gradient_accumulation_steps") or 1)
    steps = int(last["step"]) if last.get("step") is not None else None
    return Cost(
        steps=steps,
        seconds=last.get("seconds", manifest.seconds if manifest.train is not None else None),
        examples=steps * batch * accumulated if steps else None,
        pairs=manifest.pairs or manifest.data.pairs,
        retain=manifest.data.retain,
    )


def _budget(rows: Sequence[TableRow], given: Mapping[str, Any]) -> dict[str, float | None]:
    """What is allowed: as the sweep says, else what the median defence used."""
    budget: dict[str, float | None] = {}
    for key in COSTS:
        used = [value for row in rows if (value := getattr(row.cost, key)) is not None]
        stated = given.get(key)
        if stated is None and key == "examples" and given.get("steps") is not None:
            budget[key] = None  # the sweep states steps, and nothing of examples
        else:
            budget[key] = stated or (statistics.median(used) if used else None)
    return budget


def _over(used: float | None, limit: float | None) -> bool:
    return bool(limit) and (used or 0) > TOLERANCE * (limit or 0)


def _controls(
    cells: Mapping[str, Mapping[str, tuple[str, Cell]]], first: Section, names: Mapping[str, str], bounded: bool
) -> dict[str, dict[str, Estimate | None]]:
    """The same in every row, so read from the first defence that has the column."""
    if not bounded:
        losses = {row.id or "": row.harmful_loss for row in first.losses if row.model == "undefended"}
        return {"undefended": {words: losses.get(key) for key, words in names.items()}}
    owners = {key: next(found[key][1] for found in cells.values() if key in found) for key in names}
    return {
        who: {names[key]: getattr(cell, who) for key, cell in owners.items()}
        for who in ("undefended", "floor", "random")
    }
