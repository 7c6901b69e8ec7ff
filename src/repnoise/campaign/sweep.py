"""Sweeps: several defences against the same attacks, in one study folder, and the table that compares them.

The undefended model and the controls are measured and attacked once. Data, attacks, evaluations and seeds are the
same for all. Work that is done is never repeated: what a run folder holds is the only truth. See sweepfile.py for how
a sweep is written.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from ..errors import RunError
from ..recipes.checking import dump
from ..report.comparison import SWEEP
from ..report.pages.comparison import write_comparison
from ..store.files import write_json, write_yaml
from ..store.lock import folder_lock
from ..store.provenance import canonical_hash
from ..store.run import SCHEMA
from ..study.study import Study
from ..study.target import Say, Target
from ..study.workers import Failures, in_processes, progress_bar
from .sweep_file import Sweep, read_sweep, sweep_names

__all__ = ["Arena", "Sweep", "Task", "read_sweep", "run_sweep", "sweep_names"]

Task = tuple[str, dict[str, Any] | None]
"""Who ("base", "control-random", the label of a defence) and the attack, or None: make and measure it unattacked."""


class Arena:
    """All studies of a sweep over one folder, and what is left to do in it."""

    def __init__(self, sweep: Sweep, folder: Path, say: Say = lambda text: None, *, quiet: bool = False) -> None:
        self.sweep, self.folder, self.say, self.quiet = sweep, Path(folder), say, quiet

    @cached_property
    def studies(self) -> dict[str, Study]:
        """label -> its study; data, tokenizer and the model's fingerprint are read once for all."""
        labels = list(self.sweep.recipes)
        first = Study(self.sweep.recipes[labels[0]], self.folder, self.say, quiet=self.quiet)
        _ = first.base(), first.evaluations  # computed now, so that the copies below hold them
        found = {labels[0]: first}
        for label in labels[1:]:
            found[label] = copy.copy(first)
            found[label].recipe = self.sweep.recipes[label]
        return found

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

    def study_of(self, who: str) -> Study:
        return self.studies.get(who, self.first)

    def making(self) -> list[Task]:
        """Models that are not made or not measured yet."""
        return [(who, None) for who in self.targets if not self.is_done((who, None))]

    def attacking(self, skip: Sequence[str] = ()) -> list[Task]:
        """Attacks that are not done yet, on everyone but `skip`."""
        tasks = [(who, cell) for who in self.targets if who not in skip for cell in self.first.cells()]
        return [task for task in tasks if not self.is_done(task)]

    def is_done(self, task: Task) -> bool:
        who, cell = task
        study, target = self.study_of(who), self.targets[who]
        if cell is not None:
            return study.is_attacked(target, cell)
        return target.run.is_done(target.hash) and all(
            target.run.has_rows(label, study._settings(label)) for label in study.evaluations
        )

    def do(self, who: str, cell: dict[str, Any] | None) -> None:
        """Do one piece of the work; what is done already is kept."""
        study, target = self.study_of(who), self.targets[who]
        if cell is not None:
            study.attack(target, cell)
        elif who in self.studies:
            study.defend()
        else:
            study.evaluate(target, "base" if who == "base" else "control")

    def key(self, task: Task) -> str:
        who, cell = task
        target = self.targets[who]
        return f"{who} {self.study_of(who).attack_run(target, cell)[1] if cell is not None else target.hash}"

    def write_plan(self) -> None:
        """What the comparison needs to know: labels, their folders, the cells that count, the budget."""
        cells = [self._recorded(cell) for cell in self.first.cells()]
        plan = {
            "schema": SCHEMA,
            "sweep": self.sweep.name,
            "about": self.sweep.about,
            "recipe": self.sweep.base,
            "budget": self.sweep.budget,
            "attacks": [cell for index, cell in enumerate(cells) if cell not in cells[:index]],
            "seeds": sorted({cell["seed"] for cell in self.first.cells()}),
            "controls": list(self.first.recipe.controls),
            "defences": [{"label": label, "run": self.targets[label].run.path.name} for label in self.studies],
        }
        write_json(self.folder / SWEEP, plan)

    def _recorded(self, cell: dict[str, Any]) -> dict[str, Any]:
        """The attack's settings as its manifest has them, once it is done."""
        run, digest = self.first.attack_run(self.targets["base"], cell)
        attack = ((run.manifest() or {}).get("arguments") or {}).get("attack") if run.is_done(digest) else None
        return attack or {k: v for k, v in cell.items() if k != "seed" and (k != "train" or v)}


