"""The noise term: distance of hidden states to Gaussian noise by MMD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .terms import precise

Estimator = Literal["biased", "unbiased"]


def gaussian_kernel_mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel_mul: float = 2.0,
    kernel_num: int = 5,
    estimator: Estimator = "biased",
    bandwidth: Tensor | float | None = None,
) -> Tensor:
    """MMD^2(x, y) = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(a, b) = sum_i exp(-|a - b|^2 / w_i)

    with w_i = bandwidth * kernel_mul^(i - kernel_num // 2) for i = 0..kernel_num - 1, by default
    {1/4, 1/2, 1, 2, 4} * bandwidth, and bandwidth = mean of |a - b|^2 over all ordered pairs of distinct rows
    of the joint sample (x, y), detached (paper section 3 and appendix B.1; the released code's `MMD_loss`).

    Args:
        x: (n, D). y: (m, D).
        estimator: "biased" is the V-statistic of the released code: the diagonals k(x_i, x_i) are included,
            the result is >= 0, and two samples of one distribution score above 0. "unbiased" leaves the
            diagonals out (U-statistic): 0 in expectation for equal distributions, so it can be negative; it
            needs n, m >= 2.
        bandwidth: fixed instead of estimated.

    Returns:
        () float32 (float64 for float64); 0 where all rows are equal (the released code: NaN).

    Where we differ: distances come from Gram matrices, so nothing of shape (n + m, n + m, D) exists. Their
    cancellation is kept harmless by centring: the detached joint mean is subtracted first, which changes
    neither values nor gradients, and afterwards the mean distance is 2 |row|^2 on average, so the error of
    distance / bandwidth is of the order of (n + m) machine epsilons even if all rows share a huge offset (as
    transformer activations do).
    """
    n, m = len(x), len(y)
    if estimator not in ("biased", "unbiased"):
        raise ConfigError(f'estimator must be "biased" or "unbiased", got {estimator!r}.')
    if estimator == "unbiased" and min(n, m) < 2:
        raise DataError(
            f"The unbiased MMD needs at least 2 samples on each side, got {n} and {m}. "
            'Use larger batches, form="token", or estimator="biased".'
        )
    with torch.autocast(x.device.type, enabled=False):
        x, y = precise(x), precise(y)
        centre = (x.detach().sum(0) + y.detach().sum(0)) / (n + m)
        x, y = x - centre, y - centre
        xx, yy, xy = _squared_distances(x), _squared_distances(y), _squared_distances(x, y)
        if bandwidth is None:
            distances = xx.detach().sum() + yy.detach().sum() + 2 * xy.detach().sum()
            bandwidth = (distances / ((n + m) * (n + m - 1))).clamp_min(1e-30)
        widths = [bandwidth * kernel_mul ** (i - kernel_num // 2) for i in range(kernel_num)]
        kxx, kyy, kxy = (torch.stack([torch.exp(-d / w) for w in widths]).sum(0) for d in (xx, yy, xy))
        if estimator == "biased":
            return kxx.mean() + kyy.mean() - 2 * kxy.mean()
        within_x = (kxx.sum() - kxx.trace()) / (n * (n - 1))
        within_y = (kyy.sum() - kyy.trace()) / (m * (m - 1))
        return within_x + within_y - 2 * kxy.mean()


def _squared_distances(a: Tensor, b: Tensor | None = None) -> Tensor:
    """(n, D), (m, D) -> (n, m) of |a_i - b_j|^2 >= 0; without b: a against itself, diagonal exactly 0."""
    other = a if b is None else b
    squared = a.square().sum(1)[:, None] + other.square().sum(1)[None, :] - 2 * a @ other.T
    squared = squared.clamp_min(0)
    return squared if b is not None else squared - squared.diag().diag()


def noise_term(
    activations: Sequence[Tensor],
    mask: Tensor,
    *,
    form: Literal["sequence", "token"] = "sequence",
    estimator: Estimator = "biased",
    noise: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """mean over layers of MMD^2(selected activations, N(0, I)), to be weighted by beta (Algorithm 1, line 12)

    Args:
        activations: L tensors (B, T, d): the MLP outputs before the residual add, on the harmful batch.
        mask: (B, T) bool, or numbers of which 0 means no: the tokens to noise. Others get exactly zero
            gradient.
        form: "sequence" (paper): one sample = the selected tokens of one sequence, flattened, against noise
            at the same places; B samples. "token": one sample = one selected token (d); N samples, so d
            dimensions are seen through far more of them.
        noise: L tensors (B, T, d) that replace the Gaussian draws (for tests and for replaying).
        generator: drawn from on its own device; None = the device's default generator.
        max_tokens: form "token" only: a random subset of at most so many tokens, the same in every layer,
            which bounds the (2N, 2N) kernel matrices.

    Returns:
        () float32 (float64 for float64). The noise is drawn in that dtype, anew for each layer.

    Where we differ: the selected tokens are moved to the front of each sequence and positions beyond the
    longest one are dropped. The paper's layout gives each token its absolute position, so that padding on the
    other side would change the distances between sequences. Nothing changes where all masks start at the same
    position; noise and activations are zero in the same places.
    """
    if noise is not None and len(noise) != len(activations):
        raise DataError(f"Noise has {len(noise)} tensors for {len(activations)} layers; give one per layer.")
    mask = mask.bool()
    if not mask.any():
        raise DataError(
            f"The noise mask of shape {tuple(mask.shape)} selects no token: the harmful answers are empty, "
            "truncated away or equal to the harmless ones. Check the pairs, or raise max_length."
        )
    if form == "token":
        source, filled = _token_samples(mask, max_tokens, generator)
    elif form == "sequence" and max_tokens is None:
        source, filled = _sequence_samples(mask)
    else:
        raise ConfigError(
            f'form must be "sequence" (without max_tokens) or "token", got {form!r}, max_tokens={max_tokens}.'
        )

    total: Tensor | None = None
    for layer, activation in enumerate(activations):
        x = precise(_take(activation, source, filled))
        if noise is None:
            device = generator.device if generator is not None else x.device
            drawn = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
            y = drawn.masked_fill(~filled.to(x.device)[..., None], 0)
        else:
            y = _take(noise[layer].to(x), source, filled)
        mmd = gaussian_kernel_mmd(x.flatten(1), y.flatten(1), estimator=estimator)
        total = mmd if total is None else total + mmd.to(total.device)
    if total is None:
        raise DataError("The noise term got no activations; give the MLP outputs of at least one layer.")
    return total / len(activations)


def _sequence_samples(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sample b = the selected tokens of sequence b in order, filled up: (B, S) flat indices, (B, S) bool."""
    B, T = mask.shape
    order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return order + T * torch.arange(B, device=mask.device)[:, None], mask.gather(1, order)


def _token_samples(mask: Tensor, max_tokens: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Each sample = one selected token: (N, 1) flat indices and (N, 1) bool."""
    source = mask.flatten().nonzero()
    if max_tokens is not None and len(source) > max_tokens:
        device = generator.device if generator is not None else source.device
        chosen = torch.randperm(len(source), generator=generator, device=device)[:max_tokens]
        source = source[chosen.sort().values.to(source.device)]
    return source, torch.ones_like(source, dtype=torch.bool)


def _take(states: Tensor, source: Tensor, filled: Tensor) -> Tensor:
    """(B, T, d) -> (samples, S, d), zero and without gradient where not filled, even if NaN stands there."""
    taken = states.flatten(0, 1).index_select(0, source.flatten().to(states.device))
    return taken.view(*source.shape, -1).masked_fill(~filled.to(states.device)[..., None], 0)
