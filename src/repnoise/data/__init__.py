"""Training data: pairs and rows from any source, templates, splits. Only the data sets load torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .pairs import Pair, Row, fingerprint, load_pairs, load_rows, side
from .splits import audit, normalise, require_disjoint, split, withhold
from .templates import TEMPLATES, Template, get_template

if TYPE_CHECKING:
    from .collate import PairDataset, RowDataset, StreamCollator, pad_id

_NEED_TORCH = ("PairDataset", "RowDataset", "StreamCollator", "pad_id")

__all__ = [
    "TEMPLATES",
    "Pair",
    "PairDataset",
    "Row",
    "RowDataset",
    "StreamCollator",
    "Template",
    "audit",
    "fingerprint",
    "get_template",
    "load_pairs",
    "load_rows",
    "normalise",
    "pad_id",
    "require_disjoint",
    "side",
    "split",
    "withhold",
]


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        from . import collate

        return getattr(collate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
