"""Defences: one file each. A file registers an `Objective` under the name that recipes use."""

from __future__ import annotations

from .base import DEFENCES

__all__ = ["DEFENCES"]
