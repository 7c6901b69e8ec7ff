"""Attacks: one file each. A file registers an `Attack` under the name that recipes use."""

from __future__ import annotations

from .base import ATTACKS, Attack, AttackerRows, Context

__all__ = ["ATTACKS", "Attack", "AttackerRows", "Context"]
