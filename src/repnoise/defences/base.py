"""What several defences share: retain rows, frozen copies, gradients that no loss has."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..models import capture, gathered, unwrap
from ..recipes.ranges import Count, Weight
from ..registry import Registry
from ..training import Objective, Stream, answer_loss, hidden_pass

DEFENCES: Registry[Objective] = Registry("defence", "repnoise.defences", Objective)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A plain copy with whole weights, on every process; also of a model that DeepSpeed ZeRO-3 spread at loading."""
    with gathered(model.parameters()):
        return copy.deepcopy(unwrap(model)).eval().requires_grad_(False)


def residual(model: nn.Module, stream: Stream, layers: Sequence[int]) -> list[Tensor]:
    """(B, T, d) outputs of the blocks with these indices (0 = the first block)."""
    with capture(model, mlp=False) as seen:
        hidden_pass(model, stream)
    return [seen.residual[index + 1] for index in layers]


def real_tokens(stream: Stream, states: Tensor) -> Tensor:
    """(B, T, d) -> (N, d): everything but padding."""
    return states[stream["attention_mask"].to(states.device).bool()]


def with_gradient(model: nn.Module, value: Tensor, gradients: Mapping[str, Tensor | None]) -> Tensor:
    """A scalar that equals `value` and whose gradient at the model's weights is `gradients`.

    For objectives that are defined by their gradient (a first-order meta step) and not by a loss.
    """
    total = value.detach()
    for name, parameter in unwrap(model).named_parameters():
        gradient = gradients.get(name)
        if gradient is not None and parameter.requires_grad:
            product = (parameter * gradient.to(parameter).detach()).sum()
            total = total + product - product.detach()
    return total


@dataclass(kw_only=True)
class DefenceWithRetain(Objective):
    """A defence that may also train on retain rows, as the comparison asks of all of them."""

    retain_weight: Weight = 0.0
    """Weight of the cross-entropy on retain rows; 0 leaves it out, as the source does."""
    retain_batch: Count = 1
    """Retain rows beside each pair of a batch."""

    @property
    def streams(self) -> tuple[str, ...]:
        return (*self.needs, "retain") if self.retain_weight and "retain" not in self.needs else self.needs

    def retained(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"retain": self.retain_weight * answer_loss(model, batch, "retain")} if self.retain_weight else {}


def fraction(layers: int, share: float) -> int:
    """Index of the block at that share of the depth."""
    return min(layers - 1, max(0, round(share * layers)))


def check_layers(chosen: Sequence[int], count: int, name: str) -> None:
    wrong = [index for index in chosen if not 0 <= index < count]
    if wrong or not chosen:
        raise ConfigError(f"{name}: {list(chosen)} does not fit a model of {count} layers; allowed: 0 to {count - 1}.")


def gradients(value: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """d value / d parameter by name; None where the value does not depend on it."""
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    found = torch.autograd.grad(value, [parameters[name] for name in names], allow_unused=True, retain_graph=True)
    return dict(zip(names, found, strict=True))
