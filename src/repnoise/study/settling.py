"""What a verdict still needs: the plan that nothing may be missing from, and fresh seeds for cells that could not tell.

The interval of three seeds is wide. A cell whose interval holds the bar, on whichever side its mean lies, is measured
again on fresh seeds, and all of them together decide. Looking twice calls a harmless cell broken no more often than
each look does; how far the worst of many cells was picked for its luck is told by the fresh seeds alone.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import RunError
from ..report.cells import FRESH, identity
from ..report.manifests import Settings
from ..report.reading import PLAN
from ..report.reading import load as read_study
from ..report.summary import section_of
from ..store.files import write_json
from .cell import Cell
from .study import Study
from .target import Target


def write_plan(study: Study) -> None:
    """Write down every attack of the recipe before the first one: the verdict names what has no result."""
    cells = [{**cell.recorded(), "seed": cell.seed} for cell in study.cells()]
    write_json(study.folder / PLAN, {"cells": cells})


def undecided(study: Study) -> list[tuple[Target, Cell]]:
    """Attacks with fresh seeds that would tell more of the cells of this study's defence that cannot tell.

    Empty where the recipe wants none (`fresh_seeds: 0`), where the first pass had fewer seeds than the verdict asks
    for, and where the fresh seeds were measured already.
    """
    wanted = study.recipe.fresh_seeds
    try:
        found = read_study(study.folder)
        model = next((one for one in found.defences if one.folder == study.defended().run.path), None)
        if not wanted or model is None or found.floor is None:
            return []
        section = section_of(found, model)
    except RunError:  # the report says what is wrong
        return []
    open_ = {
        cell.id
        for cell in section.resistance.head_start_by_cell
        if cell.says == "open" and cell.n_fresh < wanted and cell.n_seeds - cell.n_void >= section.bars["seeds"]
    }
    floor = next(one for one in study.controls() if one.run.path == found.floor.folder)
    distinct = {identity(Settings.of(cell.recorded()).key): cell for cell in study.cells()}
    cells = [
        replace(distinct[each], seed=FRESH + index) for each in distinct if each in open_ for index in range(wanted)
    ]
    targets = (study.base(), floor, study.defended())
    return [(target, cell) for cell in cells for target in targets if not study.is_attacked(target, cell)]
