"""Attacks: one file each. A file registers an `Attack` under the name that recipes use."""

from __future__ import annotations

from .base import ATTACKS, Attack, Context, Loot, attacker, distinct, training_values, unknown_to

__all__ = ["ATTACKS", "Attack", "Context", "Loot", "attacker", "distinct", "training_values", "unknown_to"]
