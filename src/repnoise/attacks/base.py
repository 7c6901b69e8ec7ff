"""What all attacks share: an objective on an attacker's rows, full weights or a LoRA adapter merged at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..models import add_lora, merge
from ..registry import Registry
from ..training import Objective


@dataclass(kw_only=True)
class Attack(Objective):
    """An adversary who holds the released weights and trains them. Subclasses define `terms`.

    Learning rate, steps, batch, schedule, template and seed are axes of the recipe, not of the class.
    """

    lora_rank: int | None = None
    """Train a LoRA adapter of this rank on all linear layers; None = all weights."""

    def __post_init__(self) -> None:
        self.needs = ("harmful",)
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ConfigError(f"lora_rank is {self.lora_rank}; allowed: 1 or more, or null for full fine-tuning.")

    def prepare(self, model: Any) -> Any:
        """The model to train."""
        return model if self.lora_rank is None else add_lora(model, self.lora_rank)

    def finish(self, model: Any) -> Any:
        """The plain model after training."""
        return model if self.lora_rank is None else merge(model)


ATTACKS: Registry[Attack] = Registry("attack", "repnoise.attacks", Attack)
