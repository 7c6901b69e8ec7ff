"""Train one kind of parameter only: the embeddings, the head, or the norms.

Source: Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", ICLR 2024,
arXiv 2312.11420 (norms); Lester et al., arXiv 2104.08691 (what is fed in); the paper's table 6 (head).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from ..models import anatomy
from .base import ATTACKS, Attack, Context, norms


@ATTACKS.register("parts")
@dataclass(kw_only=True)
class Parts(Attack):
    """Plain fine-tuning of `part`; every other weight stays bit for bit (arXiv 2312.11420 for the norms).

    A defence that only hides the harm near the input or the output falls to this with few weights. Where head and
    embeddings are tied they are one matrix, and training the one trains the other.
    """

    covers: ClassVar[tuple[str, ...]] = ()

    part: Literal["embeddings", "head", "norms"] = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._no_lora("parts trains some of the model's own weights")

    def prepare(self, model: Any, context: Context) -> Any:
        chosen: list[nn.Module] = {
            "embeddings": lambda: [model.get_input_embeddings()],
            "head": lambda: [anatomy(model).head],
            "norms": lambda: norms(model),
        }[self.part]()
        model.requires_grad_(False)
        for module in chosen:
            module.requires_grad_(True)
        return super().prepare(model, context)
