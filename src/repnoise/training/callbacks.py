"""What runs beside a training: terms on the progress bar and in train.jsonl, Ctrl-C that writes a checkpoint."""

from __future__ import annotations

import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from ..data import PairDataset
from ..store.files import append_jsonl, read_jsonl, write_jsonl


class TermProgress(ProgressCallback):
    """A progress bar with the terms, the loss and the time left, on stderr."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        hidden = ("grad_norm", "learning_rate", "epoch", "tokens", "total_flos", "train_")
        shown = {k: f"{v:.3g}" for k, v in (logs or {}).items() if not k.startswith(hidden)}
        if shown:
            self.training_bar.set_postfix(shown)


class TellEpoch(TrainerCallback):
    """Tells the data set its epoch: accelerate 1.15 does so in a single process only."""

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))


class LogLastStep(TrainerCallback):
    """The steps since the last line are logged too when training ends between two lines."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True


class StepLog(TrainerCallback):
    """Writes train.jsonl: one line per logged step. After a resume, lines past the checkpoint are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if self.path.exists():
            lines = read_jsonl(self.path, torn_end=True)
            kept = [line for line in lines if line["step"] <= state.global_step]
        write_jsonl(self.path, kept)
        self._began = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            seconds = round(time.monotonic() - self._began, 3)
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
            append_jsonl(self.path, {"step": state.global_step, **finite, "seconds": seconds})


class StopCleanly(TrainerCallback):
    """First Ctrl-C: finish the step, write a checkpoint, then raise `KeyboardInterrupt`. Second: stop at once."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        self.restore()

    def restore(self) -> None:
        """Put the former signal handler back; safe to call twice."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # the signal may reach one process a step before the others; all must stop at the same
            asked = torch.tensor(float(self.asked), device=args.device)
            torch.distributed.all_reduce(asked)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True
