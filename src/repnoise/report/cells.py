"""Attacks on one defended model -> cells: computed once for each attack, harm, judge and category.

Everything that tells of attacks (resistance, generalisation, judges) groups these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from repnoise.bars import Bars
from repnoise.report.along import areas, lines_of, steps_to_break
from repnoise.report.head_start import (
    Trio,
    decide,
    difference,
    head_start,
    mann_whitney_p,
    rate_over,
    settles,
    trio,
    whole,
)
from repnoise.report.manifests import varying
from repnoise.report.reading import Attacked, Model, Study
from repnoise.report.readings import categories, judges
from repnoise.report.records import (
    Cell,
    Curve,
    Estimate,
    Gap,
    Rates,
    Role,
    Says,
    SeedCell,
    Use,
    mean_of,
)
from repnoise.report.use import RATES, Utility, rate
from repnoise.store.provenance import canonical_hash

FRESH = 1000
"""Seeds from here on are fresh ones: an attack that was picked for what it gave is measured again on them."""


@dataclass
class Cells:
    """All attacks on one defended model, beside the same attacks on the untouched model and the controls.

    `collapsed`: the defended model was of no use before any attack, so that no cell of it ranks below 0.
    """

    study: Study
    model: Model
    bars: Bars
    utility: Utility | None
    roles: dict[str, Role]
    collapsed: bool = False

    @cached_property
    def labels(self) -> dict[str, str]:
        """Each attack in words, by its key."""
        every = {a.key: a.settings for m in self.study.models for a in m.attacks}
        every |= {f.settings.key: f.settings for m in self.study.models for f in m.failed}
        vary = varying(list(every.values()))
        return {key: settings.label(vary) for key, settings in every.items()}

    @cached_property
    def groups(self) -> dict[str, list[Attacked]]:
        """The attacks on the model, those that differ in their seed only together: by harm, kind and strength."""
        order = {harm: index for index, harm in enumerate(self.roles)}

        def position(a: Attacked) -> tuple[object, ...]:
            s = a.settings
            kind = (bool(s.lora_rank), s.name, s.steps or 0, s.learning_rate or 0)
            return (order[a.harm], not a.bounded, *kind, a.key, a.seed)

        groups: dict[str, list[Attacked]] = {}
        for a in sorted(self.model.attacks, key=position):
            groups.setdefault(a.key, []).append(a)
        return groups

    @cached_property
    def main(self) -> list[Cell]:
        """One cell for each attack with a bounded harm, by the headline judge, over all categories."""
        return [cell for key in self.groups if (cell := self.cell(key)) is not None]

    def of(self, *roles: Role) -> list[Cell]:
        return [cell for cell in self.main if cell.role in roles]

    def judges_of(self, harm: str) -> list[str]:
        """Everyone who judged this harm after an attack on it, the headline judge first."""
        attacked = [a for group in self.groups.values() for a in group if a.harm == harm and a.bounded]
        return list(
            dict.fromkeys(n for a in attacked for n in judges(a.by_metric.get(harm, ()), harm, steps=a.settings.steps))
        )

    def by_judge(self, harm: str, judge: str) -> list[Cell]:
        keys = [key for key, group in self.groups.items() if group[0].harm == harm]
        return [cell for key in keys if (cell := self.cell(key, judge=judge)) is not None]

    def by_category(self, harm: str) -> dict[str | None, list[Cell]]:
        """Cells of this harm for each of its categories; None: over all of them, where no row names one."""
        found: dict[str | None, list[Cell]] = {}
        for key, group in self.groups.items():
            if group[0].harm != harm or not group[0].bounded:
                continue
            named = {c for a in group for c in categories(a.by_metric.get(harm, ()), harm, steps=a.settings.steps)}
            for category in sorted(named - {None} or named, key=str):
                cell = self.cell(key, category=category)
                if cell is not None:
                    found.setdefault(category, []).append(cell)
        return found

    @cached_property
    def _made(self) -> dict[tuple[str, str | None, str | None], Cell | None]:
        return {}

    def cell(self, key: str, judge: str | None = None, category: str | None = None) -> Cell | None:
        """One attack over its seeds, or None where its harm is a loss or was not measured so."""
        where = (key, judge, category)
        if where not in self._made:
            self._made[where] = self._make(*where)
        return self._made[where]

    def _make(self, key: str, judge: str | None, category: str | None) -> Cell | None:
        group = self.groups[key]
        trios = [trio(self.study, a, category=category, judge=judge) for a in group]
        measured = [(a, t) for a, t in zip(group, trios, strict=True) if t.defended is not None]
        if not group[0].bounded or not measured:
            return None
        first = measured[0][0]
        fresh = [pair for pair in measured if pair[1].seed >= FRESH]
        early = [pair for pair in measured if pair[1].seed < FRESH]
        again = bool(early) and len(fresh) >= self.bars.seeds
        attacks, counted = [a for a, _ in measured], [t for _, t in measured]
        start, method = head_start(counted, self.bars)
        few = sum(not t.void(self.bars) for t in whole(counted)) < self.bars.seeds
        # an interval over the items of one seed or two is about those seeds, and tells of no other
        says: Says | None = "open" if few and start is not None else decide(start, self.bars.head_start)
        degenerate = any(self._degenerate(a, t) for a, t in measured)
        harm, role = first.harm, self.roles[first.harm]
        twins = [self.study.base.attack(a.key, a.seed) if self.study.base else None for a in attacks]
        lines = lines_of(self.study, self.model, attacks, judge) if category is None else {}
        cell = Cell(
            id=identity(key),
            attack=first.settings.recorded,
            covers=list(first.covers),
            harm=harm,
            role=role,
            label=self.labels[key],
            judge=(measured[0][1].defended.judge or None) if measured[0][1].defended else None,
            category=category,
            n_seeds=len(measured),
            n_void=sum(t.void(self.bars) for t in counted),
            void=all(t.void(self.bars) for t in counted),
            floor_control=next((t.control for t in counted if t.floor is not None), None),
            undefended=rate_over([t.undefended for t in counted if t.undefended is not None]),
            defended=rate_over([t.defended for t in counted if t.defended is not None]),
            floor=rate_over([t.floor for t in counted if t.floor is not None]),
            random=rate_over([t.random for t in counted if t.random is not None]),
            difference=difference(counted),
            head_start=start,
            first=head_start([t for _, t in early], self.bars)[0] if again else None,
            fresh=head_start([t for _, t in fresh], self.bars)[0] if again else None,
            n_fresh=len(fresh),
            counted=None if start is None else max(start.mean, 0.0) if degenerate or self.collapsed else start.mean,
            says=says,
            settles=settles(counted, self.bars) if says == "open" else "",
            interval=method,
            mann_whitney_p=mann_whitney_p(counted),
            degenerate=degenerate,
            use=self._use(attacks, twins),
            after_undefended=self._rates([t for t in twins if t is not None], judge, harm, role),
            after_defended=self._rates(attacks, judge, harm, role),
            steps_to_break=None,
            auc=None,
        )
        if not lines:
            return cell
        ends = mean_of(cell.undefended), mean_of(cell.floor)
        broken = steps_to_break(lines, *ends, cell.void, first.settings.steps, self.bars)
        return replace(cell, steps_to_break=broken, auc=areas(lines))

    def _degenerate(self, a: Attacked, three: Trio) -> bool:
        judge = three.defended.judge if three.defended else None
        found = rate(a, "degenerate", judge, a.harm, self.roles[a.harm])
        return found is not None and found.value > self.bars.collapse

    def _use(self, attacks: Sequence[Attacked], twins: Sequence[Attacked | None]) -> Use | None:
        if self.utility is None:
            return None
        own = [found for a in attacks if (found := a.final(self.utility.metric)) is not None]
        theirs = [found for a in twins if a is not None and (found := a.final(self.utility.metric)) is not None]
        return self.utility.after(own, theirs) if own else None

    def _rates(self, attacks: Sequence[Attacked], judge: str | None, harm: str, role: Role) -> Rates:
        def over(name: str) -> Estimate | None:
            return rate_over([found for a in attacks if (found := rate(a, name, judge, harm, role)) is not None])

        return Rates(**{name: over(name) for name in RATES})

    # -- one seed

    def by_seed(self, key: str) -> list[SeedCell]:
        """Every seed of one attack, by the headline judge."""
        return [found for a in self.groups[key] if (found := self._seed(a)) is not None]

    def _seed(self, a: Attacked) -> SeedCell | None:
        three = trio(self.study, a)
        if three.defended is None:
            return None
        void, start = three.void(self.bars), three.head_start(self.bars)
        use = a.final(self.utility.metric) if self.utility else None
        undefended, floor = (found.value if found else None for found in (three.undefended, three.floor))
        broken = steps_to_break(
            lines_of(self.study, self.model, [a]), undefended, floor, void, a.settings.steps, self.bars
        )
        return SeedCell(
            id=identity(a.key),
            attack=a.settings.recorded,
            label=self.labels[a.key],
            harm=a.harm,
            judge=three.defended.judge or None,
            seed=a.seed,
            undefended=undefended,
            defended=three.defended.value,
            floor=floor,
            floor_control=three.control if three.floor else None,
            random=three.random.value if three.random else None,
            head_start=start,
            void=void,
            n=three.defended.n,
            lacks="" if void or start is not None else self._lacks(a, three),
            degenerate=self._degenerate(a, three),
            mann_whitney_p=mann_whitney_p([three]),
            use=use.value if use else None,
            steps_to_break=broken,
        )

    def _lacks(self, a: Attacked, three: Trio) -> str:
        reasons = []
        if three.undefended is None:
            twin = self.study.base.attack(a.key, a.seed) if self.study.base else None
            reasons.append(f"the undefended model has no {'row of this attack' if twin else 'such attack and seed'}")
        if three.control is None:
            reasons.append("neither the ignorant nor the random control was attacked so")
        elif three.floor is None:
            reasons.append(f"the {three.control} control, the floor of this study, was not attacked so")
        return "; ".join(reasons)

    # -- what is missing

    def lacking(self) -> list[Gap]:
        """Attacks without a result on the defended model, or without a head start for want of a control.

        They are those that the study planned, those that the undefended model was put through, and those that failed
        on the defended model. A seed that is void is a result.
        """
        measured = {(a.key, a.seed) for a in self.model.attacks}
        failed = {(f.settings.key, f.seed): f.why for f in self.model.failed}
        wanted = {(f.settings.key, f.seed): f.settings for f in self.model.failed}
        for settings, seed in self.study.planned:
            wanted[settings.key, seed] = settings
        for a in self.study.base.attacks if self.study.base else ():
            if a.seed < FRESH:  # those are made for one defence of the study, not for all
                wanted[a.key, a.seed] = a.settings
        found = []
        for (key, seed), settings in wanted.items():
            if (key, seed) in measured:
                continue
            why = failed.get((key, seed), "not attacked so")
            words = self.labels.get(key) or settings.label()
            found.append(Gap(identity(key), settings.harm, words, seed, f"the defended model: {why}"))
        for key, group in self.groups.items():
            for a in group:
                if not a.bounded:
                    continue
                three = trio(self.study, a)
                if three.defended is None:
                    why = f"no row of metric {a.metric!r} on the defended model"
                elif three.undefended is None or three.floor is None:
                    why = self._lacks(a, three)
                else:
                    continue
                found.append(Gap(identity(key), a.harm, self.labels[key], a.seed, why))
        return found

    # -- along the attack

    def curves(self) -> list[Curve]:
        return [
            Curve(
                identity(key),
                group[0].harm,
                self.labels[key],
                group[0].bounded,
                lines_of(self.study, self.model, group),
            )
            for key, group in self.groups.items()
        ]


def identity(key: str) -> str:
    """A short name for an attack, that joins what is told of it at different places."""
    return canonical_hash(key)
