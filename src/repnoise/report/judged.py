"""Several judges on the same answers: what each says, how far they agree, whether the verdict hangs on the judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repnoise.report.head_start import Trio, start_over, trio
from repnoise.report.reading import Attacked, Model, Study, judges
from repnoise.report.resistance import bounded, decisive, groups_of, labels_of, ruined

AGREEMENT = ("judge_agreement", "judge_kappa", "judge_spearman")


def judged(study: Study, model: Model, section: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section `judges` of summary.json, or None where no judge is named.

    `harms`: harm -> one entry per judge, the headline first: mean harm before the attack and after that judge's
    worst attack, worst head start, and `says` ("broken", "holds" or None where it has no head start).
    Degenerate and ruined cells count as they do for the headline. `flips`: judges that say otherwise than the headline.
    """
    harms: dict[str, list[dict[str, Any]]] = {}
    flips: list[dict[str, Any]] = []
    for harm in dict.fromkeys(a.harm for group in groups_of(model).values() for a in group):
        names = _names(model, harm) if bounded(harm) else []
        if not names:
            continue
        entries = [_entry(study, model, section, harm, name) for name in names]
        entries[0]["headline"] = True
        harms[harm] = entries
        head = entries[0]
        flips += [
            {
                "harm": harm,
                "headline": head["judge"],
                "headline_says": head["says"],
                "headline_head_start": head["worst_head_start"],
                "judge": each["judge"],
                "says": each["says"],
                "head_start": each["worst_head_start"],
                "cell": each["worst_cell"],
            }
            for each in entries[1:]
            if head["says"] is not None and each["says"] is not None and each["says"] != head["says"]
        ]
    if not harms:
        return None
    return {"harms": harms, "agreement": _agreements(study, model), "flips": flips}


def _names(model: Model, harm: str) -> list[str]:
    """Everyone who judged this harm after an attack on it, the headline judge first."""
    attacked = [a for a in model.attacks if a.harm == harm]
    found = [name for a in attacked for name in judges(a.by_metric.get(harm, ()), harm, steps=a.steps)]
    return list(dict.fromkeys(found))


def _entry(study: Study, model: Model, section: Mapping[str, Any], harm: str, judge: str) -> dict[str, Any]:
    labels = labels_of(study)
    known = {entry["label"]: entry for entry in section["resistance"]["head_start_by_cell"]}
    cells = []
    for key, group in groups_of(model).items():
        if group[0].harm != harm:
            continue
        trios = [trio(study, a, judge=judge) for a in group]
        start, _ = start_over(trios)
        entry = known.get(labels[key])
        if start is None or entry is None:
            continue
        floored = entry["degenerate"] or section["before"]["collapsed"]
        counted = max(start["mean"], 0.0) if floored else start["mean"]
        cells.append({"start": start, "counted": counted, "trios": trios, "entry": entry})
    worst, broken = decisive(cells, lambda cell: cell["counted"], lambda cell: ruined(cell["entry"]))
    roles = ("undefended", "defended", "floor")
    before = {who: one.before(harm, judge=judge) if one else None for who, one in _both(study, model)}
    return {
        "judge": judge,
        "headline": False,
        "before": {who: found.value if found is not None else None for who, found in before.items()},
        "after_worst": {who: _mean(worst["trios"], who) if worst else None for who in roles},
        "worst_head_start": worst["counted"] if worst else None,
        "worst": worst["start"] if worst else None,
        "worst_cell": worst["entry"]["label"] if worst else None,
        "says": None if worst is None else "broken" if broken else "holds",
    }


def _both(study: Study, model: Model) -> tuple[tuple[str, Model | None], ...]:
    return ("undefended", study.base), ("defended", model)


def _mean(trios: list[Trio], who: str) -> float | None:
    values = [found.value for each in trios if (found := getattr(each, who)) is not None]
    return sum(values) / len(values) if values else None


def _agreements(study: Study, model: Model) -> list[dict[str, Any]]:
    """One entry per pair of judges, harm and state: before any attack, or the mean over all attacked models."""
    found = []
    for who, one in _both(study, model):
        if one is None:
            continue
        states: list[tuple[str, list[Attacked | Model]]] = [("before any attack", [one])]
        states.append(("after the attacks", list({a.folder: a for a in one.attacks}.values())))
        for state, many in states:
            for (metric, pair), values in _pairs(many).items():
                found.append({"model": who, "state": state, "harm": metric, "judges": pair.split("|"), **values})
    return found


def _pairs(many: list[Attacked | Model]) -> dict[tuple[str, str], dict[str, Any]]:
    """(harm, "a|b") -> mean agreement, kappa and spearman; rows `judge_kappa` or `<harm>_judge_kappa`."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for one in many:
        for metric, rows in one.by_metric.items():
            kind = next((k for k in AGREEMENT if metric == k or metric.endswith(f"_{k}")), None)
            if kind is None:
                continue
            harm = metric.removesuffix(kind).rstrip("_")
            for row in rows:
                if row.get("step") is None and row.get("category"):
                    into = values.setdefault((harm, str(row["category"])), {})
                    into.setdefault(kind.removeprefix("judge_"), []).append(float(row["value"]))
    return {key: {name: sum(v) / len(v) for name, v in kinds.items()} for key, kinds in values.items()}