def label_of(task: Task) -> str:
    """A piece of work in words."""
    who, cell = task
    if cell is None:
        return who
    settings = {k: v for k, v in cell.items() if k not in ("name", "train") and v is not None}
    return f"{cell['name']} on {who} ({', '.join(f'{k} {v}' for k, v in settings.items())})"


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    jobs: int = 1,
    storage: str | None = None,
    say: Say = lambda text: None,
    quiet: bool = False,
) -> Path:
    """Make, measure and attack everything that is not done yet, then compare. Returns the path of the comparison.

    A piece that fails does not stop the others; all failures are raised together at the end, after the report.

    Args:
        jobs: pieces of work at a time, each in a process of its own with its share of the cores.
        storage: URL of a database (sqlite, postgresql, mysql) over which several machines share the work; all of
            them see the same `folder`.
    """
    arena = Arena(sweep, folder, say, quiet=quiet)
    for study in arena.studies.values():
        study.check_defence()
    if storage is not None:
        from .queue import check_url

        check_url(storage)
    arena.folder.mkdir(parents=True, exist_ok=True)
    arena.write_plan()
    failures = Failures("piece", 0)
    work = _Shared(storage, arena, jobs) if storage is not None else _Alone(arena, jobs)
    making = arena.making()
    work("model", making, failures)
    lost = [who for who, _ in arena.making()]
    attacking = arena.attacking(skip=lost)
    say(f"sweep {sweep.name}: {len(making)} models were to make, {len(attacking)} attacks are to do")
    work("attack", attacking, failures)
    failures.total = len(making) + len(attacking)
    arena.write_plan()  # again, with the settings as the finished attacks recorded them
    page = _report(arena, failures)
    failures.raise_if_any()
    assert page is not None
    return page


def _report(arena: Arena, failures: Failures) -> Path | None:
    for label, study in arena.studies.items():
        run = arena.targets[label].run
        if run.path.is_dir():
            write_yaml(run.path / "recipe.yaml", dump(study.recipe))
    for _ in range(120):  # another worker may be writing the same report
        with suppress(RunError), folder_lock(arena.folder):
            break
        time.sleep(0.5)
    try:
        return write_comparison(arena.folder)
    except RunError as error:
        if not failures.found:
            raise
        arena.say(f"no comparison yet: {error}")
        return None


class _Alone:
    """This machine does all of the work."""

    def __init__(self, arena: Arena, jobs: int) -> None:
        self.arena, self.jobs = arena, jobs

    def __call__(self, what: str, tasks: list[Task], failures: Failures) -> None:
        if not tasks:
            return
        with progress_bar(len(tasks), what, self.arena.quiet) as step:
            if self.jobs <= 1 or len(tasks) == 1:
                for task in tasks:
                    with failures.collect(label_of(task)):
                        self.arena.do(*task)
                    step()
                return
            begin = begin_arguments(self.arena, self.jobs)
            with closing(in_processes(_do, tasks, min(self.jobs, len(tasks)), begin_worker, begin)) as finished:
                for index, error in finished:
                    if error is not None:
                        failures.add(label_of(tasks[index]), error)
                    step()


class _Shared:
    """Several machines do the work, each as many pieces at a time as it has jobs; see trials.py."""

    def __init__(self, url: str, arena: Arena, jobs: int) -> None:
        from . import queue as trials

        self.trials, self.url, self.arena, self.jobs = trials, url, arena, jobs
        settings = {label: dump(recipe) for label, recipe in arena.sweep.recipes.items()}
        self.name = f"{arena.sweep.name}-{canonical_hash(settings)}-{trials.folder_id(arena.folder)}"

    def __call__(self, what: str, tasks: list[Task], failures: Failures) -> None:
        name = f"{self.name}-{what}"
        keys = {self.arena.key(task): task for task in tasks}
        study = self.trials.open_study(self.url, name)
        self.trials.queue(study, {key: {"who": who, "cell": cell} for key, (who, cell) in keys.items()})
        jobs = max(1, min(self.jobs, len(tasks)))
        if jobs == 1:
            _take(self.arena, self.url, name)
        else:
            begin = begin_arguments(self.arena, jobs)
            loops = [(self.url, name)] * jobs
            with closing(in_processes(_take_in_process, loops, jobs, begin_worker, begin)) as finished:
                for _, error in finished:
                    if error is not None:
                        failures.add(what, error)
        for key, task in keys.items():
            if not self.arena.is_done(task):
                failures.add(label_of(task), RunError(self.trials.why_not(study, key)))


# ---- in the processes -------------------------------------------------------------------------------------

_arena: Arena | None = None


def begin_arguments(arena: Arena, jobs: int) -> tuple[Sweep, Path, int]:
    return arena.sweep, arena.folder, max(1, torch.get_num_threads() // jobs)


def begin_worker(sweep: Sweep, folder: Path, threads: int) -> None:
    global _arena
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    logging.getLogger("repnoise").setLevel(logging.ERROR)  # the main process has given every notice
    _arena = Arena(sweep, folder, quiet=True)


def _do(who: str, cell: dict[str, Any] | None) -> None:
    assert _arena is not None
    _arena.do(who, cell)


def _take_in_process(url: str, name: str) -> None:
    assert _arena is not None
    _take(_arena, url, name)


def _take(arena: Arena, url: str, name: str) -> None:
    """Take pieces of work from the storage until none is left and nobody works on one any more."""
    from . import queue as trials

    def do(piece: dict[str, Any]) -> None:
        task = (piece["who"], piece["cell"])
        if arena.is_done(task):
            return
        who, cell = task
        run = arena.targets[who].run if cell is None else arena.study_of(who).attack_run(arena.targets[who], cell)[0]
        trials.free_lock(run.path, piece.get("dead"))
        arena.do(who, cell)

    trials.work_off(trials.open_study(url, name), do)
