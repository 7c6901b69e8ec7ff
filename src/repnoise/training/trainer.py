"""The only training loop: `transformers.Trainer`, driven by an `Objective`.

Defences and attacks differ in their objective and in nothing else, so both run through `ObjectiveTrainer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..data import PairDataset, StreamCollator, pad_id
from ..errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from ..data import Pair, Row
from .callbacks import StepLog, TellEpoch, TermProgress
from .objective import Objective, Window, trained_tokens


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
        if objective.handles_weights and is_zero3(self.accelerator):
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


def is_zero3(accelerator: Any) -> bool:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3
