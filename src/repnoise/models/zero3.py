"""Weights that DeepSpeed ZeRO-3 has spread over processes.

ZeRO-3 leaves an empty tensor in a weight's place whenever no module uses it: from the loading of the model on, if it is
loaded after `TrainingArguments` were made, else from the start of training on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_zero3(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 has spread this model's weights."""
    return "deepspeed" in sys.modules and any(map(_is_spread, model.parameters()))


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """The weights are whole inside the block, which all processes must enter; weights of no ZeRO-3 always are."""
    spread: list[Any] = [parameter for parameter in parameters if _is_spread(parameter)]
    if not spread:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    # what is whole already is in use, or so small that ZeRO keeps it: not ours to let go of
    with GatheredParameters([p for p in spread if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]):
        yield


def keep(weight: Tensor) -> Tensor:
    """A gathered weight as a tensor that stays whole when ZeRO empties the weight; other weights as they are.

    Its gradient joins those of the model's own passes: autograd adds them up, ZeRO averages the sum and spreads it.
    """
    return cast(Tensor, _Keep.apply(weight)) if _is_spread(weight) else weight


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU, on the first process; {} on the others, which must call too."""
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with gathered([tensor]):
            if dist.get_rank() == 0:
                state[name] = tensor.detach().cpu()
    return state


def _is_spread(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any) -> Tensor:
        ctx.weight = weight
        return cast(Tensor, weight.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Autograd lays a gradient out like its weight, and ZeRO has emptied the weight by now. It does so again before
        # the optimiser's step.
        ctx.weight.all_gather()
        return gradient
