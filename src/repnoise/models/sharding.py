"""Weights that are spread over processes (FSDP2, ZeRO-3): read them outside of the model's own forward pass.

FSDP gathers a module's weights in hooks around that module's forward pass and reduces their gradients in hooks of
the matching backward pass. Whoever calls the final norm and the head by themselves, as the lens does, is outside
of both: the weights happen to be there (the head stays gathered after the forward pass), the values are right, and
the gradients are lost or come a step late, without an error. So the lens gets copies of these modules whose weights
were gathered from the shards inside the autograd graph.

DeepSpeed ZeRO-3 leaves an empty tensor in a weight's place whenever no module uses it. It reduces a weight's gradient
once in each backward pass, when autograd has added up all of it, so the copies' gradients join that sum as they are.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from ..errors import ModelError
from .structure import Anatomy
from .zero3 import gathered, is_zero3, keep, whole_state


def whole_modules(model: nn.Module, modules: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """Copies of `modules` that hold whole weights, for use outside of the model's forward pass.

    All processes must call it at the same place. The weights are gathered once, here. Their gradients are averaged
    over processes and added to the shards' own, as is done with those of the forward pass. A weight has the
    shard's precision (float32 also under FSDP's mixed precision, where only the forward pass computes in bf16).

    Raises `ModelError` if a weight is not spread.
    """
    if is_zero3(model):
        with gathered(p for module in modules for p in module.parameters()):
            return tuple(_whole_copy(module) for module in modules)
    for owner in {_owner(model, module) for module in modules}:
        owner.reshard()  # the modules' own parameters are the shards from here on
    return tuple(_whole_copy(module) for module in modules)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU, on the first process; {} on the others, which must call too."""
    if is_zero3(model):
        return whole_state(model)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


class ShardedAnatomy:
    """The anatomy of a model whose weights are spread: `final` and `head` are copies with whole weights.

    They are gathered when they are first asked for, by all processes at once, and are as old as this object: ask
    for a new anatomy at every step. To freeze or change the model's own parts, take them from `own`.
    """

    def __init__(self, model: nn.Module, own: Anatomy) -> None:
        self._model, self.own = model, own
        self.family, self.layers, self.mlps = own.family, own.layers, own.mlps

    @cached_property
    def whole(self) -> Anatomy:
        *final, head = whole_modules(self._model, (*self.own.final, self.own.head))
        return dataclasses.replace(self.own, final=tuple(final), head=head)

    @property
    def final(self) -> tuple[nn.Module, ...]:
        return self.whole.final

    @property
    def head(self) -> nn.Module:
        return self.whole.head

    def logits(self, hidden: Tensor) -> Tensor:
        return self.whole.logits(hidden)


def _owner(model: nn.Module, module: nn.Module) -> FSDPModule:
    """The innermost FSDP unit around a module: itself, or the nearest one above."""
    found: FSDPModule | None = None
    for candidate in model.modules():
        if isinstance(candidate, FSDPModule) and any(inner is module for inner in candidate.modules()):
            found = candidate  # parents come before their children
    if found is None:
        raise ModelError(
            f"{type(module).__name__} belongs to no FSDP unit, but other parts of the model do.\n"
            "Next step: wrap the whole model (accelerate does), or train without FSDP."
        )
    return found


def _whole_copy(module: nn.Module) -> nn.Module:
    """The module with its children: of the class it had before FSDP, without hooks, with whole weights."""
    cls = type(module)
    plain = cls.__bases__[1] if issubclass(cls, FSDPModule) else cls  # FSDP derives (FSDPModule, the class)
    copy = cast(nn.Module, object.__new__(plain))
    copy.__dict__.update(module.__dict__)
    for key, value in vars(copy).items():
        if key.endswith("_hooks") or key.endswith("_hooks_with_kwargs") or key.endswith("_hooks_always_called"):
            copy.__dict__[key] = OrderedDict() if isinstance(value, dict) else value
    copy._parameters = cast(Any, {name: _whole(p) for name, p in module._parameters.items()})
    copy._modules = {name: None if m is None else _whole_copy(m) for name, m in module._modules.items()}
    return copy


def _whole(parameter: Tensor | None) -> Tensor | None:
    if isinstance(parameter, DTensor):
        return cast(Tensor, _Gather.apply(parameter))
    return None if parameter is None else keep(parameter)


class _Gather(torch.autograd.Function):
    """Shard -> whole tensor; backward: mean over processes of the whole gradient -> shard."""

    @staticmethod
    def forward(ctx: Any, sharded: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        return cast(DTensor, sharded.detach()).full_tensor()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> DTensor:
        spread = [Partial()] * ctx.mesh.ndim
        summed = DTensor.from_local(gradient / ctx.mesh.size(), ctx.mesh, spread, run_check=False)
        reduced = summed.redistribute(placements=ctx.placements)
        if gradient.is_cuda:
            # FSDP writes .grad of the same shard on a stream of its own, and autograd adds ours on this one
            torch.cuda.synchronize(gradient.device)
        return reduced
