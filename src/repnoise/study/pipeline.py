"""The whole loop: defend -> evaluate -> attack everything in the same way -> report."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ..recipes.schema import Recipe
from .resolve import resolve
from .study import Study
from .target import Say, Target
from .workers import Failures, in_processes, progress_bar

__all__ = ["Study", "Target", "attack_all", "measure_all", "resolve", "run"]


def run(recipe: Recipe, folder: Path, *, jobs: int = 1, say: Say = lambda text: None, quiet: bool = False) -> Path:
    """defend -> attack everything in the same way -> evaluate -> report. Returns the report's path.

    Args:
        jobs: attacks that run at a time, each in a process of its own with its share of the cores.
    """
    study = Study(recipe, folder, say, quiet=quiet)
    measure_all(study)
    attack_all(study, jobs=jobs)
    return study.report()


def measure_all(study: Study, *, defended: bool = True) -> None:
    """Measure the undefended model, the controls and (unless told otherwise) the defended one before any attack;
    the defence is trained if it was not.
    """
    if defended:
        study.check_defence()
    study.evaluate(study.base(), "base")
    for control in study.controls():
        study.evaluate(control, "control")
    if defended:
        study.defend()


def attack_all(study: Study, *, jobs: int = 1) -> None:
    """Attack every target in every way of the recipe that is not done yet.

    One that fails does not stop the others; what failed is raised together at the end.
    """
    todo = [(t, cell) for t in study.targets() for cell in study.cells() if not study.is_attacked(t, cell)]
    if not todo:
        study.say("attacks: all done before, kept")
        return
    failures = Failures("attack", len(todo))
    with progress_bar(len(todo), "attack", study.quiet) as step:
        if jobs <= 1:
            for target, cell in todo:
                with failures.collect(_label(target, cell)):
                    study.attack(target, cell)
                step()
        else:
            threads = max(1, torch.get_num_threads() // jobs)
            begin = (study.recipe, study.folder, threads)
            with closing(in_processes(_attack, todo, min(jobs, len(todo)), _begin, begin)) as finished:
                for index, error in finished:
                    if error is not None:
                        failures.add(_label(*todo[index]), error)
                    step()
    failures.raise_if_any()


def _label(target: Target, cell: dict[str, Any]) -> str:
    settings = {k: v for k, v in cell.items() if k not in ("name", "train") and v is not None}
    return f"{cell['name']} on {target.run.path.name} ({', '.join(f'{k} {v}' for k, v in settings.items())})"


_study: Study | None = None  # of a worker process


def _begin(recipe: Recipe, folder: Path, threads: int) -> None:
    global _study
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()  # those of huggingface_hub too, which ours follow
    logging.getLogger("repnoise").setLevel(logging.ERROR)  # the main process has given every notice
    _study = Study(recipe, folder, quiet=True)


def _attack(target: Target, cell: dict[str, Any]) -> None:
    assert _study is not None
    _study.attack(target, cell)
