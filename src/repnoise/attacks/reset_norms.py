"""Adaptive: put the norms back, fresh or from the public checkpoint, and train on.

Source: norms are few weights that steer every activation (Zhao et al., arXiv 2312.11420); a defence that acts on
activations (the paper's noise term, arXiv 2405.14577) may sit in them. The attack is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import ConfigError, ModelError
from .base import ATTACKS, Attack, Context, alike, norms


@ATTACKS.register("reset_norms")
@dataclass(kw_only=True)
class ResetNorms(Attack):
    """Every norm gets fresh values (weight 1, bias 0, as its class makes it) or those of the public checkpoint.

    The attack is ours; see arXiv 2312.11420 for what norms alone can do.
    """

    to: Literal["init", "public"] = "init"
    public: str | None = None
    """The public checkpoint, for `to: public`: folder or hub id; null = the model that the study defends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.public is not None and self.to != "public":
            raise ConfigError(f"public is {self.public!r}, and to is {self.to!r}; set to: public, or drop public.")

    def prepare(self, model: Any, context: Context) -> Any:
        found = norms(model)
        if not found:
            raise ModelError(
                f"{type(model).__name__} has no norm with weights: nothing to reset. Use another attack,"
                " sft for example."
            )
        with torch.no_grad():
            if self.to == "public":
                ours = {id(parameter) for module in found for parameter in module.parameters(recurse=False)}
                for _, parameter, public in alike(model, context.public(self.public)):
                    if id(parameter) in ours:
                        parameter.copy_(public)
            else:
                for module in found:
                    shape = next(module.parameters(recurse=False)).shape
                    # its own class knows what a fresh one holds: 1, or 0 where the family adds 1 itself (Gemma)
                    fresh: Any = type(module)(shape[0] if len(shape) == 1 else tuple(shape))
                    start = dict(fresh.named_parameters(recurse=False))
                    for name, parameter in module.named_parameters(recurse=False):
                        parameter.copy_(start[name]) if name in start else parameter.zero_()
        return super().prepare(model, context)
