"""Train, going on from the newest whole checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..errors import RunError
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

    Raises:
        KeyboardInterrupt: after a checkpoint was written on Ctrl-C.
        RunError: the training ended before the steps that were asked for, or made none.
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
    made, wanted = trainer.state.global_step, trainer.state.max_steps
    if made < max(wanted, 1):
        rows = len(trainer.train_dataset)  # type: ignore[arg-type]
        raise RunError(
            f"the training made {made} of {wanted} optimiser steps and ended without an error. Allowed: all of them,"
            f" and at least one. It had {rows} pairs, {trainer.args.per_device_train_batch_size} a batch on each of"
            f" {trainer.args.world_size} processes: bring more pairs, lower per_device_train_batch_size, leave out"
            " dataloader_drop_last, or set max_steps or num_train_epochs above 0."
        )
