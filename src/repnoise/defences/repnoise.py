"""RepNoise: turn harmful representations into noise, at every depth.

Source: Rosati et al., "Representation Noising", NeurIPS 2024, arXiv 2405.14577, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..lens import choose_layers, lens_cross_entropy
from ..losses import (
    IGNORE_INDEX,
    Estimator,
    ascent_term,
    kl_to_reference,
    noise_term,
    official_repnoise_loss,
)
from ..models import anatomy, capture, unwrap
from ..models.structure import is_sharded
from ..models.zero3 import is_zero3
from ..recipes.ranges import Count, Weight
from ..training import Objective, Stream, answer_loss, forward, hidden_pass, window_of
from .base import DEFENCES, frozen_copy

OFFICIAL = ("variant", "alpha", "beta", "frozen_layers", "frozen_parts")
"""Options that mean something beside variant = "official"."""


@DEFENCES.register("repnoise")
@dataclass(kw_only=True)
class RepNoise(Objective):
    """loss = stability + beta * noise - alpha * log(mean over layers of harmful cross-entropy + offset)

    Where we differ from the released code (variant "corrected"): what is trained and noised is the answer span
    (pads never, the first answer token always, token id 0 like any other), each residual stream 0..L is normed and
    counted once, and no hook outlives the forward pass. The released arithmetic is variant "official".
    """

    needs = ("harmful", "harmless")

    alpha: Weight = 1.0
    """Weight of the ascent term (Algorithm 1; the paper's eqs. 4-5 swap the letters)."""
    beta: Weight = 1e-3
    """Weight of the noise term."""
    variant: Literal["corrected", "official"] = "corrected"
    """"official" is the released code's arithmetic, quirk for quirk; of the options alpha, beta, frozen."""
    noise: Literal["sequence", "token"] = "sequence"
    """What one sample of the MMD is: a whole flattened sequence (paper), or one answer token."""
    estimator: Estimator = "biased"
    """MMD estimator; the paper's is the biased one."""
    max_noise_tokens: Count = 512
    """For noise = "token": at most so many answer tokens per step enter the MMD."""
    lens_layers: Count | None = None
    """Layers whose lens is read at each step, drawn anew each time; None = all of them (paper)."""
    offset: Weight = 1.0
    """Added inside the logarithm: 1 as in the released code, 0 as in Algorithm 1."""
    retain: Literal["ce", "kl"] | None = None
    """Stability on retain rows too: cross-entropy, or KL to the frozen original model. None = pairs only (paper)."""
    retain_weight: Weight = 1.0
    """Weight of that term."""
    retain_batch: Count = 1
    """Retain rows beside each pair of a batch."""
    lens: bool = True
    """False: ascent on the last layer only (paper, table 15, "layer-wise")."""
    mask: bool = True
    """False: noise and ascent cover the question too, not only the answer (paper, table 15, "mask"; pads never)."""
    frozen_layers: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of blocks that stay as they are, first and last included, counted from 0 (paper, table 6)."""
    frozen_parts: list[Literal["embeddings", "head", "norm"]] = field(default_factory=list)
    """What else stays: the input embeddings, the output layer, the final norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        others = [each for each in fields(self) if each.name not in OFFICIAL]
        unused = [each.name for each in others if getattr(self, each.name) != each.default]
        if self.variant == "official" and unused:
            raise ConfigError(
                f'variant="official" reproduces the released loss and takes {", ".join(OFFICIAL[1:])} only;'
                f" drop {', '.join(unused)}, or use variant: corrected."
            )
        if not self.lens and self.lens_layers is not None:
            raise ConfigError("lens: false reads the last layer only; drop lens_layers.")
        self._original: nn.Module | None = None

    @property
    def streams(self) -> tuple[str, ...]:
        return (*self.needs, "retain") if self.retain else self.needs

    @property
    def same_length(self) -> bool:
        return self.variant == "official"

    def setup(self, model: nn.Module) -> None:
        self._freeze(model)
        if self.retain == "kl":
            self._original = frozen_copy(model)

    def _freeze(self, model: nn.Module) -> None:
        parts = anatomy(model).own  # ZeRO-3 may have spread them at loading
        for first, last in self.frozen_layers:
            if not 0 <= first <= last < len(parts.layers):
                raise ConfigError(
                    f"frozen_layers: [{first}, {last}] does not fit {len(parts.layers)} layers;"
                    f" allowed: [first, last] from 0 to {len(parts.layers) - 1}."
                )
            for block in parts.layers[first : last + 1]:
                block.requires_grad_(False)
        modules = {"embeddings": [unwrap(model).get_input_embeddings()], "head": [parts.head], "norm": parts.final}  # type: ignore[operator]
        for name in self.frozen_parts:
            for module in modules[name]:
                module.requires_grad_(False)

    def begin_step(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The logarithm is taken of the mean over the whole accumulated batch, so that mean is found first."""
        if self.variant == "official" or self.alpha == 0:
            return {}
        with torch.no_grad():
            total = 0.0
            for batch in batches:
                with capture(model, mlp=False) as seen:
                    hidden_pass(model, batch["harmful"])
                total += self.harmful_cross_entropy(model, batch, seen.residual).item()
        return {"harmful_cross_entropy": total}

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if self.variant == "official":
            return self._official_terms(model, batch)
        window, harmful = window_of(batch), batch["harmful"]
        # The harmful side comes first: the lens has its peak before the harmless logits exist.
        terms: dict[str, Tensor] = {}
        if self.alpha > 0 or self.beta > 0:
            with capture(model, residual=self.alpha > 0, mlp=self.beta > 0) as seen:
                hidden_pass(model, harmful)
        if self.alpha > 0:
            mean = self.harmful_cross_entropy(model, batch, seen.residual)
            whole = window.shared.get("harmful_cross_entropy")
            if whole is None:
                terms["ascent"] = self.alpha * ascent_term(mean, offset=self.offset)
            else:
                # d log(whole) = d(sum of the micro-batches' parts) / whole: exact under accumulation
                value = ascent_term(mean.new_tensor(whole), offset=self.offset) / window.size
                terms["ascent"] = self.alpha * (value - (mean - mean.detach()) / (whole + self.offset))
        if self.beta > 0:
            noise = noise_term(
                seen.mlp,
                self._labels(harmful) != IGNORE_INDEX,
                form=self.noise,
                estimator=self.estimator,
                generator=window.generator("noise", device=seen.mlp[0].device),
                max_tokens=self.max_noise_tokens if self.noise == "token" else None,
            )
            terms["noise"] = self.beta * noise / window.size
        terms["stability"] = answer_loss(model, batch, "harmless")
        if self.retain:
            terms["retain"] = self.retain_weight * self._retain(model, batch)
        return terms

    def harmful_cross_entropy(self, model: nn.Module, batch: Mapping[str, Any], residual: list[Tensor]) -> Tensor:
        """() mean over the layers that are read of the harmful cross-entropy, given all L + 1 residual streams."""
        window = window_of(batch)
        if self.lens_layers is not None and self.lens_layers < len(residual):
            # one choice for the whole optimiser step: the logarithm's argument must be one number
            chosen = choose_layers(len(residual), self.lens_layers, window.generator("lens", per_micro_batch=False))
            residual = [residual[index] for index in chosen]
        if not self.lens:
            residual = residual[-1:]
        tokens = window.tokens.get("harmful") if self.mask else None
        mean, _ = lens_cross_entropy(residual, self._labels(batch["harmful"]), anatomy(model), denominator=tokens)
        return mean if self.mask else mean / window.size  # tokens were counted in the answers only

    def _labels(self, harmful: Stream) -> Tensor:
        """(B, T) what noise and ascent cover: the answer, or everything but padding."""
        if self.mask:
            return harmful["labels"]
        return harmful["input_ids"].masked_fill(harmful["attention_mask"] == 0, IGNORE_INDEX)

    def _retain(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        if self.retain == "ce":
            return answer_loss(model, batch, "retain")
        stream, tokens = batch["retain"], window_of(batch).tokens.get("retain")
        logits = forward(model, stream)
        assert self._original is not None, "setup() was not called"
        with torch.no_grad():
            reference = forward(self._original.to(logits.device), stream)  # copied before the model went there
        return kl_to_reference(logits, reference, stream["labels"], denominator=tokens)

    def _official_terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        window, harmful = window_of(batch), batch["harmful"]
        parts = anatomy(model)
        if is_sharded(model) and not is_zero3(model):  # it calls norm and head by themselves: see models/sharding.py
            raise ConfigError(
                'variant="official" loses gradients of norm and head where FSDP spreads them;'
                " train it in one process or with DDP, or use variant: corrected."
            )
        shape = (*harmful["input_ids"].shape, parts.head.weight.shape[1])  # type: ignore[index]
        device = harmful["input_ids"].device
        generator = window.generator("noise", device=device)
        noise = [torch.randn(shape, generator=generator, device=device) for _ in parts.layers]
        found = official_repnoise_loss(model, harmful, batch["harmless"], alpha=self.alpha, beta=self.beta, noise=noise)
        return {
            "stability": found["stability"] / window.size,
            "noise": self.beta * found["noise"] / window.size,
            "ascent": -self.alpha * torch.log(found["ascent"]) / window.size,
        }
