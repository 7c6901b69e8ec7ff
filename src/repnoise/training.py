"""The only training loop: `transformers.Trainer`, driven by an `Objective`.

Defences and attacks differ in their objective and in nothing else, so both run through `ObjectiveTrainer`.
"""

from __future__ import annotations

import inspect
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from .data import PairDataset, StreamCollator, pad_id
from .errors import ConfigError, DataError, RunError
from .models import unwrap
from .runs import append_jsonl, read_jsonl, write_jsonl

if TYPE_CHECKING:
    from .data import Pair, Row

Stream = dict[str, Tensor]


@dataclass
class Window:
    """What the micro-batches of one optimiser step share, so that accumulation changes no deterministic term.

    Attributes:
        seed: seed of the training run.
        step: optimiser steps done before this one.
        index: position of this micro-batch among those of all processes, in the order of the data: two processes
            with one micro-batch each see the indices, and so draw the noise, of one process with two.
        size: number of micro-batches on one process. A term that is a mean over micro-batches is divided by it;
            the mean over processes is taken with the gradients.
        tokens: per stream, trained tokens of the whole optimiser step divided by the number of processes
            (gradients are averaged over processes, so a sum divided by this is the global token mean).
        shared: what `Objective.begin_step` returned.
    """

    seed: int = 0
    step: int = 0
    index: int = 0
    size: int = 1
    tokens: dict[str, float] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    def generator(self, name: str, *, per_micro_batch: bool = True) -> torch.Generator:
        """Random numbers that depend on (seed, step, name[, micro-batch]) only.

        No state is carried from step to step, so a resumed run draws what an uninterrupted one would have drawn.
        """
        key = (self.seed, self.step, self.index if per_micro_batch else -1, *name.encode())
        mixed = 1469598103934665603  # FNV-1a over the key
        for part in key:
            mixed = ((mixed ^ (part & 0xFFFFFFFF)) * 1099511628211) % 2**63
        return torch.Generator().manual_seed(mixed)


