"""Defences: one file each. A file registers an `Objective` under the name that recipes use."""

from __future__ import annotations

from ..registry import Registry
from ..training import Objective

DEFENCES: Registry[Objective] = Registry("defence", "repnoise.defences", Objective)
