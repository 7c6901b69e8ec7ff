"""What bitsandbytes would keep on a GPU, for the memory model: the sizes, without the arithmetic.

Source: bitsandbytes 0.45, `optim/optimizer.py` (`Optimizer2State`) and `autograd/_functions.py` (`MatMul4Bit`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

SMALL, STATE_BLOCK, WEIGHT_BLOCK = 4096, 256, 64
"""Elements: a tensor below SMALL keeps 32-bit states; one float32 scale for each block of states or of weights."""


class Adam8bit(torch.optim.Optimizer):
    """Two states of one byte an element and their scales; float32 for small tensors and, as Trainer asks, embeddings.

    A paged optimiser has the same states; which of them lie in host memory is up to the driver.
    """

    def __init__(self, params: Iterable[Any], embeddings: set[Tensor], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})
        self.embeddings = embeddings

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            for name in () if self.state[p] else ("1", "2"):
                wide = p.numel() < SMALL or p in self.embeddings
                self.state[p]["state" + name] = torch.empty_like(p, dtype=torch.float32 if wide else torch.uint8)
                if not wide:
                    self.state[p]["absmax" + name] = p.new_empty(-(-p.numel() // STATE_BLOCK), dtype=torch.float32)


class FourBit(nn.Module):
    """A frozen linear map in 4 bits: half a byte an element and the scales; the whole matrix when it is used."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed: Tensor
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        size = linear.weight.numel()
        self.register_buffer("packed", linear.weight.new_empty(size // 2, dtype=torch.uint8))
        self.register_buffer("absmax", linear.weight.new_empty(-(-size // WEIGHT_BLOCK), dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return _FourBitProduct.apply(x, self)

    def whole(self) -> Tensor:
        return self.packed.new_empty(self.out_features, self.in_features, dtype=self.dtype)


class _FourBitProduct(torch.autograd.Function):
    """Keeps nothing for backward: the matrix is made whole once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FourBit) -> Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.whole())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.linear.whole(), None


def to_four_bit(model: nn.Module) -> None:
    """Replace the linear maps under LoRA layers; embeddings and head stay as they are, as transformers does."""
    for module in model.modules():
        if isinstance(base := getattr(module, "base_layer", None), nn.Linear):
            module.base_layer = FourBit(base)
