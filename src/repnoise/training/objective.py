"""What is trained: named terms over the streams of a batch, and what the micro-batches of one step share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..losses import IGNORE_INDEX, masked_cross_entropy
from ..models import last_logits
from ..registry import Checked
from ..seeds import derive_seed

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

    def generator(
        self, name: str, *, per_micro_batch: bool = True, device: torch.device | str = "cpu"
    ) -> torch.Generator:
        """Random numbers that depend on (seed, step, name[, micro-batch]) and on the kind of device only.

        No state is carried from step to step, so a resumed run draws what an uninterrupted one would have drawn. Draw
        what is large on the device where it is used: a CPU takes longer for the noise than a GPU for the whole step.
        """
        seed = derive_seed(self.seed, self.step, self.index if per_micro_batch else -1, name)
        return torch.Generator(device).manual_seed(seed)


class Objective(Checked):
    """A loss made of named terms; subclasses are defences and attacks, dataclasses whose fields are their options.

    Attributes:
        needs: names of the batch streams that `terms` always reads: "harmful", "harmless", "retain".
        retain_batch: retain rows drawn beside each pair.
        handles_weights: `terms` reads weights, copies the model or calls autograd; DeepSpeed ZeRO-3 is refused.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    retain_batch: int = 1
    handles_weights: ClassVar[bool] = False

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the batch streams that `terms` reads with these options: `needs`, and what an option adds."""
        return self.needs

    @property
    def same_length(self) -> bool:
        """Pad all streams to one length (only the released loss compares them by position)."""
        return False

    @property
    def vector(self) -> Mapping[str, Any] | None:
        """Arguments of `models.add_lora`: train this adapter and not the weights; it is released beside them and
        active while others train (models/vector.py).
        """
        return None

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


def answer_loss(model: nn.Module, batch: Mapping[str, Any], stream: str) -> Tensor:
    """() mean cross-entropy of a stream's answer tokens, in nats; exact under gradient accumulation."""
    labels, tokens = batch[stream]["labels"], window_of(batch).tokens.get(stream)
    return masked_cross_entropy(forward(model, batch[stream]), labels, denominator=tokens)


class PlainFineTuning(Objective):
    """loss = mean cross-entropy of the answers' tokens in the stream "rows"."""

    needs = ("rows",)

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"ce": answer_loss(model, batch, "rows")}


def hidden_pass(model: nn.Module, stream: Stream) -> None:
    """A forward pass for the sake of captured activations: the head runs on the last position only, if it can.

    The call goes through the model itself, not its backbone, so that DDP and FSDP see it.
    """
    last = last_logits(model)
    model(input_ids=stream["input_ids"], attention_mask=stream["attention_mask"], use_cache=False, **last)


def trained_tokens(stream: Stream) -> float:
    """Number of labels that count after the shift by one."""
    return float((stream["labels"][:, 1:] != IGNORE_INDEX).sum())
