"""Adaptive: freeze the layers that the defence changed most and train around them.

Source: the freezing ablation of the paper (table 6) asks which layers carry the defence; an attacker asks the same by
comparing weights with the public checkpoint (the paper's figure 2 shows uneven differences), arXiv 2405.14577.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError
from ..models import anatomy
from ..recipes.ranges import Count
from .base import ATTACKS, Attack, Context, alike


@ATTACKS.register("freeze_changed")
@dataclass(kw_only=True)
class FreezeChanged(Attack):
    """Plain fine-tuning of everything but the `layers` blocks that differ most from the public checkpoint.

    Difference of a block = |w - w_public| / |w_public| over all its weights (paper, figure 2, relative instead of
    absolute, so that layers of different size compare). Where all are equal (the undefended model) the first ones
    are frozen, so that it is attacked with as few free weights as the defended one.
    """

    covers: ClassVar[tuple[str, ...]] = ()

    layers: Count = 1
    """How many blocks to freeze; fewer than the model has."""
    public: str | None = None
    """The public checkpoint: folder or hub id of the same architecture; null = the model that the study defends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._no_lora("freeze_changed chooses which of the model's own weights are trained")

    def prepare(self, model: Any, context: Context) -> Any:
        blocks = anatomy(model).layers
        if self.layers >= len(blocks):
            raise ConfigError(f"layers is {self.layers}; allowed: 1 to {len(blocks) - 1}, the model has {len(blocks)}.")
        place = {id(p): index for index, block in enumerate(blocks) for p in block.parameters()}
        apart, size = [0.0] * len(blocks), [0.0] * len(blocks)
        for _, parameter, public in alike(model, context.public(self.public)):
            if (index := place.get(id(parameter))) is not None:
                apart[index] += float((parameter.detach() - public).float().square().sum())
                size[index] += float(public.float().square().sum())
        change = [a / max(s, 1e-30) for a, s in zip(apart, size, strict=True)]
        for index in sorted(range(len(blocks)), key=lambda index: (-change[index], index))[: self.layers]:
            blocks[index].requires_grad_(False)
        return super().prepare(model, context)
