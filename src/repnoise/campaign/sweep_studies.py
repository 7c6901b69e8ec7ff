"""The studies of a sweep over one folder: who is in it, and which pieces of work there are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from ..errors import RunError
from ..report.comparison import SWEEP
from ..store.files import now, write_json
from ..store.run import SCHEMA, Run
from ..study.attacking import attack
from ..study.cell import Cell
from ..study.defending import defend
from ..study.inputs import Inputs
from ..study.measuring import evaluate
from ..study.settling import undecided, write_plan
from ..study.study import Study
from ..study.target import Say, Target
from .sweep_file import Sweep

Piece = tuple[str, Cell | None]
"""Who ("base", "control-random", the label of a defence) and the attack, or None: make and measure it unattacked."""


class SweepStudies:
    """One study for each defence. Data, attacks, evaluations and seeds are the same for all, and read once.

    Args:
        began: when the command was started; what another worker has tried since then is not tried again.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        say: Say = lambda text: None,
        *,
        quiet: bool = False,
        began: str | None = None,
    ) -> None:
        self.sweep, self.folder, self.say, self.quiet = sweep, Path(folder), say, quiet
        self.began = began or now()

    @property
    def arguments(self) -> tuple[Sweep, Path, str]:
        """What makes the same object in another process."""
        return self.sweep, self.folder, self.began

    @cached_property
    def studies(self) -> dict[str, Study]:
        """Label of the defence -> its study."""
        recipes = self.sweep.recipes
        shared = Inputs(next(iter(recipes.values())), self.say)
        return {
            label: Study(recipe, self.folder, self.say, quiet=self.quiet, shared=shared)
            for label, recipe in recipes.items()
        }

    @property
    def first(self) -> Study:
        return next(iter(self.studies.values()))

    @cached_property
    def targets(self) -> dict[str, Target]:
        """Everyone who is measured and attacked, the undefended model first."""
        return {
            "base": self.first.base(),
            **{target.run.path.name: target for target in self.first.controls()},
            **{label: study.defended() for label, study in self.studies.items()},
        }

    def making(self) -> list[Piece]:
        """Models that are not made or not measured yet."""
        return [(who, None) for who in self.targets if not self.is_done((who, None))]

    def attacking(self, skip: Sequence[str] = ()) -> list[Piece]:
        """Attacks that are not done yet, on everyone but `skip`."""
        pieces = [(who, cell) for who in self.targets if who not in skip for cell in self.first.cells()]
        return [piece for piece in pieces if not self.is_done(piece)]

    def undecided(self) -> list[Piece]:
        """Attacks on fresh seeds, for cells of any defence that cannot be told from the bar."""
        who = {target.run.path: name for name, target in self.targets.items()}
        pieces = [(who[t.run.path], cell) for study in self.studies.values() for t, cell in undecided(study)]
        return [piece for index, piece in enumerate(pieces) if piece not in pieces[:index]]

    def is_done(self, piece: Piece) -> bool:
        who, cell = piece
        study, target = self._study_of(who), self.targets[who]
        if cell is not None:
            return study.is_attacked(target, cell)
        return target.run.is_done(target.hash) and not study.lacking(target.run)

    def do(self, who: str, cell: Cell | None) -> None:
        """Do one piece of the work; what is done already is kept.

        Raises:
            InUseError: another worker does it.
            RunError: it failed, here or with another worker.
        """
        manifest = self.run_of((who, cell)).manifest() or {}
        if manifest.get("status") == "failed" and manifest["finished"] > self.began:
            raise RunError(f"failed with another worker: {manifest['error']}")
        self._do(who, cell)

    def run_of(self, piece: Piece) -> Run:
        """Where its result goes, and whose lock its worker holds."""
        who, cell = piece
        target = self.targets[who]
        return target.run if cell is None else self._study_of(who).attack_run(target, cell)[0]

    def write_plan(self) -> None:
        """What the comparison needs to know: labels, their folders, the cells that count, the budget."""
        write_plan(self.first)
        cells = self.first.cells()
        attacks = [cell.recorded() for cell in cells]
        plan = {
            "schema": SCHEMA,
            "sweep": self.sweep.name,
            "about": self.sweep.about,
            "recipe": self.sweep.base,
            "budget": self.sweep.budget,
            "attacks": [each for index, each in enumerate(attacks) if each not in attacks[:index]],
            "seeds": sorted({cell.seed for cell in cells}),
            "controls": list(self.first.recipe.controls),
            "defences": [{"label": label, "run": self.targets[label].run.path.name} for label in self.studies],
        }
        write_json(self.folder / SWEEP, plan)

    def _do(self, who: str, cell: Cell | None) -> None:
        study, target = self._study_of(who), self.targets[who]
        if cell is not None:
            attack(study, target, cell)
        elif who in self.studies:
            defend(study)
        else:
            evaluate(study, target, "base" if who == "base" else "control")

    def _study_of(self, who: str) -> Study:
        return self.studies.get(who, self.first)


def in_words(piece: Piece) -> str:
    who, cell = piece
    return who if cell is None else cell.on(who)
