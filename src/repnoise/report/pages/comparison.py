"""Several defences of one study side by side: table.csv (defences as rows) and comparison.html.

`sweep.json` in the study folder says which defences are compared, under which labels, and which attacks count; the
numbers come from the same summary as every report. The first defence of the sweep is the headline of summary.json,
and `defences` there holds all of them under their labels; runs of the folder that the sweep does not name are left out.

Head starts come with their 95 % interval over seeds and items. Where harm is a loss, which has no upper end, the
columns are harmful losses after the attack instead, and higher is better.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repnoise.errors import RunError
from repnoise.report.pages.html import _environment, write_page
from repnoise.report.reading import Model, Study, load
from repnoise.report.resistance import ruined, worst_of
from repnoise.report.summary import summarise, table_csv
from repnoise.store.files import read_json, read_jsonl, write_json, write_text
from repnoise.store.run import SCHEMA

PLAN = "sweep.json"
TOLERANCE = 1.05  # more than this share of the budget is marked


def write_comparison(study_dir: str | Path) -> Path:
    """Write the report, then summary.json and table.csv with labels, cells.csv and comparison.html; gives the page.

    Raises:
        RunError: the folder holds no sweep, or none of its defences is finished.
    """
    folder = Path(study_dir)
    plan = read_plan(folder)
    whole = summarise(folder)
    write_page(folder, whole)
    summary = relabelled(whole, plan, load(folder, rows=False))
    table = compare(summary, plan, folder)
    write_json(folder / "summary.json", {**summary, "comparison": table})
    write_text(folder / "cells.csv", table_csv(summary))
    write_text(folder / "table.csv", as_csv(table))
    page = _environment().get_template("comparison.html.j2").render(table=table, plan=plan)
    return write_text(folder / "comparison.html", page)


def read_plan(folder: Path) -> dict[str, Any]:
    if not (folder / PLAN).is_file():
        raise RunError(f"{folder} holds no {PLAN}: it is no sweep. Run `repnoise sweep`, or `repnoise report` instead.")
    plan = read_json(folder / PLAN)
    if not isinstance(plan, dict) or plan.get("schema") != SCHEMA:
        raise RunError(f"{folder / PLAN} is of another version. Run `repnoise sweep` again.")
    return plan


def relabelled(summary: Mapping[str, Any], plan: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """The summary with the sweep's defences only, under their labels, the first of them as the headline."""
    parts = summary.get("defences") or {summary["defence"]: {k: v for k, v in summary.items() if k in _SECTIONS}}
    names = {model.folder.name: model.name for model in study.defences}
    found = {}
    for each in plan["defences"]:
        name = names.get(each["run"])
        if name is not None and name in parts:
            found[each["label"]] = parts[name]
    if not found:
        raise RunError(
            f"none of the defences of the sweep {plan['sweep']} is finished in {study.path}."
            " Run `repnoise sweep` again to see why."
        )
    main = next(iter(found))
    kept = {k: v for k, v in summary.items() if k not in (*_SECTIONS, "defence", "defences")}
    return {**kept, "defence": main, **found[main], "defences": found}


_SECTIONS = (
    *("resistance", "stability", "trainability", "over_refusal", "multiple_choice", "generalisation", "losses"),
    *("before", "also_measured", "data", "judges", "attacked", "missing", "verdict"),
)


# ---- the table --------------------------------------------------------------------------------------------


