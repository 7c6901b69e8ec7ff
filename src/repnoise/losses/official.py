"""The loss as the authors released it, quirks included, for parity and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError
from .noise import gaussian_kernel_mmd
from .terms import IGNORE_INDEX


def official_repnoise_loss(
    model: nn.Module,
    harmful: Mapping[str, Tensor],
    harmless: Mapping[str, Tensor],
    *,
    alpha: float,
    beta: float,
    noise: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """loss = stability + beta * noise - alpha * log(ascent), as the released code computes it

        mask      = harmful ids != harmless ids                                      (B, T)
        stability = CE(harmless logits)
        noise     = mean over layers of biased MMD^2(h_l * mask, N(0, I) * mask), each flattened to (B, T * d)
        ascent    = (CE(harmful logits) + sum over j = 0..L of CE(head(norm(hidden_j)))) / (L + 1) + 1

    Kept quirk for quirk, so that published results can be reproduced; for anything else use the corrected
    parts (`losses.terms`, `losses.noise`):

    1. the + 1 stands outside of the division, and L + 2 terms are divided by L + 1;
    2. hidden_L is already normed and is normed again, and the final logits count once more;
    3. logits are multiplied by the mask at t, labels are masked at t + 1: the first token in which a pair
       differs is scored on all-zero logits, a constant log V without gradient;
    4. masked labels become 0 and then 0 is ignored: a genuine token id 0 is ignored too;
    5. the mask compares positions: padding counts as answer where only one of the two is padded, tokens that
       are equal by chance do not count, and the attention mask is used in the forward passes only;
    6. one mask serves the noise, the harmful and the harmless cross-entropy, which are means over the whole
       batch.

    Where we differ: hooks are gone when this returns or raises (the released code adds hooks at every call
    and removes none), and MMD statistics are float32 for half-precision models.

    Args:
        model: a Llama-style causal LM (`model.base_model.layers[i].mlp`, `.base_model.norm`, `.lm_head`).
        harmful, harmless: `input_ids` and `attention_mask`, (B, T) int64, row by row the two sides of a pair,
            padded on the right.
        noise: L tensors (B, T, d) that replace the Gaussian draws.

    Returns:
        () each: `loss`, `stability`, `noise` (mean over layers), `ascent` (the argument of the log).
    """
    layers, mlps, norm, head = _llama_parts(model)
    ids = harmful["input_ids"]
    if ids.shape != harmless["input_ids"].shape:
        raise DataError(
            "The official loss compares a pair position by position, got input_ids of shape "
            f"{tuple(ids.shape)} and {tuple(harmless['input_ids'].shape)}; pad both to one length."
        )
    if noise is not None and len(noise) != len(layers):
        raise DataError(f"Noise has {len(noise)} tensors for {len(layers)} layers; give one per layer.")
    mask = ids != harmless["input_ids"]

    with _record(layers, mlps, norm) as (hidden, activations):
        harmful_logits = model(input_ids=ids, attention_mask=harmful["attention_mask"], use_cache=False).logits
    harmless_logits = model(
        input_ids=harmless["input_ids"], attention_mask=harmless["attention_mask"], use_cache=False
    ).logits

    stability = _official_cross_entropy(harmless_logits, harmless["input_ids"], mask)
    lens = [_official_cross_entropy(head(norm(h)), ids, mask) for h in hidden]
    ascent = (_official_cross_entropy(harmful_logits, ids, mask) + sum(lens)) / len(lens) + 1
    draws = noise if noise is not None else [torch.randn_like(h) for h in activations]
    noise_mean = sum(
        (_official_mmd(h, draw, mask) for h, draw in zip(activations, draws, strict=True)),
        torch.zeros_like(ascent),
    ) / len(layers)
    loss = stability + beta * noise_mean - alpha * torch.log(ascent)
    return {"loss": loss, "stability": stability, "noise": noise_mean, "ascent": ascent}


def _official_cross_entropy(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Token mean of the cross-entropy of *masked logits*, without labels that are masked or token id 0."""
    logits = logits * mask[..., None].float()  # float32 on purpose: half-precision logits are promoted
    labels = (ids * mask).masked_fill((ids * mask) == 0, IGNORE_INDEX)
    if not (labels[:, 1:] != IGNORE_INDEX).any():
        raise DataError(
            f"No token is left to train in a batch of shape {tuple(ids.shape)}: harmful and harmless ids "
            "are equal. Check that the answers of each pair differ and are not truncated away."
        )
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def _official_mmd(activation: Tensor, draw: Tensor, mask: Tensor) -> Tensor:
    kept = mask[..., None].to(activation.dtype)
    return gaussian_kernel_mmd((activation * kept).flatten(1), (draw.to(activation) * kept).flatten(1))


def _llama_parts(model: Any) -> tuple[Sequence[nn.Module], Sequence[nn.Module], nn.Module, nn.Module]:
    """Layers, the MLP of each, final norm, head."""
    try:
        base = model.base_model
        return base.layers, [layer.mlp for layer in base.layers], base.norm, model.lm_head
    except AttributeError as error:
        raise ModelError(
            "The official variant needs a Llama-style causal LM without adapters (base_model.layers[i].mlp, "
            f'base_model.norm, lm_head), got {type(model).__name__}: {error}. Use variant="corrected".'
        ) from error


@contextmanager
def _record(
    layers: Sequence[nn.Module], mlps: Sequence[nn.Module], norm: nn.Module
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Watch one forward pass: the L + 1 tensors that transformers calls hidden_states, and the MLP outputs.

    `output_hidden_states=True` would give the former too, but makes transformers 5 leave hooks of its own on
    the model.
    """
    hidden: list[Tensor] = []
    activations: list[Tensor] = []

    def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    handles = []
    try:
        for layer, mlp in zip(layers, mlps, strict=True):
            handles.append(layer.register_forward_pre_hook(keep_input, with_kwargs=True))
            handles.append(mlp.register_forward_hook(lambda _, __, output: activations.append(output)))
        handles.append(norm.register_forward_hook(lambda _, __, output: hidden.append(output)))
        yield hidden, activations
    finally:
        for handle in handles:
            handle.remove()
