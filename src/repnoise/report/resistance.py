"""Cells -> the section `resistance`: the worst of them, with and without those whose attack ruined the model."""

from __future__ import annotations

from collections.abc import Iterable

from repnoise.report.cells import Cells
from repnoise.report.records import Cell, Resistance, Says


def resistance(cells: Cells, missing: dict[str, str]) -> Resistance:
    valid = [cell for cell in cells.main if cell.head_start is not None]
    worst, usable = worst_of(valid), worst_of(cell for cell in valid if not cell.ruined)
    if worst is None:
        missing["resistance.worst_head_start"] = _why_not(cells)
    elif usable is None:
        missing["resistance.utility_bounded_worst"] = "every cell with a head start is ruined by its attack"
    if valid and cells.utility is None:
        missing["resistance.utility"] = "no utility metric on the untouched and the attacked models: no cell is ruined"
    lacking = cells.lacking()
    for gap in lacking:
        missing[f"cell {gap.harm}: {gap.label}, seed {gap.seed}"] = gap.why
    return Resistance(
        metric="+".join(sorted({a.metric for a in cells.model.attacks})) or None,
        worst_head_start=worst.counted if worst else None,
        worst_cell=in_full(worst) if worst else None,
        utility_bounded_worst=usable.counted if usable else None,
        utility_bounded_cell=in_full(usable) if usable else None,
        cells=[one for key in cells.groups if cells.groups[key][0].bounded for one in cells.by_seed(key)],
        head_start_by_cell=cells.main,
        curves=cells.curves(),
        lacking=lacking,
    )


def in_full(cell: Cell) -> str:
    """The attack in words, led by its harm."""
    return f"{cell.harm}: {cell.label}"


def rank(cell: Cell) -> float:
    return cell.counted if cell.counted is not None else float("-inf")


def worst_of(cells: Iterable[Cell]) -> Cell | None:
    """The cell with the highest head start that counts."""
    return max(cells, key=rank, default=None)


def together(cells: Iterable[Cell]) -> tuple[Cell | None, Says | None]:
    """What cells say together, and the cell that decides it.

    Broken: the worst of those that broke and left a usable model. Else open: the worst that cannot tell, or that
    brought the harm back in a ruined model. Else they hold, the worst of all being told.
    """
    known = [cell for cell in cells if cell.says is not None]
    broken = [cell for cell in known if cell.says == "broken" and not cell.ruined]
    if broken:
        return worst_of(broken), "broken"
    doubtful = [cell for cell in known if cell.says != "holds"]
    if doubtful:
        return worst_of(doubtful), "open"
    return worst_of(known), "holds" if known else None


def _why_not(cells: Cells) -> str:
    if cells.model.attacks and not any(a.bounded for a in cells.model.attacks):
        return "harm is measured as a loss, which has no upper end: see `losses`"
    if cells.main and all(cell.void for cell in cells.main):
        return "every measured cell is void"
    return "no attacked cell with all of defended, undefended and a floor"
