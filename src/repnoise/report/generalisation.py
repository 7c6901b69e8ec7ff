"""Harm that the defence never saw: withheld categories, and attacks from other domains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repnoise.report.cells import MAIN, mean_over
from repnoise.report.head_start import start_over, trio
from repnoise.report.reading import Model, Study
from repnoise.report.resistance import decisive, groups_of, labels_of, ruined

WITHHELD = ("withheld", "withheld_loss")


def main_harm(harm: str) -> bool:
    """Whether an attack on this harm is about resistance; else it is about generalisation."""
    return harm in MAIN


def withheld(
    study: Study, model: Model, entries: Sequence[dict[str, Any]], missing: dict[str, str]
) -> dict[str, Any] | None:
    """Per withheld category the attack that decides about it (all void: the one with the highest harm).

    Args:
        entries: `head_start_by_cell`, which knows the attacks that ruined the model.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    labels, spoiled = labels_of(study), {entry["label"] for entry in entries if ruined(entry)}
    for key, group in groups_of(model).items():
        categories = {r.get("category") for a in group for r in a.by_metric.get("withheld", ())}
        for each in sorted(categories, key=str):
            trios = [t for a in group if (t := trio(study, a, "withheld", each)).defended is not None]
            if not trios:
                continue
            start, _ = start_over(trios)
            values = [
                {who: v.value for who in ("defended", "undefended", "floor") if (v := getattr(t, who)) is not None}
                for t in trios
            ]
            means = {
                who: mean_over(values, lambda row, who=who: row.get(who))  # type: ignore[misc]
                for who in ("defended", "undefended", "floor")
            }
            result = {
                **{who: mean and mean["mean"] for who, mean in means.items()},
                "head_start": start and start["mean"],
                "head_start_lo": start and start["lo"],
                "head_start_hi": start and start["hi"],
                "n_seeds": len(trios),
                "ruined": labels[key] in spoiled,
                "label": labels[key],
            }
            # rows over the whole withheld set name no category
            found.setdefault(each or "withheld", []).append(result)
    if not found:
        missing["generalisation.withheld"] = "no row of metric 'withheld' after an attack"
        return None
    return {category: _deciding(results) for category, results in found.items()}


def _deciding(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    valid = [result for result in results if result["head_start"] is not None]
    worst, _ = decisive(valid, lambda result: result["head_start"], lambda result: result["ruined"])
    return worst or max(results, key=lambda result: result["defended"])


def cross_domain(entries: Sequence[dict[str, Any]], missing: dict[str, str]) -> dict[str, Any] | None:
    """Per other domain its worst cell, as for the main harms.

    Args:
        entries: `head_start_by_cell`.
    """
    found = {}
    for harm in dict.fromkeys(e["harm"] for e in entries if not main_harm(e["harm"]) and e["harm"] not in WITHHELD):
        own = [entry for entry in entries if entry["harm"] == harm]
        valid = [entry for entry in own if entry["head_start"] is not None]
        worst, _ = decisive(valid, lambda entry: entry["head_start_counted"], ruined)
        worst = worst or max(own, key=lambda entry: entry["defended"]["mean"])
        start = worst["head_start"]
        found[harm] = {
            **{who: worst[who] and worst[who]["mean"] for who in ("defended", "undefended", "floor")},
            "head_start": worst["head_start_counted"],
            "head_start_lo": start and start["lo"],
            "head_start_hi": start and start["hi"],
            "n_seeds": worst["n_seeds"],
            "n_cells": len(own),
            "ruined": ruined(worst),
            "degenerate": worst["degenerate"],
            "label": worst["label"],
        }
    if not found:
        missing["generalisation.cross_domain"] = "no attack with harm of another domain than the defence's"
    return found or None
