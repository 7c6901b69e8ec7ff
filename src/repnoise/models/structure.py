"""What holds for every family: the parts that losses look at, the model under its wrappers, its context."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .zero3 import is_zero3


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that the losses look at; built by `anatomy`.

    Attach adapters first and ask for the anatomy afterwards: an adapter replaces modules.
    """

    family: str
    """`config.model_type`."""
    layers: tuple[nn.Module, ...]
    """The L blocks in order."""
    mlps: tuple[nn.Module, ...]
    """One per block; its output is the post-MLP activation before the residual add, (B, T, d)."""
    final: tuple[nn.Module, ...]
    """Modules between the last residual stream and the head, in order; may be empty."""
    head: nn.Module
    """Linear layer to the vocabulary, possibly tied, possibly with bias."""
    logit_scale: float = 1.0
    """The logits are multiplied by it."""
    softcap: float | None = None
    """If set, logits become softcap * tanh(logits / softcap)."""

    @property
    def own(self) -> Anatomy:
        """The same with the model's own `final` and `head`; where its weights are spread, these here are copies."""
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        """cap(scale * head(final(hidden))): the lens; on the last residual stream, the model's own logits.

        hidden: (..., d), a residual stream that has not been through the final norm. Returns (..., V).
        """
        for module in self.final:
            hidden = module(hidden)
        logits = self.head(hidden)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def context_size(model: Any) -> int:
    """Tokens that the model can read at once; as good as endless where its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def last_logits(model: nn.Module) -> dict[str, int]:
    """Arguments of a forward pass whose logits nobody reads: the head runs on the last position only, if it can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters else {}


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or DeepSpeed ZeRO-3 has spread this model's weights over processes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing can be spread
    return is_zero3(model) or (fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules()))


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside PEFT, DistributedDataParallel, DeepSpeed and torch.compile wrappers."""
    while True:
        if "_orig_mod" in model._modules:  # torch.compile
            inner = model._modules["_orig_mod"]
        elif "module" in model._modules:  # DataParallel, DistributedDataParallel, DeepSpeed
            inner = model._modules["module"]
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):  # PeftModel
            inner = cast(Any, model).get_base_model()
        else:
            return model
        if inner is None or inner is model:
            return model
        model = inner
