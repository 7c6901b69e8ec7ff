"""The whole loop: defend -> evaluate -> attack everything in the same way -> report."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ..recipes.schema import Recipe
from ..report import write_report
from ..store.files import write_yaml
from .attacking import attack
from .cell import Cell
from .changes import tell_of_attacks
from .defending import check_defence, defend
from .measuring import evaluate
from .resolve import resolve
from .settling import undecided, write_plan
from .study import Study
from .target import Say, Target
from .workers import Failures, carry_out, progress_bar

__all__ = ["Study", "Target", "attack_all", "defend", "measure_all", "report", "resolve", "run", "settle"]


def run(recipe: Recipe, folder: Path, *, jobs: int = 1, say: Say = lambda text: None, quiet: bool = False) -> Path:
    """defend -> attack everything in the same way -> evaluate -> report. Returns the report's path.

    Args:
        jobs: attacks that run at a time, each in a process of its own with its share of the cores.
    """
    study = Study(recipe, folder, say, quiet=quiet)
    measure_all(study)
    attack_all(study, jobs=jobs)
    settle(study, jobs=jobs)
    return report(study)


def measure_all(study: Study, *, defended: bool = True) -> None:
    """Measure the undefended model, the controls and (unless told otherwise) the defended one before any attack;
    the defence is trained if it was not.
    """
    if defended:
        check_defence(study)
    evaluate(study, study.base(), "base")
    for control in study.controls():
        evaluate(study, control, "control")
    if defended:
        defend(study)


def attack_all(study: Study, *, jobs: int = 1) -> None:
    """Attack every target in every way of the recipe that is not done yet.

    One that fails does not stop the others; what failed is raised together at the end.
    """
    write_plan(study)
    todo = [(t, cell) for t in study.targets() for cell in study.cells() if not study.is_attacked(t, cell)]
    if todo:
        tell_of_attacks(study, todo)
        _carry_out(study, todo, jobs)
    else:
        study.say("attacks: all done before, kept")


def settle(study: Study, *, jobs: int = 1) -> None:
    """Measure the cells whose interval cannot tell again, on fresh seeds; see settling.py."""
    todo = undecided(study)
    if todo:
        cells = len({replace(cell, seed=0).on("") for _, cell in todo})
        study.say(f"attacks: {cells} cannot be told from the bar, and are measured again on fresh seeds")
        _carry_out(study, todo, jobs)


def _carry_out(study: Study, todo: list[tuple[Target, Cell]], jobs: int) -> None:
    failures = Failures("attack", len(todo))
    finished = carry_out(attack, todo, jobs, study, _quiet_study, (study.recipe, study.folder))
    with progress_bar(len(todo), "attack", study.quiet) as at, closing(finished):
        for done, (index, error) in enumerate(finished, 1):
            target, cell = todo[index]
            if error is not None:
                failures.add(cell.on(target.run.path.name), error)
            at(done)
    failures.raise_if_any()


def _quiet_study(recipe: Recipe, folder: Path) -> Study:
    return Study(recipe, folder, quiet=True)


def report(study: Study) -> Path:
    run = study.defended().run
    if run.path.is_dir():  # what was added since the defence was trained: evaluations, bars
        write_yaml(run.path / "recipe.yaml", study.written_out)
    return write_report(study.folder)
