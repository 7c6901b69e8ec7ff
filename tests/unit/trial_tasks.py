"""Workers of test_sweep_trials.py, each a process of its own: python trial_tasks.py URL NAME FOLDER KIND [HOW MANY]."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from repnoise.campaign import queue as trials
from repnoise.errors import RunError

PIECES = {f"piece {n}": {"n": n} for n in range(12)}


def wait_for_all(folder: Path, what: str, workers: int) -> None:
    (folder.parent / f"{what}.{os.getpid()}").touch()
    while len(list(folder.parent.glob(f"{what}.*"))) < workers:
        time.sleep(0.01)


def main(url: str, name: str, folder: Path, kind: str = "", workers: str = "1") -> None:
    wait_for_all(folder, "ready", int(workers))
    study = trials.open_study(url, name)
    trials.queue(study, PIECES)
    wait_for_all(folder, "queued", int(workers))

    def do(piece: dict[str, Any]) -> None:
        with (folder / f"{piece['n']}.{os.getpid()}").open("x") as file:  # twice in one process is an error
            file.write(str(piece.get("dead") or ""))
        if kind == "hang":
            time.sleep(600)
        if kind == "fail" and piece["n"] == 3:
            raise RunError("piece 3 went wrong")
        time.sleep(0.05)

    trials.work_off(study, do, pause=0.1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
