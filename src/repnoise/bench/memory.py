"""How much memory a training step takes, without taking it: the real step on tensors without contents."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from transformers import TrainerCallback

from .. import lens
from ..errors import ConfigError
from ..losses import masked_cross_entropy, noise_term
from ..models import anatomy
from .cases import broadcast_mmd
from .measure import build_model, build_trainer
from .shapes import BenchOptions
from .standins import Adam8bit, to_four_bit
from .tracker import StorageTracker, stack, tracked

GPUS = (24, 48, 80)
"""GiB of the cards that a step is held against."""
MARGIN, CONTEXT = 0.1, 2**30
"""Asked for beyond the peak, as nothing here sees them: a share of it for the allocator's fragmentation and workspaces
inside of kernels, and bytes for the CUDA context with its libraries."""
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")

ACTIVATIONS, AGAIN, AT_WORK = "activations", "activations, computed again", "optimiser, at work"
CROSS_ENTROPY, BACKWARD = "cross-entropy", "backward"
_ORDER = ("lens", "noise term", AGAIN, BACKWARD, AT_WORK, CROSS_ENTROPY, ACTIVATIONS)
"""Purposes of what is made under the places that `_Purpose` knows; the first wins, in any frame."""
_WITH_LOGITS = (ACTIVATIONS, AGAIN, CROSS_ENTROPY, BACKWARD)


def step_memory(case: str, dtype: str, options: BenchOptions, *, cpu: bool = False) -> dict[str, Any]:
    """The peak of bytes over training steps, and what they are for at that moment.

    `ObjectiveTrainer` runs as in `repnoise bench`, on tensors without contents (`tracker.StorageTracker`): what
    autograd keeps and when the lens lets go is what the code does, not a formula about it. 8-bit optimisers and 4-bit
    weights are stand-ins of the same sizes (`standins`).

    Args:
        cpu: as the step would run on a CPU instead of a GPU, to be held against a measurement there.

    Returns:
        {"case", "dtype", "batch", "parameters", "peak_bytes", "needed_bytes": with `MARGIN` and `CONTEXT`,
        "fits": {GiB: bool}, "terms": {purpose: bytes}, which add up to the peak}.
    """
    train = {**options.train, "use_cpu": True}  # fake tensors have one device everywhere
    more: dict[str, Any] = {}
    optim = str(train.get("optim", ""))
    if "8bit" in optim:
        if optim not in EIGHT_BIT:
            raise ConfigError(f"optim={optim}: of the 8-bit optimisers the model knows {', '.join(EIGHT_BIT)}.")
        del train["optim"]
    # one step makes the optimiser's states, the next runs beside them
    options = dataclasses.replace(options, steps=1, train=train)
    purpose = _Purpose()
    with tracked(purpose, cpu) as tracker, tempfile.TemporaryDirectory() as folder:
        model = build_model(options, dtype, "cpu")
        if options.four_bit:
            to_four_bit(model)
        purpose.know_model(model)
        tracker.begin()
        if optim in EIGHT_BIT:
            embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
            more["optimizer_cls_and_kwargs"] = (Adam8bit, {"embeddings": embeddings, "lr": 1e-5})
        trainer = build_trainer(model, case, options, folder, callbacks=[_Relabel(tracker, purpose)], **more)
        trainer.train()
        parameters = sum(p.numel() for p in model.parameters())
    total = sum(tracker.peak.values())
    needed = round(total * (1 + MARGIN)) + CONTEXT
    return {
        "case": case,
        "dtype": dtype,
        "batch": options.batch,
        "parameters": parameters,
        "peak_bytes": total,
        "needed_bytes": needed,
        "fits": {str(gib): needed <= gib * 2**30 for gib in GPUS},
        "terms": {name: size for name, size in tracker.peak.items() if size},
    }


class _Purpose:
    """What a new tensor is for, by the code that makes it and, for what spans the vocabulary, by its shape.

    Code is known as functions and modules and not by their names: renaming one breaks an import and not the table.
    """

    def __init__(self) -> None:
        self.head: tuple[int, ...] = ()  # (V, d), once the weights exist
        self.shapes: frozenset[tuple[int, ...]] = frozenset()
        self.places: dict[CodeType, str] = {}
        for function, purpose in (
            (noise_term, "noise term"),
            (broadcast_mmd, "noise term"),
            (masked_cross_entropy, CROSS_ENTROPY),
            (torch.autograd.graph._engine_run_backward, BACKWARD),
        ):
            self.know(function, purpose)
        inner = checkpoint._checkpoint_hook.__init__.__code__.co_consts
        self.places[next(code for code in inner if getattr(code, "co_name", "") == "unpack_hook")] = AGAIN

    def know(self, function: Callable[..., Any], purpose: str) -> None:
        """What is made while `function`, under its decorators, runs is for `purpose`."""
        self.places[inspect.unwrap(function).__code__] = purpose

    def know_model(self, model: nn.Module) -> None:
        self.head = tuple(anatomy(model).head.weight.shape)  # type: ignore[arg-type]
        self.shapes = frozenset(tuple(p.shape) for p in model.parameters() if p.requires_grad)
        for module in model.modules():
            self.know(type(module).forward, ACTIVATIONS)

    def __call__(self, tensor: Tensor) -> str:
        if not self.head:
            return "weights"
        under = {self._place(code) for code in stack()}
        found = next((purpose for purpose in _ORDER if purpose in under), "other")
        shape = tuple(tensor.shape)
        logits = shape[-1:] == self.head[:1]
        if found == "lens":
            part = "logits of a chunk" if logits else "gradient of the head" if shape == self.head else "hidden states"
            return f"lens, {part}"
        if found == BACKWARD and shape in self.shapes:
            return "gradients"
        return "logits, their softmax and gradient" if logits and found in _WITH_LOGITS else found

    def _place(self, code: CodeType) -> str | None:
        return "lens" if code.co_filename == lens.__file__ else self.places.get(code)


class _Relabel(TrainerCallback):
    """The lens' gradient of the head and the optimiser's states are known for what they are once they have arrived."""

    def __init__(self, tracker: StorageTracker, purpose: _Purpose) -> None:
        self.tracker, self.purpose = tracker, purpose

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        self.purpose.know(type(getattr(optimizer, "optimizer", optimizer)).step, AT_WORK)  # under accelerate's
        for parameter in kwargs["model"].parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.tracker.relabel(p.grad, "gradients"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for states in kwargs["optimizer"].state.values():
            for value in states.values():
                if isinstance(value, Tensor):
                    self.tracker.relabel(value, "optimiser states")


def as_text(rows: Sequence[dict[str, Any]], options: BenchOptions) -> str:
    """The table for a terminal."""
    from rich.console import Console
    from rich.table import Table

    what = [*(f"{name}={value}" for name, value in options.train.items())]
    what += [f"LoRA {options.lora_rank}"] * (options.lora_rank is not None) + ["base in 4 bits"] * options.four_bit
    table = Table(
        title=f"{options.shape}: {options.batch} pairs, {options.length} tokens a side"
        + "".join(f", {w}" for w in what),
        caption=f"GiB at the peak of a step, from the memory model. Needed: {MARGIN:.0%} more and"
        f" {CONTEXT / 2**30:.0f} GiB for context, fragmentation and workspaces.",
    )
    table.add_column("")
    for row in rows:
        table.add_column(f"{row['case']} {row['dtype']}", justify="right")
    purposes = sorted(
        {name for row in rows for name in row["terms"]}, key=lambda n: -max(r["terms"].get(n, 0) for r in rows)
    )
    for name in purposes:
        table.add_row(name, *(f"{row['terms'].get(name, 0) / 2**30:.2f}" for row in rows))
    table.add_section()
    for name, key in (("peak", "peak_bytes"), ("needed", "needed_bytes")):
        table.add_row(name, *(f"{row[key] / 2**30:.2f}" for row in rows))
    for gib in GPUS:
        table.add_row(f"fits in {gib} GiB", *("yes" if row["fits"][str(gib)] else "no" for row in rows))
    console = Console(width=140, color_system=None)
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip()
