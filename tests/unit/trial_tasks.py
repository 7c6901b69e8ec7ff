"""Workers of test_queue.py, each a process of its own: python trial_tasks.py URL NAME FOLDER KIND [HOW MANY]."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repnoise.campaign import queue
from repnoise.campaign.search_results import is_over
from repnoise.errors import RunError

WANTED = 12


def wait_for_all(folder: Path, what: str, workers: int) -> None:
    (folder.parent / f"{what}.{os.getpid()}").touch()
    while len(list(folder.parent.glob(f"{what}.*"))) < workers:
        time.sleep(0.01)


def main(url: str, name: str, folder: Path, kind: str = "", workers: str = "1") -> None:
    wait_for_all(folder, "ready", int(workers))
    study = queue.open_study(url, name)
    wait_for_all(folder, "open", int(workers))

    def objective(trial: Any) -> float:
        with queue.kept_error(trial):
            x = trial.suggest_float("x", 0, 1)
            (folder / f"{trial.number}.{os.getpid()}").write_text(f"{x}")
            if kind == "hang":
                time.sleep(600)
            if kind == "fail" and trial.number == 3:
                raise RunError("trial 3 went wrong")
            time.sleep(0.05)
            return float(x)

    def more(found: Sequence[Any]) -> bool:
        return sum(is_over(trial) or trial.state.name == "RUNNING" for trial in found) < WANTED

    queue.run_trials(study, objective, more=more, pause=0.1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
