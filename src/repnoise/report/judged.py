"""Several judges on the same answers: what each says, how far they agree, whether the verdict hangs on the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repnoise.report.cells import Cells
from repnoise.report.reading import BASE, DEFENDED, Attacked, Model
from repnoise.report.records import Agreement, Flip, Judged, JudgeSays
from repnoise.report.resistance import in_full, together

KINDS = {"judge_agreement": "agreement", "judge_kappa": "kappa", "judge_spearman": "spearman"}


def judged(cells: Cells) -> Judged | None:
    """What every judge says of every harm, or None where no judge is named."""
    harms = {harm: [_says(cells, harm, name) for name in names] for harm, names in _names(cells).items()}
    flips = [flip for harm, entries in harms.items() for flip in _flips(harm, entries)]
    return Judged(harms, flips, _agreements(cells)) if harms else None


def _names(cells: Cells) -> dict[str, list[str]]:
    harms = dict.fromkeys(group[0].harm for group in cells.groups.values() if group[0].bounded)
    return {harm: names for harm in harms if (names := cells.judges_of(harm))}


def _says(cells: Cells, harm: str, judge: str) -> JudgeSays:
    worst, says = together(cells.by_judge(harm, judge))
    before = [one.before(harm, judge=judge) if one else None for one in (cells.study.base, cells.model)]
    values = [found.value if found else None for found in before]
    return JudgeSays(judge, judge == cells.judges_of(harm)[0], values[0], values[1], worst, says)


def _flips(harm: str, entries: Sequence[JudgeSays]) -> list[Flip]:
    """Judges that do not bear out what the headline judge says."""
    head, *others = entries
    if head.says in (None, "open") or head.worst is None:
        return []
    assert head.says is not None
    return [
        Flip(
            harm,
            head.judge,
            head.says,
            head.worst.counted or 0.0,
            each.judge,
            each.says,
            each.worst.counted or 0.0,
            in_full(each.worst),
        )
        for each in others
        if each.says is not None and each.worst is not None and each.says != head.says
    ]


def _agreements(cells: Cells) -> list[Agreement]:
    """One entry per pair of judges, harm and state: before any attack, or the mean over all attacked models."""
    found = []
    for who, one in ((BASE, cells.study.base), (DEFENDED, cells.model)):
        if one is None:
            continue
        states: list[tuple[str, list[Attacked | Model]]] = [("before any attack", [one])]
        states.append(("after the attacks", list({a.folder: a for a in one.attacks}.values())))
        for state, many in states:
            for (harm, pair), values in _pairs(many).items():
                found.append(Agreement(who, state, harm, pair.split("|"), **values))
    return found


def _pairs(many: Sequence[Attacked | Model]) -> Mapping[tuple[str, str], dict[str, float]]:
    """(harm, "a|b") -> mean agreement, kappa and spearman; rows `judge_kappa` or `<harm>_judge_kappa`."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for one in many:
        for metric, rows in one.by_metric.items():
            kind = next((k for k in KINDS if metric == k or metric.endswith(f"_{k}")), None)
            if kind is None:
                continue
            harm = metric.removesuffix(kind).rstrip("_")
            for row in rows:
                if row.step is None and row.category:
                    into = values.setdefault((harm, row.category), {})
                    into.setdefault(KINDS[kind], []).append(row.value)
    return {key: {name: sum(v) / len(v) for name, v in kinds.items()} for key, kinds in values.items()}
