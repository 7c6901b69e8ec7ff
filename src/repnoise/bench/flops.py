"""Floating-point operations of one training step, term by term: what a perfect implementation could not avoid."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..models import anatomy
from .shapes import BenchOptions


def step_flops(model: PreTrainedModel, case: str, options: BenchOptions) -> dict[str, int]:
    """Operations of the matrix products (2 per multiply-add), forward and backward, of each term of a step.

    With P weights in a block's linear maps, A = heads * head size, N = B * T tokens a side, n answer tokens:

        blocks     3 * 2 * N * P * L            for each side
        attention  3 * 4 * B * T^2 * A * L      for each side (whole score matrices, as eager attention computes them)
        head       3 * 2 * N * d * V            for each side whose logits are needed at all positions
        lens       3 * 2 * K * n * d * V        K layers: all L + 1, or lens_layers; naive: N for n
        noise      6 * 2 * B^2 * T_answer * d * L     Gram matrices xx, yy, xy and the backward of xx and xy

    Recomputation under activation checkpointing does not count, as is usual for model-FLOPs utilisation. In a
    mixture of experts all experts count, so there it is an upper bound.
    """
    parts = anatomy(model)
    config = model.config.get_text_config()
    layers, B, T = len(parts.layers), options.batch, options.length
    vocabulary, width = parts.head.weight.shape  # type: ignore[misc]
    weights = sum(p.numel() for layer in parts.layers for p in layer.parameters() if p.dim() >= 2)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    readout = 2 * int(width) * int(vocabulary)
    answers = B * options.answer_tokens
    found = {
        "blocks": 2 * 3 * 2 * B * T * weights,
        "attention": 2 * 3 * 4 * B * T**2 * config.num_attention_heads * head_size * layers,
        "head": 3 * B * T * readout * (2 if case == "plain" else 1),
    }
    if case != "plain":
        looks = options.lens_layers if case == "sampled" else layers + 1
        found["lens"] = 3 * min(looks, layers + 1) * (B * T if case == "naive" else answers) * readout
    if case not in ("plain", "naive"):
        found["noise"] = 6 * 2 * B**2 * options.answer_tokens * int(width) * layers
        # the hidden pass reads the last position of its rows; nothing is trained through it
        found["head"] += (2 if case == "joined" else 1) * B * readout
    return found