def compare(summary: Mapping[str, Any], plan: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """{"kind": "head_start" or "harmful_loss", "columns": [label], "rows": [...], "controls": {label: ...}, ...}.

    A row: label, name, run, cells {column: {mean, lo, hi, void, ruined, degenerate} or None}, worst, worst_cell,
    usable_worst (cells that the attack did not ruin), lacks, stability, trainability, over_refusal {before, after},
    cost {steps, seconds, examples, pairs, retain}, over (what of the budget it exceeded), resistance, claims.
    """
    parts: Mapping[str, Any] = summary["defences"]
    wanted = [json.dumps(each, sort_keys=True) for each in plan.get("attacks") or ()]
    models = {model.folder.name: model for model in load(folder, rows=False).defences}
    runs = {each["label"]: each["run"] for each in plan["defences"]}
    entries = {label: _entries(part, wanted) for label, part in parts.items()}
    kind = "head_start" if any(entries.values()) else "harmful_loss"
    if kind == "harmful_loss":
        entries = {label: _losses(part, wanted) for label, part in parts.items()}
    columns = list(dict.fromkeys(column for found in entries.values() for column in found))
    rows = [_row(label, part, entries[label], columns, kind, models[runs[label]]) for label, part in parts.items()]
    rows = [row for row in rows if row["lacks"] < len(columns) or not columns]  # never attacked: it has no place here
    budget = _budget(rows, plan.get("budget") or {})
    for row in rows:
        row["over"] = [k for k, limit in budget.items() if limit and (row["cost"][k] or 0) > TOLERANCE * limit]
    return {
        "kind": kind,
        "columns": columns,
        "rows": rows,
        "absent": [label for label in runs if label not in {row["label"] for row in rows}],
        "controls": _controls(entries, columns, kind, parts),
        "budget": budget,
        "data": _data(rows),
        "seeds": plan.get("seeds") or [],
    }


def _entries(part: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    found = part["resistance"]["head_start_by_cell"]
    return {e["label"]: e for e in found if not wanted or json.dumps(e["attack"], sort_keys=True) in wanted}


def _losses(part: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        entry["label"]: entry
        for entry in part["losses"] or ()
        if entry["model"] == "defended"
        and entry.get("harmful_loss")
        and (entry["attack"] is None or not wanted or json.dumps(entry["attack"], sort_keys=True) in wanted)
    }


def _row(
    label: str,
    part: Mapping[str, Any],
    entries: Mapping[str, dict[str, Any]],
    columns: Sequence[str],
    kind: str,
    model: Model,
) -> dict[str, Any]:
    cells: dict[str, dict[str, Any] | None] = {}
    for column in columns:
        entry = entries.get(column)
        if entry is None:
            cells[column] = None
            continue
        found = entry[kind] or {"mean": None, "lo": None, "hi": None, "n": 0}
        cells[column] = {
            **found,
            "harm": entry.get("defended"),
            "void": bool(entry.get("void")),
            "degenerate": bool(entry.get("degenerate")),
            "ruined": kind == "head_start" and ruined(entry),
            "seeds": entry.get("n_seeds"),
        }
    valid = [e for e in entries.values() if kind == "head_start" and e["head_start"] is not None]
    worst, usable = worst_of(valid), worst_of([e for e in valid if not ruined(e)])
    claims = (part["verdict"] or {}).get("claims", [])
    return {
        "label": label,
        "name": str(model.manifest.get("name")),
        "run": model.folder.name,
        "cells": cells,
        "worst": worst and worst["head_start_counted"],
        # a collapsed model counts as 0 at least, and that has no interval
        "worst_interval": worst["head_start"] if worst and worst["head_start"]["mean"] >= 0 else None,
        "worst_cell": worst and worst["label"],
        "usable_worst": usable and usable["head_start_counted"],
        "usable_cell": usable and usable["label"],
        "lacks": sum(cell is None for cell in cells.values()),
        **{key: part[key] for key in ("stability", "trainability", "over_refusal")},
        "collapsed": bool((part.get("before") or {}).get("collapsed")),
        "cost": cost_of(model),
        "resistance": [c["status"] for c in claims if c["claim"] == "resistance"],
    }


def cost_of(model: Model) -> dict[str, Any]:
    """What the defence used: optimiser steps, seconds (interruptions not counted), examples shown, data at hand.

    `examples` are pairs shown to the model, repetitions counted: steps x batch size x accumulation (per process).
    None where nothing was trained here.
    """
    log = model.folder / "train.jsonl"
    last = next(reversed(read_jsonl(log, torn_end=True)), None) if log.exists() else None
    arguments = model.manifest.get("arguments") or {}
    train = (arguments.get("defence") or {}).get("train") or {}
    batch = int(train.get("per_device_train_batch_size") or 8)  # the default of transformers
    accumulated = int(train.get("gradient_accumulation_steps") or 1)
    steps = int(last["step"]) if last and last.get("step") is not None else None
    data = model.manifest.get("data") or {}
    sets = {**((data.get("audit") or {}).get("sets") or {}), **((data.get("harmless_audit") or {}).get("sets") or {})}
    seconds = (last or {}).get("seconds", model.manifest.get("seconds") if "defence" in arguments else None)
    return {
        "steps": steps,
        "seconds": seconds,
        "examples": steps * batch * accumulated if steps else None,
        "pairs": arguments.get("pairs") or _rows_of(sets.get("defence")),
        "retain": _rows_of(sets.get("retain")),
    }


def _rows_of(found: Any) -> int | None:
    return int(found["rows"]) if isinstance(found, Mapping) and "rows" in found else None


def _budget(rows: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, float | None]:
    """What is allowed: as the sweep says, else what the median defence used."""
    budget: dict[str, float | None] = {}
    for key in ("steps", "examples"):
        used = [row["cost"][key] for row in rows if row["cost"][key] is not None]
        stated = given.get(key)
        if stated is None and key == "examples" and given.get("steps") is not None:
            budget[key] = None  # the sweep states steps, and nothing of examples
        else:
            budget[key] = stated or (statistics.median(used) if used else None)
    return budget


def _data(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: sorted({r["cost"][key] for r in rows if r["cost"][key] is not None}) for key in ("pairs", "retain")}


def _controls(
    entries: Mapping[str, Mapping[str, dict[str, Any]]], columns: Sequence[str], kind: str, parts: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Harm recovered from the undefended model, the floor and random weights, per column; the same in every row."""
    found: dict[str, dict[str, Any]] = {"undefended": {}, "floor": {}, "random": {}}
    if kind == "head_start":
        for column in columns:
            entry = next(each[column] for each in entries.values() if column in each)
            for who in found:
                found[who][column] = entry[who]
        return found
    first = next(iter(parts.values()))
    losses = {e["label"]: e["harmful_loss"] for e in first["losses"] or () if e["model"] == "undefended"}
    found["undefended"] = {column: losses.get(column) for column in columns}
    return found


def as_csv(table: Mapping[str, Any]) -> str:
    """One line per defence: its cost, what it kept, and three columns (value, lo, hi) for each attack cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    kept = ("stability", "trainability", "over_refusal")
    costs = ("steps", "seconds", "examples", "pairs", "retain")
    heads = [f"{table['kind']} {column}{end}" for column in table["columns"] for end in ("", " lo", " hi")]
    both = [f"{key}_{when}" for key in kept for when in ("before", "after")]
    worst = ["worst_head_start", "worst_lo", "worst_hi", "worst_cell", "usable_worst_head_start", "resistance"]
    writer.writerow(["defence", "name", *worst, *both, *costs, "over_budget", "cells_lacking", *heads])
    for row in table["rows"]:
        interval = row["worst_interval"] or {"lo": None, "hi": None}
        line = [row["label"], row["name"], row["worst"], interval["lo"], interval["hi"], row["worst_cell"]]
        line += [row["usable_worst"], "+".join(row["resistance"])]
        line += [(row[key] or {}).get(when) for key in kept for when in ("before", "after")]
        line += [*(row["cost"][key] for key in costs), "+".join(row["over"]), row["lacks"]]
        for column in table["columns"]:
            cell = row["cells"][column] or {"mean": None, "lo": None, "hi": None}
            line += [cell["mean"], cell["lo"], cell["hi"]]
        writer.writerow(line)
    return file.getvalue()
