"""The only training loop: `transformers.Trainer`, driven by an `Objective`.

Defences and attacks differ in their objective and in nothing else, so both run through `ObjectiveTrainer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..data import Pair, PairDataset, Row, StreamCollator, pad_id
from ..errors import ConfigError, DataError, RunError
from .callbacks import LogLastStep, StepLog, TellEpoch, TermProgress
from .objective import Objective, Window, trained_tokens


class ObjectiveTrainer(Trainer):
    """`transformers.Trainer` whose loss is the sum of an objective's terms.

    Args:
        objective: the defence or attack.
        train_dataset: a list of `Pair`, or any dataset whose items are {stream: {"input_ids", "labels"}}.
        retain_dataset: rows for objectives that need the stream "retain" (with a list of pairs only).
        template, max_length: how pairs become tokens (with a list of pairs only).
        log_file: a JSONL file that gets a line whenever the loss is logged (`logging_steps`), and for the last step.

    Beside the loss every term is logged, as its mean over the steps since the last line (their sum is the loss), and
    `tokens`, how many all streams and processes had in these steps, padding left out. Raises `RunError` when the loss
    is not finite; the weights of the last checkpoint are untouched by that step.
    """

    objective: Objective
    model: nn.Module

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        train_dataset: Sequence[Pair] | Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        objective: Objective,
        retain_dataset: Sequence[Row] | None = None,
        template: str = "auto",
        max_length: int = 256,
        log_file: Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective = objective
        args = args or TrainingArguments(output_dir="trainer_output", report_to="none")
        args.remove_unused_columns = False  # our items are nested by stream; the base class would drop them all
        if isinstance(train_dataset, list):
            if processing_class is None:
                raise TypeError("a list of pairs needs processing_class, the tokenizer")
            train_dataset = PairDataset(
                train_dataset,
                processing_class,
                template=template,
                max_length=max_length,
                retain=retain_dataset,
                retain_batch=objective.retain_batch,
                streams=objective.streams,
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
        if objective.handles_weights and is_zero3(self.accelerator):
            raise ConfigError(
                f"{type(objective).__name__} computes with the weights themselves, which DeepSpeed ZeRO-3 holds only"
                " while a module uses them. Next step: train it with DDP or in one process (docs/scale.md)."
            )
        self.loss_is_scaled_for_ga = True  # terms are sums over the whole window already
        self._windows: Iterator[Window] = iter(())
        # of the micro-batches since the last log line, which began after step `_since`
        self._terms: dict[str, list[Tensor]] = {}
        self._tokens: list[Tensor] = []
        self._since = 0
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TermProgress())
        self.add_callback(LogLastStep())
        if isinstance(train_dataset, PairDataset):
            self.add_callback(TellEpoch(train_dataset))
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
        if self.state.global_step == self._globalstep_last_logged:
            self._terms, self._tokens, self._since = {}, [], self.state.global_step
        missing = [name for name in self.objective.streams if name not in batches[0]]
        if missing:
            raise DataError(
                f"{type(self.objective).__name__} needs the batch streams {', '.join(self.objective.streams)};"
                f" the data set gives {', '.join(batches[0])}. Pass"
                f" {'retain rows (retain_dataset=...)' if 'retain' in missing else 'paired data'}."
            )
        tokens = {name: sum(trained_tokens(batch[name]) for batch in batches) for name in self.objective.streams}
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
        self._tokens += [batch[name]["attention_mask"].sum() for batch in batches for name in self.objective.streams]
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
            self._terms.setdefault(name, []).append(term.detach())
        if not math.isfinite(loss.item()):
            values = ", ".join(f"{name} {term.item():.4g}" for name, term in terms.items())
            raise RunError(
                f"the loss is not finite at step {self.state.global_step + 1} ({values})."
                f" The last checkpoint is intact. Lower the learning rate (now {self._get_learning_rate():.3g}),"
                " set max_grad_norm, or use fp32 where you use bf16."
            )
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the class docstring says of every line. Only here are terms read from the device."""
        if "loss" in logs and self._terms:
            sums = {name: sum(torch.stack(each).tolist()) for name, each in (self._terms | {"": self._tokens}).items()}
            found = self._mean_over_processes(sums)
            logs["tokens"] = float(found.pop("") * self.args.world_size)
            steps = self.state.global_step - self._since
            logs.update({name: value / steps for name, value in found.items()})
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 FLOPs per parameter and token of every stream (the base class does not see nested streams)."""
        tokens = sum(inputs[name]["input_ids"].numel() for name in self.objective.streams)
        # DeepSpeed ZeRO-3 keeps empty tensors in the weights' places
        return 6 * tokens * sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())


def is_zero3(accelerator: Any) -> bool:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3
