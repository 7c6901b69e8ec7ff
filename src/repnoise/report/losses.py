"""Harm and harmless behaviour as losses, for models whose harm no judge told."""

from __future__ import annotations

from collections.abc import Sequence

from repnoise.intervals import mean_interval, paired_interval
from repnoise.report.along import lines_of
from repnoise.report.cells import Cells, identity
from repnoise.report.head_start import EPSILON
from repnoise.report.reading import DEFENDED, Attacked, Model
from repnoise.report.readings import Reading, shared
from repnoise.report.records import Estimate, LossRow

OTHERS = ("harmless_loss", "refusal_rate", "degenerate_rate")


def losses(cells: Cells, missing: dict[str, str]) -> list[LossRow]:
    """Losses and rates of the untouched and the defended model, before and after each attack."""
    table: list[LossRow] = []
    main = next((f"{harm}_loss" for harm, role in cells.roles.items() if role == "main"), "harmful_loss")
    for one in (cells.study.base, cells.model):
        if one is None:
            continue
        before = {metric: one.before(metric) for metric in (main, *OTHERS)}
        if any(before.values()):
            values = {metric: Estimate.of(found) if found else None for metric, found in before.items()}
            table.append(_row(None, one, None, values.pop(main), values))
        groups: dict[str, list[Attacked]] = {}
        for a in one.attacks:
            groups.setdefault(a.key, []).append(a)
        for key in [*(k for k in cells.groups if k in groups), *(k for k in groups if k not in cells.groups)]:
            row = _attacked(cells, one, key, groups[key])
            if row is not None:
                table.append(row)
    if not table:
        missing["losses"] = "no rows of a harmful or a harmless loss"
    return table


def _row(
    key: str | None,
    one: Model,
    a: Attacked | None,
    harmful: Estimate | None,
    others: dict[str, Estimate | None],
    words: str = "before any attack",
    *,
    difference: Estimate | None = None,
    steps_to_break: int | None = None,
    n_seeds: int = 1,
) -> LossRow:
    return LossRow(
        id=identity(key) if key else None,
        model=one.role,
        attack=a.settings.recorded if a else None,
        label=words,
        harm=a.harm if a else None,
        harmful_loss=harmful,
        **{metric: others.get(metric) for metric in OTHERS},
        difference=difference,
        steps_to_break=steps_to_break,
        n_seeds=n_seeds,
    )


def _attacked(cells: Cells, one: Model, key: str, group: Sequence[Attacked]) -> LossRow | None:
    first = group[0]
    metric = f"{first.harm}_loss"
    found = {m: [v.value for a in group if (v := a.final(m)) is not None] for m in (metric, *OTHERS)}
    if not found[metric] and not found["harmless_loss"]:
        return None
    values = {m: Estimate.of(mean_interval(v)) if v else None for m, v in found.items()}
    start = cells.study.base.before(metric) if cells.study.base else None
    line = lines_of(cells.study, cells.model, group).get(one.role, []) if first.metric == metric else []
    back = [int(p.step) for p in line if start is not None and p.mean <= start.value + EPSILON]
    return _row(
        key,
        one,
        first,
        values.pop(metric),
        values,
        f"{first.harm}: {cells.labels[key]}",
        difference=_difference(cells, group, metric) if one.role == DEFENDED else None,
        steps_to_break=back[0] if back else None,
        n_seeds=len(group),
    )


def _difference(cells: Cells, group: Sequence[Attacked], metric: str) -> Estimate | None:
    """Harmful loss after the attack, defended minus undefended, over seeds and rows; by the seeds without rows."""
    pairs: list[tuple[Reading, Reading]] = []
    for a in group:
        twin = cells.study.base.attack(a.key, a.seed) if cells.study.base else None
        own, theirs = a.final(metric), twin.final(metric) if twin else None
        if own is not None and theirs is not None:
            pairs.append((own, theirs))
    if not pairs:
        return None
    items = [shared(*pair) for pair in pairs]
    if all(items) and len({each[0].shape for each in items if each}) == 1:
        grids = [[each[index].mean(0) for each in items if each] for index in (0, 1)]
        return Estimate.of(paired_interval(grids[0], grids[1], bounds=None))
    return Estimate.of(mean_interval([own.value - theirs.value for own, theirs in pairs]))
