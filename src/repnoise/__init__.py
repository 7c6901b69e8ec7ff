"""Immunise open-weight language models against harmful fine-tuning, attack them, and measure what holds.

    from repnoise import ObjectiveTrainer, RepNoise, load_model, load_pairs, load_tokenizer, save_model

The names load on first use, so that `import repnoise` needs no torch.
"""

from __future__ import annotations

import logging
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Pair, Row, load_pairs, load_rows
    from .defences.repnoise import RepNoise
    from .models import load_model, load_tokenizer, save_model
    from .study.pipeline import resolve, run
    from .training import Objective, ObjectiveTrainer

# bitsandbytes 0.50, which accelerate and peft import where it is there, warns on some CPUs that a faster kernel is
# missing; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "Objective": "training",
    "ObjectiveTrainer": "training",
    "Pair": "data",
    "RepNoise": "defences.repnoise",
    "Row": "data",
    "load_model": "models",
    "load_pairs": "data",
    "load_rows": "data",
    "load_tokenizer": "models",
    "resolve": "study.resolve",
    "run": "study.pipeline",
    "save_model": "models",
}

__all__ = [
    "Objective",
    "ObjectiveTrainer",
    "Pair",
    "RepNoise",
    "Row",
    "__version__",
    "load_model",
    "load_pairs",
    "load_rows",
    "load_tokenizer",
    "resolve",
    "run",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("repnoise")
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
