"""Fine-tuning through any adapter that peft knows and can merge: IA3, AdaLoRA, VeRA, OFT, BOFT, LoHa, LoKr, ...

Source: Mangrulkar et al., PEFT, https://github.com/huggingface/peft; IA3: Liu et al., arXiv 2205.05638; AdaLoRA:
Zhang et al., arXiv 2303.10512; VeRA: Kopiczko et al., arXiv 2310.11454; OFT: Qiu et al., arXiv 2306.07280; BOFT: Liu et
al., arXiv 2311.06243.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..models.adapters import add_adapter, check_adapter, merge
from .base import ATTACKS, Attack, Context


@ATTACKS.register("peft")
@dataclass(kw_only=True)
class Peft(Attack):
    """Plain fine-tuning of an adapter, merged into the weights at the end (https://github.com/huggingface/peft).

    Kinds that are no change of weights (prompt and prefix tuning, ...) cannot be merged and are refused. Where we
    differ from AdaLoRA: its ranks stay at `init_r`, since the budget is not moved between layers while training.
    """

    covers: ClassVar[tuple[str, ...]] = ()

    kind: str = "ia3"
    """Name of the adapter as peft writes it, in either case."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of that kind's config in peft. `target_modules` is all linear layers but the head if left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adapter(self.kind, self._options())

    def prepare(self, model: Any, context: Context) -> Any:
        return add_adapter(model, self.kind, self._options(), steps=context.steps)

    def finish(self, model: Any) -> Any:
        plain = merge(model)
        plain.requires_grad_(True)
        return plain

    def _options(self) -> dict[str, Any]:
        """lora_rank is r, for kinds that have one."""
        return self.options if self.lora_rank is None else {"r": self.lora_rank, **self.options}
