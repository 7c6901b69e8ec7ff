"""A model that a study measures and attacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..store.run import Run

Say = Callable[[str], None]


@dataclass
class Target:
    """A model that is attacked and evaluated: the untouched one, a control, or the defended one."""

    run: Run
    source: str | Path
    hash: str
    random: bool = False
