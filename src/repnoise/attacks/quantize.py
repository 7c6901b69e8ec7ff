"""Round-to-nearest quantisation of the weights, before any training or instead of it.

Source: Dettmers et al., "LLM.int8()", NeurIPS 2022, arXiv 2208.07339, section 2 (symmetric absmax, per row); for
safety: Kumar et al., "Fine-Tuning, Quantization, and LLMs: Navigating Unintended Outcomes", arXiv 2404.04392.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from .base import ATTACKS, Attack, Context, block_weights


@ATTACKS.register("quantize")
@dataclass(kw_only=True)
class Quantize(Attack):
    """w -> s * round(w / s), s = max |w| of the output row / (2^(bits - 1) - 1), in every block matrix.

    The result is stored in the model's own dtype, so that everything else runs on it unchanged. Where we differ: no
    outlier columns are kept apart, and activations stay as they are.
    """

    covers: ClassVar[tuple[str, ...]] = ("weights", "fine-tuning")

    bits: Annotated[int, Field(ge=2, le=8)] = 4

    def prepare(self, model: Any, context: Context) -> Any:
        top = 2 ** (self.bits - 1) - 1
        for _, weight in block_weights(model):
            exact = weight.float()
            scale = exact.abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
            weight.copy_((exact / scale).round() * scale)
        return super().prepare(model, context)
