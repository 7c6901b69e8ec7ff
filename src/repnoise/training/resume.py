"""Train, going on from the newest whole checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from .callbacks import StopCleanly
from .trainer import ObjectiveTrainer


def newest_checkpoint(folder: Path) -> str | None:
    """A killed run may leave a checkpoint without its last file, trainer_state.json: that one is removed."""
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))) is not None:
        if (Path(found) / "trainer_state.json").exists():
            return found
        shutil.rmtree(found)
    return None


def train(trainer: ObjectiveTrainer, *, resumable: bool = True) -> None:
    """Run the trainer; with `resumable`, go on from the newest whole checkpoint of its output folder.

    Raises `KeyboardInterrupt` after a checkpoint was written on Ctrl-C.
    """
    folder = Path(str(trainer.args.output_dir))
    with trainer.args.main_process_first(local=False, desc="looking for a checkpoint"):
        checkpoint = newest_checkpoint(folder) if resumable else None
    stop = StopCleanly()
    if resumable:
        trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        stop.restore()
    if stop.asked:
        raise KeyboardInterrupt
