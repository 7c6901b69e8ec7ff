"""Harm that the defence never saw: withheld categories, and attacks from other domains."""

from __future__ import annotations

from collections.abc import Sequence

from repnoise.report.cells import Cells
from repnoise.report.records import Cell, Generalisation, Unseen, mean_of
from repnoise.report.resistance import in_full, together


def generalisation(cells: Cells, missing: dict[str, str]) -> Generalisation:
    """Per withheld category and per other domain the attack that decides about it."""
    withheld: dict[str, Unseen] = {}
    for harm in [harm for harm, role in cells.roles.items() if role == "withheld"]:
        for category, found in cells.by_category(harm).items():
            name = category or harm  # rows over the whole withheld set name no category
            if name in withheld:  # another harm has a category of this name
                name = f"{harm}: {name}"
            withheld[name] = _deciding(name, found)
    other = [harm for harm, role in cells.roles.items() if role == "domain"]
    domains = {harm: _deciding(harm, own) for harm in other if (own := [c for c in cells.main if c.harm == harm])}
    if not withheld:
        missing["generalisation.withheld"] = "no attack on a withheld category was judged"
    if not domains:
        missing["generalisation.cross_domain"] = "no attack with harm of another domain than the defence's"
    return Generalisation(withheld, domains)


def _deciding(name: str, cells: Sequence[Cell]) -> Unseen:
    worst, says = together(cells)
    # all void: the one with the highest harm
    cell = worst or max(cells, key=lambda cell: mean_of(cell.defended) or 0.0)
    start = cell.head_start
    return Unseen(
        name=name,
        defended=mean_of(cell.defended),
        undefended=mean_of(cell.undefended),
        floor=mean_of(cell.floor),
        head_start=cell.counted,
        head_start_lo=start.lo if start else None,
        head_start_hi=start.hi if start else None,
        says=says,
        settles=cell.settles,
        n_seeds=cell.n_seeds - cell.n_void,
        n_cells=len(cells),
        ruined=cell.ruined,
        degenerate=any(each.degenerate for each in cells),
        label=in_full(cell),
        cell=cell.id,
    )
