"""What an attacker's search found: the trials in order, the worst of them, and the same cell measured again."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bars import DEFAULT
from ..report.head_start import Trio, head_start
from ..report.pages import plots
from ..report.readings import Reading
from ..report.records import Point
from ..store.files import write_json, write_text
from ..store.run import SCHEMA
from ..study.study import Study
from .search_space import Space

WORST = ("trial", "head_start", "defended", "undefended", "floor", "config")


def half(trios: Sequence[Trio], start: int) -> list[Trio]:
    """Every other item, from `start` on (0: searched on, 1: kept for the end); as they are where rows hold no items."""

    def of(reading: Reading | None) -> Reading | None:
        items = reading.of_items() if reading is not None else None
        if reading is None or items is None or items.size < 2:
            return reading
        some = items[start::2]
        return Reading(float(some.mean()), None, None, int(some.size), some[None], reading.judge, True)

    return [
        dataclasses.replace(t, defended=of(t.defended), undefended=of(t.undefended), floor=of(t.floor)) for t in trios
    ]


def mean_of(trios: Sequence[Trio], who: str) -> float | None:
    values = [getattr(each, who).value for each in trios if getattr(each, who) is not None]
    return sum(values) / len(values) if values else None


def again(whole: Sequence[Trio], seeds: Sequence[int]) -> dict[str, Any]:
    """The worst cell on fresh seeds, and on the items that the search did not see where rows hold items."""
    unseen = half(whole, 1)
    start, method = head_start(unseen, DEFAULT)
    every, _ = head_start(whole, DEFAULT)
    halved = any(each.defended is not None and each.defended.items is not None for each in unseen)
    return {
        "head_start": dataclasses.asdict(start) if start else None,
        "interval": method,
        "seeds": list(seeds),
        "items": "every other test item, none of them seen by the search" if halved else "the same as in the search",
        "head_start_all_items": dataclasses.asdict(every) if every else None,
        **{who: mean_of(unseen, who) for who in ("defended", "undefended", "floor")},
    }


def is_over(trial: Any) -> bool:
    """Finished for good; a trial whose worker died is not."""
    return trial.state.is_finished() and (trial.state.name != "FAIL" or "error" in trial.user_attrs)


def outcome(study: Study, space: Space, found: Sequence[Any], wanted: int) -> dict[str, Any]:
    """search.json without the second measurement. `best_*`: the most that the trials so far brought back.

    `best_*` lets each model have its own best attack of the same budget; `head_start_of_bests` compares those.
    """
    rows: list[dict[str, Any]] = []
    best: dict[str, float | None] = dict.fromkeys(("head_start", "defended", "undefended", "floor"))
    worst = None
    for trial in sorted((t for t in found if is_over(t)), key=lambda t: (str(t.datetime_complete), t.number)):
        known = trial.user_attrs
        row = {"trial": trial.number, "state": trial.state.name.lower(), "head_start": trial.value}
        row |= {who: known.get(who) for who in ("defended", "undefended", "floor", "seconds")}
        row |= {"reason": known.get("reason") or known.get("error"), "config": known.get("config")}
        for key in best:
            if row[key] is not None and (best[key] is None or row[key] > best[key]):
                best[key] = row[key]
                worst = row if key == "head_start" else worst
        rows.append({**row, **{f"best_{key}": value for key, value in best.items()}})
    d, u, f = best["defended"], best["undefended"], best["floor"]
    apart = None if d is None or u is None or f is None or u - f < DEFAULT.gain else (d - f) / (u - f)
    return {
        "schema": SCHEMA,
        "defence": study.defended().run.path.name,
        "recipe": study.recipe.study,
        "space": space.model_dump(mode="json"),
        "trials_wanted": wanted,
        "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 1),
        "worst": None if worst is None else {key: worst[key] for key in WORST},
        "head_start_of_bests": apart,
        "measured_again": None,
        "trials": rows,
    }


def write(folder: Path, result: dict[str, Any]) -> None:
    """search.json, search.csv and curve.svg (the worst head start against the trials) in `folder`."""
    write_json(folder / "search.json", result)
    axes = sorted({key for row in result["trials"] for key in row["config"] or {}} - {"seeds"})
    plain = [key for key in (result["trials"] or [{}])[0] if key not in ("config", "reason")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*plain, *axes, "reason"])
    for row in result["trials"]:
        writer.writerow([*(row[k] for k in plain), *((row["config"] or {}).get(k) for k in axes), row["reason"]])
    write_text(folder / "search.csv", file.getvalue())
    line = [
        Point(index, row["best_head_start"])
        for index, row in enumerate(result["trials"], 1)
        if row["best_head_start"] is not None
    ]
    if line:
        svg = plots.chart({"defended": line}, title="worst head start found so far", x_label="trials")
        write_text(folder / "curve.svg", plots.standalone(svg))