class Objective:
    """A loss made of named terms; subclasses are defences and attacks.

    Attributes:
        needs: names of the batch streams that `terms` reads: "harmful", "harmless", "retain".
        same_length: pad all streams to one length (only the released loss compares them by position).
        retain_batch: retain rows drawn beside each pair.
        vector: arguments of `models.add_lora`: train this adapter and not the weights; it is released beside them
            and active while others train (models/vector.py).
        handles_weights: `terms` reads weights, copies the model or calls autograd; DeepSpeed ZeRO-3 is refused.
    """

    needs: tuple[str, ...] = ()
    same_length: bool = False
    retain_batch: int = 1
    vector: Mapping[str, Any] | None = None
    handles_weights: ClassVar[bool] = False

    def setup(self, model: nn.Module) -> None:
        """Called once before training, with the model as it is then (to keep a frozen copy, for example)."""

    def begin_step(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Called before an optimiser step of several micro-batches with all of them; the result is `Window.shared`.

        Only a term that is no sum over tokens needs it. Values are per process and must be summable: they are
        added up over processes and divided by their number, as token counts are.
        """
        return {}

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Named, already weighted scalars whose sum is the loss.

        Args:
            batch: for each stream `input_ids`, `attention_mask`, `labels`, all int64 (B, T), labels -100 where
                nothing is trained; and under "window" the `Window` (absent outside the trainer).
        """
        raise NotImplementedError(f"{type(self).__name__} must define terms()")


def window_of(batch: Mapping[str, Any]) -> Window:
    """The batch's window, or that of a batch which stands alone."""
    window = batch.get("window")
    return window if window is not None else Window()


def forward(model: nn.Module, stream: Stream) -> Tensor:
    """Logits (B, T, V) of one stream."""
    output = model(input_ids=stream["input_ids"], attention_mask=stream["attention_mask"], use_cache=False)
    return output.logits


def hidden_pass(model: nn.Module, stream: Stream) -> None:
    """A forward pass for the sake of captured activations: the head runs on the last position only, if it can.

    The call goes through the model itself, not its backbone, so that DDP and FSDP see it.
    """
    short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters else {}
    model(input_ids=stream["input_ids"], attention_mask=stream["attention_mask"], use_cache=False, **short)


def trained_tokens(stream: Stream) -> float:
    """Number of labels that count after the shift by one."""
    return float((stream["labels"][:, 1:] != -100).sum())


class ObjectiveTrainer(Trainer):
    """`transformers.Trainer` whose loss is the sum of an objective's terms.

    Args:
        objective: the defence or attack.
        train_dataset: a list of `Pair`, or any dataset whose items are {stream: {"input_ids", "labels"}}.
        retain_dataset: rows for objectives that need the stream "retain" (with a list of pairs only).
        template, max_length: how pairs become tokens (with a list of pairs only).
        log_file: a JSONL file that gets one line per optimiser step.

    Every term is logged with the loss. Raises `RunError` when the loss is not finite; the weights of the last
    checkpoint are untouched by that step.
    """

    objective: Objective
    model: nn.Module

    def __init__(
        self,
        model: Any = None,
        objective: Objective | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Sequence[Pair] | Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        retain_dataset: Sequence[Row] | None = None,
        template: str = "auto",
        max_length: int = 256,
        log_file: Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if objective is None:
            raise TypeError("ObjectiveTrainer needs an objective, for example RepNoise(alpha=1.0, beta=1e-3)")
        self.objective = objective
        args = args or TrainingArguments(output_dir="trainer_output", report_to="none")
        args.remove_unused_columns = False  # our items are nested by stream; the base class would drop them all
        if isinstance(train_dataset, list):
            if processing_class is None:
                raise TypeError("a list of pairs needs processing_class, the tokenizer")
            streams = tuple(objective.needs)
            train_dataset = PairDataset(
                train_dataset,
                processing_class,
                template=template,
                max_length=max_length,
                retain=retain_dataset,
                retain_batch=objective.retain_batch,
                streams=streams,
                seed=args.seed,
            )
        if "data_collator" not in kwargs:
            if processing_class is None:
                raise TypeError("ObjectiveTrainer needs processing_class (for the pad token) or a data_collator")
            kwargs["data_collator"] = StreamCollator(pad_id(processing_class), same_length=objective.same_length)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        if objective.handles_weights and _is_zero3(self.accelerator):
            raise ConfigError(
                f"{type(objective).__name__} computes with the weights themselves, which DeepSpeed ZeRO-3 holds only"
                " while a module uses them. Next step: train it with DDP or in one process (docs/scale.md)."
            )
        self.loss_is_scaled_for_ga = True  # terms are sums over the whole window already
        self._windows: Iterator[Window] = iter(())
        self._terms: dict[str, float] = {}
        self._micro_batches = 0
        self._tokens = 0.0
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TermProgress())
        if isinstance(train_dataset, PairDataset):
            self.add_callback(_TellEpoch(train_dataset))
        if log_file is not None:
            self.add_callback(StepLog(log_file))
        self.objective.setup(self.model)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Collect the micro-batches of one optimiser step and count what they share."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        missing = [name for name in self.objective.needs if name not in batches[0]]
        if missing:
            raise DataError(
                f"{type(self.objective).__name__} needs the batch streams {', '.join(self.objective.needs)};"
                f" the data set gives {', '.join(batches[0])}. Pass"
                f" {'retain rows (retain_dataset=...)' if 'retain' in missing else 'paired data'}."
            )
        tokens = {name: sum(trained_tokens(batch[name]) for batch in batches) for name in self.objective.needs}
        world, rank = self.args.world_size, self.args.process_index
        shared: dict[str, Any] = {}
        windows = [
            Window(self.args.seed, self.state.global_step, index * world + rank, len(batches))
            for index in range(len(batches))
        ]
        tokens = self._mean_over_processes(tokens)
        for window in windows:
            window.tokens = tokens
        if world * len(batches) > 1:
            with self.compute_loss_context_manager():
                shared = self.objective.begin_step(
                    self.model, [{**batch, "window": window} for batch, window in zip(batches, windows, strict=True)]
                )
            shared = self._mean_over_processes(shared)
            for window in windows:
                window.shared = shared
        self._windows = iter(windows)
        masks = [batch[name]["attention_mask"] for batch in batches for name in self.objective.needs]
        self._tokens = float(sum(int(mask.sum()) for mask in masks))
        return batches, None

    def _mean_over_processes(self, values: dict[str, Any]) -> dict[str, Any]:
        if self.args.world_size == 1 or not values:
            return values
        stacked = torch.tensor([float(value) for value in values.values()], device=self.args.device)
        reduced = self.accelerator.reduce(stacked, "mean")
        return dict(zip(values, reduced.tolist(), strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the objective's terms on one micro-batch."""
        batch = {**inputs, "window": next(self._windows, Window(self.args.seed, self.state.global_step))}
        terms = self.objective.terms(model, batch)
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term.detach().item()
        if not all(map(math.isfinite, self._terms.values())):
            values = ", ".join(f"{name} {value:.4g}" for name, value in self._terms.items())
            raise RunError(
                f"the loss is not finite at step {self.state.global_step + 1} ({values})."
                f" The last checkpoint is intact. Lower the learning rate (now {self._get_learning_rate():.3g}),"
                " set max_grad_norm, or use fp32 where you use bf16."
            )
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every term since the last log line."""
        if "loss" in logs and self._terms:
            steps = max(1, self.state.global_step - self._globalstep_last_logged)
            found = self._mean_over_processes({**self._terms, "tokens": self._tokens})
            logs["tokens"] = found.pop("tokens") * self.args.world_size
            logs.update({name: value / steps for name, value in found.items()})
            self._terms = {}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 FLOPs per parameter and token of every stream (the base class does not see nested streams)."""
        tokens = sum(inputs[name]["input_ids"].numel() for name in self.objective.needs)
        # DeepSpeed ZeRO-3 keeps empty tensors in the weights' places
        return 6 * tokens * sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())


def _is_zero3(accelerator: Any) -> bool:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


class TermProgress(ProgressCallback):
    """A progress bar with the terms, the loss and the time left, on stderr."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        hidden = ("grad_norm", "learning_rate", "epoch", "tokens", "total_flos", "train_")
        shown = {k: f"{v:.3g}" for k, v in (logs or {}).items() if not k.startswith(hidden)}
        if shown:
            self.training_bar.set_postfix(shown)


class _TellEpoch(TrainerCallback):
    """Tells the data set its epoch: accelerate 1.15 does so in a single process only."""

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))


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


def _newest_checkpoint(folder: Path) -> str | None:
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
        checkpoint = _newest_checkpoint(folder) if resumable else None
    stop = StopCleanly()
    if resumable:
        trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        stop.restore()
    if stop.asked:
        raise KeyboardInterrupt
