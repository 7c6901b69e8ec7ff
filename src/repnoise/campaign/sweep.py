"""Sweeps: several defences against the same attacks, in one study folder, and the table that compares them.

The undefended model and the controls are measured and attacked once, and work that is done is never repeated: what a
run folder holds is the only truth. Several machines that see the folder share the work, with the folder's locks as
their queue: every worker does the first piece whose lock is free, and waits at the end for those that others hold. See
sweep_file.py for how a sweep is written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ..errors import RunError
from ..report.pages.comparison import write_comparison
from ..store.files import write_yaml
from ..store.lock import InUseError, folder_lock, is_free
from ..study.cell import Cell
from ..study.changes import tell_of_attacks
from ..study.defending import check_defence
from ..study.target import Say
from ..study.workers import Failures, carry_out, progress_bar
from .sweep_file import Sweep, read_sweep, sweep_names
from .sweep_studies import Piece, SweepStudies, in_words

__all__ = ["Piece", "Sweep", "SweepStudies", "read_sweep", "run_sweep", "share", "sweep_names"]

PAUSE = 1.0  # seconds between two looks at what others do
PATIENCE = 60  # seconds that another worker may take to write the same report


def run_sweep(sweep: Sweep, folder: Path, *, jobs: int = 1, say: Say = lambda text: None, quiet: bool = False) -> Path:
    """Make, measure and attack everything that is not done yet, then compare. Returns the path of the comparison.

    A piece that fails does not stop the others; all failures are raised together at the end, after the report.

    Args:
        jobs: pieces of work at a time, each in a process of its own with its share of the cores.
    """
    studies = SweepStudies(sweep, folder, say, quiet=quiet)
    for study in studies.studies.values():
        check_defence(study)
    studies.folder.mkdir(parents=True, exist_ok=True)
    studies.write_plan()
    failures = Failures("piece", 0)
    making = studies.making()
    share(studies, "model", making, jobs, failures)
    lost = [who for who, _ in studies.making()]
    attacking = studies.attacking(skip=lost)
    say(f"sweep {sweep.name}: {len(making)} models were to make, {len(attacking)} attacks are to do")
    tell_of_attacks(studies.first, [(studies.targets[who], cell) for who, cell in attacking if cell is not None])
    share(studies, "attack", attacking, jobs, failures)
    again = studies.undecided()
    if again:
        say(f"sweep {sweep.name}: {len(again)} attacks on fresh seeds, for cells that cannot be told from the bar")
        share(studies, "attack", again, jobs, failures)
    failures.total = len(making) + len(attacking) + len(again)
    page = _report(studies, failures)
    failures.raise_if_any()
    assert page is not None
    return page


def share(studies: SweepStudies, what: str, pieces: Sequence[Piece], jobs: int, failures: Failures) -> None:
    """Do every piece that nobody else does; return when all of them are done or have failed, here or elsewhere."""
    left = list(pieces)
    with progress_bar(len(pieces), what, studies.quiet) as at:
        while left:
            held: list[Piece] = []
            work = carry_out(_do, left, jobs, studies, _quiet_studies, studies.arguments)
            with closing(work) as finished:
                for done, (index, error) in enumerate(finished, len(pieces) - len(left) + 1):
                    if isinstance(error, InUseError) and error.alive:
                        held.append(left[index])
                    elif error is not None:
                        failures.add(in_words(left[index]), error)
                    at(done - len(held))
            left = _wait(studies, held)


def _wait(studies: SweepStudies, held: list[Piece]) -> list[Piece]:
    """Wait until one of the pieces that others hold is free again and not done; gives all that are not done."""
    while held := [piece for piece in held if not studies.is_done(piece)]:
        if any(is_free(studies.run_of(piece).path) for piece in held):
            return held
        time.sleep(PAUSE)
    return []


def _do(studies: SweepStudies, who: str, cell: Cell | None) -> None:
    studies.do(who, cell)


def _quiet_studies(sweep: Sweep, folder: Path, began: str) -> SweepStudies:
    return SweepStudies(sweep, folder, quiet=True, began=began)


def _report(studies: SweepStudies, failures: Failures) -> Path | None:
    """The comparison, written by one worker at a time; None where none can be written and the failures say why."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with folder_lock(studies.folder):
                for label, study in studies.studies.items():
                    run = studies.targets[label].run
                    if run.path.is_dir():
                        write_yaml(run.path / "recipe.yaml", study.written_out)
                return write_comparison(studies.folder)
        except InUseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
        except RunError as error:
            if not failures.found:
                raise
            studies.say(f"no comparison yet: {error}")
            return None
