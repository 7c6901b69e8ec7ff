"""Cross-entropy of many layers through the lens, without ever holding more than one chunk of logits.

The lens reads a residual stream as the model itself reads the last one: final norm, LM head, logit scale,
softcap. The paper's ascent term (arXiv 2405.14577, Algorithm 1) looks at every layer in this way. Written
down directly, that keeps (L + 1) * tokens * V logits, plus their softmax, until backward: 33 layers * 1024
tokens * 32k words are 4.3 GB for the float32 copy alone. Here each chunk's gradient is taken while its logits
exist, and the logits are gone before the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import ConfigError, DataError
from .losses import answer_tokens, precise

CHUNK_BYTES = 16 * 2**20


class Readout(Protocol):
    """What the lens needs of a model; `models.anatomy.Anatomy` is one."""

    @property
    def final(self) -> Sequence[nn.Module]: ...
    @property
    def head(self) -> nn.Module: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


def lens_cross_entropy(
    hidden: Sequence[Tensor],
    labels: Tensor,
    anatomy: Readout,
    *,
    denominator: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """mean over k of CE_k,   CE_k = mean over answer tokens of -log softmax(anatomy.logits(hidden[k]))[token]

    Gradients reach the hidden states and the parameters of the final modules and of the head (tied, with bias
    or under an adapter), as they would through the two lines above; those that do not require grad cost
    nothing. Cross-entropy and the sums of parameter gradients over chunks are float32 (float64 for float64);
    logits have the precision that the model or autocast gives them.

    Args:
        hidden: K residual streams (B, T, d) before the final norm, of one dtype.
        labels: (B, T) int64, unshifted, -100 = not trained.
        anatomy: `models.anatomy.anatomy(model)`.
        denominator: replaces the number of answer tokens, as in `losses.masked_cross_entropy`.
        chunk_tokens: hidden states that go through the head at a time. Default: float32 logits of 16 MiB, or,
            if that is more and the head is trained, of a quarter of the float32 buffer that its gradient
            takes anyway (small chunks of a large head would spend their time on adding up that gradient).

    Returns:
        () mean, differentiable once, and (K,) CE_k, detached. Beside them lives, until backward, the gradient
        of the K * N hidden states at answer tokens and one gradient for each trained parameter of the final
        modules and the head.

    Where we differ: every layer counts once and is normed once; the released code norms the last one twice
    and counts it a second time without the lens.
    """
    if len(hidden) == 0:
        raise DataError("The lens got no hidden states; give at least one layer's residual stream (B, T, d).")
    tokens = answer_tokens(labels)
    count = tokens.target.numel() if denominator is None else denominator
    reader = _Reader(anatomy)
    device = next(reader.parameters()).device
    rows = torch.cat([tokens.select(h).to(device) for h in hidden])
    names, parameters = zip(*reader.named_parameters(), strict=True)
    if not torch.is_grad_enabled():
        rows, parameters = rows.detach(), tuple(p.detach() for p in parameters)

    terms = torch.as_tensor(count, dtype=precise(rows[:0]).dtype, device=device) * len(hidden)
    plan = _Plan(
        reader=reader,
        names=names,
        targets=tokens.target.to(device).repeat(len(hidden)),
        chunk=chunk_tokens or _default_chunk(anatomy.head),
        scale=1 / terms,
    )
    mean, losses = _LensCrossEntropy.apply(plan, rows, *parameters)
    return mean, losses.view(len(hidden), -1).sum(1) * (plan.scale * len(hidden))


def choose_layers(count: int, k: int, generator: torch.Generator | None = None) -> list[int]:
    """k of the layers 0..count-1, uniform without replacement, sorted.

    The mean cross-entropy over a fresh choice at every step has the mean over all layers as expectation, at
    k / count of the cost (its log is biased downwards a little: Jensen).
    """
    if not 1 <= k <= count:
        raise ConfigError(f"The lens can look at 1 to {count} layers of this model, got {k}; set another number.")
    device = generator.device if generator is not None else None
    return sorted(torch.randperm(count, generator=generator, device=device)[:k].tolist())


def _default_chunk(head: nn.Module) -> int:
    vocabulary, width = head.weight.shape  # type: ignore[misc]
    trained = any(p.requires_grad for p in head.parameters()) and torch.is_grad_enabled()
    return max(1, CHUNK_BYTES // (4 * vocabulary), width // 4 if trained else 0)


class _Reader(nn.Module):
    """Final modules and head under one roof, so that `functional_call` can lend them other tensors."""

    def __init__(self, anatomy: Readout):
        super().__init__()
        self.final = nn.ModuleList(anatomy.final)
        self.head = anatomy.head
        self._logits = anatomy.logits

    def forward(self, hidden: Tensor) -> Tensor:
        return self._logits(hidden)


@dataclass(frozen=True)
class _Plan:
    """What `_LensCrossEntropy` needs besides tensors with gradients."""

    reader: nn.Module
    names: tuple[str, ...]
    targets: Tensor  # (R,)
    chunk: int
    scale: Tensor  # ()

    def losses(self, rows: Tensor, parameters: Sequence[Tensor], part: slice) -> Tensor:
        """(n, d) -> (n,) cross-entropy of the rows in `part`."""
        lent = dict(zip(self.names, parameters, strict=True))
        logits = torch.func.functional_call(self.reader, lent, (rows,))
        return nn.functional.cross_entropy(precise(logits), self.targets[part], reduction="none")


class _LensCrossEntropy(torch.autograd.Function):
    """(R, d) rows, parameters -> scale * sum of the rows' cross-entropies, and the (R,) cross-entropies."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, rows: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        wanted = list(ctx.needs_input_grad[1:])
        losses = torch.empty(len(rows), dtype=plan.scale.dtype, device=rows.device)
        sums: list[Tensor | None] = [
            torch.empty_like(rows) if wanted[0] else None,
            *(
                torch.zeros_like(p, dtype=precise(p[:0]).dtype) if w else None
                for p, w in zip(parameters, wanted[1:], strict=True)
            ),
        ]
        leaves = [p.detach().requires_grad_(w) for p, w in zip(parameters, wanted[1:], strict=True)]
        for start in range(0, len(rows), plan.chunk):
            part = slice(start, start + plan.chunk)
            leaf = rows[part].detach().requires_grad_(wanted[0])
            losses[part] = _chunk(plan, [leaf, *leaves], part, sums)
        ctx.save_for_backward(*sums)
        ctx.dtypes = [rows.dtype, *(p.dtype for p in parameters)]
        ctx.mark_non_differentiable(losses)
        return losses.sum() * plan.scale, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        sums = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(None if s is None else _scaled(s, grad_mean, dtype) for s, dtype in sums)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`(x * factor).to(dtype)`, rounded once and without a float32 copy in between."""
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def _chunk(plan: _Plan, leaves: Sequence[Tensor], part: slice, sums: Sequence[Tensor | None]) -> Tensor:
    """Cross-entropies of one chunk; its gradients go into `sums`. The logits die with this frame.

    `leaves`: the chunk's rows, then the parameters.
    """
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    with torch.set_grad_enabled(bool(wanted)):
        losses = plan.losses(leaves[0], leaves[1:], part)
        total = losses.sum() * plan.scale
    if wanted:
        gradients = iter(torch.autograd.grad(total, wanted, allow_unused=True))
        for index, into in enumerate(sums):
            if into is None or (gradient := next(gradients)) is None:
                continue
            if index == 0:
                into[part] = gradient
            else:
                into += gradient
    return losses.detach()
