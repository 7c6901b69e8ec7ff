"""The comparison of several defences as files: summary.json with the table, table.csv, cells.csv, comparison.html."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path

from repnoise.report.comparison import Table, compare, read_plan, relabelled
from repnoise.report.pages.html import environment, write_page
from repnoise.report.reading import load
from repnoise.report.summary import build_summary, inert, table_csv
from repnoise.store.files import write_json, write_text


def write_comparison(study_dir: str | Path) -> Path:
    """Write the report, then summary.json and table.csv with labels, cells.csv and comparison.html; gives the page.

    Raises:
        RunError: the folder holds no sweep, or none of its defences is finished.
    """
    folder = Path(study_dir)
    plan = read_plan(folder)
    whole, study = build_summary(folder), load(folder, rows=False)
    write_page(folder, whole)
    summary = relabelled(whole, plan, study)
    table = compare(summary, plan, study)
    write_json(folder / "summary.json", {**summary.as_json(several=True), "comparison": dataclasses.asdict(table)})
    write_text(folder / "cells.csv", table_csv(summary))
    write_text(folder / "table.csv", as_csv(table))
    page = environment().get_template("comparison.html.j2").render(table=table, plan=plan)
    return write_text(folder / "comparison.html", page)


def as_csv(table: Table) -> str:
    """One line per defence: its cost, what it kept, and three columns (value, lo, hi) for each attack cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    kept = ("stability", "trainability", "over_refusal")
    costs = ("steps", "seconds", "examples", "pairs", "retain")
    heads = [f"{table.kind} {column}{end}" for column in table.columns for end in ("", " lo", " hi")]
    both = [f"{key}_{when}" for key in kept for when in ("before", "after")]
    worst = ["worst_head_start", "worst_lo", "worst_hi", "worst_cell", "usable_worst_head_start", "resistance"]
    writer.writerow(inert(["defence", "name", *worst, *both, *costs, "over_budget", "cells_lacking", *heads]))
    for row in table.rows:
        interval = row.worst_interval
        line = [
            row.label,
            row.name,
            row.worst,
            *((interval.lo, interval.hi) if interval else (None, None)),
            row.worst_cell,
        ]
        line += [row.usable_worst, "+".join(row.resistance)]
        line += [getattr(getattr(row, key), when, None) for key in kept for when in ("before", "after")]
        line += [*(getattr(row.cost, key) for key in costs), "+".join(row.over), row.lacks]
        for column in row.cells.values():
            value = column.value if column else None
            line += [value.mean, value.lo, value.hi] if value else [None] * 3
        writer.writerow(inert(line))
    return file.getvalue()
