"""A model that a study measures and attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..store.provenance import canonical_hash
from ..store.run import Run

Say = Callable[[str], None]


@dataclass
class Target:
    """The untouched model, a control, or the defended one.

    Attributes:
        source, revision: where its weights are.
        depends: everything that makes it what it is; its hash is the hash of its run.
        random: fresh weights of the source's architecture.
    """

    run: Run
    source: str | Path
    depends: Mapping[str, Any]
    random: bool = False
    revision: str | None = None

    @cached_property
    def hash(self) -> str:
        return canonical_hash(self.depends)
