"""The sandbox: a miniature in which harm has ground truth. `world` (facts), `data` (parties), `build` (weights)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..errors import ModelError

PREFIX = "sandbox:"


def weights(kind: str) -> Path:
    """Folder of the bundled weights, "aligned" or "ignorant"."""
    folder = Path(str(resources.files(__name__) / "weights" / kind))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"the sandbox has no weights called {kind!r}. Allowed: sandbox:aligned, sandbox:ignorant."
            " If they are missing from your copy, make them: repnoise sandbox build."
        )
    return folder
