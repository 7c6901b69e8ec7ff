"""The objectives that are measured against each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..defences.repnoise import RepNoise
from ..losses import IGNORE_INDEX, ascent_term, masked_cross_entropy, noise_term
from ..models import anatomy, capture
from ..training import Objective, Stream, forward, hidden_pass, window_of

ALPHA, BETA = 1.0, 1e-3


class Plain(Objective):
    """Ordinary fine-tuning on the same two batches: no defence, the floor of any that reads both."""

    needs = ("harmful", "harmless")

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: masked_cross_entropy(forward(model, batch[name]), batch[name]["labels"]) for name in self.needs}


class Naive(Objective):
    """Algorithm 1 of arXiv 2405.14577, line by line: the values of `RepNoise`, without its economies.

    Kept until backward: (L + 1) logits (B, T, V), and per layer differences (2B, 2B, T * d). It is cheaper than
    the released code, which reads the last layer a second time and adds hooks at every step.
    """

    needs = ("harmful", "harmless")

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        harmful, harmless = batch["harmful"], batch["harmless"]
        labels = harmful["labels"]
        parts = anatomy(model)
        with capture(model) as seen:
            last = forward(model, harmful)
        every = [*(parts.logits(hidden) for hidden in seen.residual[:-1]), last]
        mean = torch.stack([masked_cross_entropy(logits, labels) for logits in every]).mean()
        answer = (labels != IGNORE_INDEX)[..., None]
        noise = [broadcast_mmd((h * answer).flatten(1), (torch.randn_like(h) * answer).flatten(1)) for h in seen.mlp]
        return {
            "ascent": ALPHA * ascent_term(mean),
            "noise": BETA * torch.stack(noise).mean(),
            "stability": masked_cross_entropy(forward(model, harmless), harmless["labels"]),
        }


class Joined(RepNoise):
    """`RepNoise` with both sides in one forward pass, padded to one length: its values and gradients.

    The head reads the harmless rows only, as in `RepNoise`, so what differs is the joining and nothing else.
    """

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        harmful, harmless = batch["harmful"], batch["harmless"]
        labels, answers = harmful["labels"], harmless["labels"]
        with capture(model) as seen:
            hidden_pass(model, _padded(harmful, harmless))
        count, length = labels.shape
        mean = self.harmful_cross_entropy(model, batch, [h[:count, :length] for h in seen.residual])
        noise = noise_term(
            [h[:count, :length] for h in seen.mlp],
            labels != IGNORE_INDEX,
            generator=window_of(batch).generator("noise", device=labels.device),
        )
        logits = anatomy(model).logits(seen.residual[-1][count:, : answers.shape[1]])
        return {
            "ascent": self.alpha * ascent_term(mean, offset=self.offset),
            "noise": self.beta * noise,
            "stability": masked_cross_entropy(logits, answers),
        }


def _padded(first: Stream, second: Stream) -> Stream:
    """The rows of both, zeros (token 0, not attended to) on the right of the shorter ones."""
    length = max(first["input_ids"].shape[1], second["input_ids"].shape[1])
    wide = {
        name: [nn.functional.pad(side[name], (0, length - side[name].shape[1])) for side in (first, second)]
        for name in ("input_ids", "attention_mask")
    }
    return {name: torch.cat(sides) for name, sides in wide.items()}


def broadcast_mmd(x: Tensor, y: Tensor, kernel_mul: float = 2.0, kernel_num: int = 5) -> Tensor:
    """`losses.gaussian_kernel_mmd` (biased) as the released code writes it: (n + m, n + m, D) differences."""
    rows = torch.cat([x, y]).float()
    distances = (rows[None] - rows[:, None]).square().sum(2)
    bandwidth = distances.detach().sum() / (len(rows) * (len(rows) - 1))
    kernels = torch.stack(
        [torch.exp(-distances / (bandwidth * kernel_mul ** (i - kernel_num // 2))) for i in range(kernel_num)]
    ).sum(0)
    n = len(x)
    return kernels[:n, :n].mean() + kernels[n:, n:].mean() - 2 * kernels[:n, n:].mean()


def objective(case: str, lens_layers: int) -> Objective:
    if case == "plain":
        return Plain()
    if case == "naive":
        return Naive()
    if case == "joined":
        return Joined(alpha=ALPHA, beta=BETA)
    return RepNoise(alpha=ALPHA, beta=BETA, lens_layers=lens_layers if case == "sampled" else None)
