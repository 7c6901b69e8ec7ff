"""Judges: what kind of answer a text is. One file each; a file registers a `Judge` under the recipe's name."""

from .base import JUDGES, LABELS, Asked, Judge, Judgement, Label, build_judges, prompt_mark, shared_prompts
from .text import is_degenerate, is_refusal

__all__ = [
    "JUDGES",
    "LABELS",
    "Asked",
    "Judge",
    "Judgement",
    "Label",
    "build_judges",
    "is_degenerate",
    "is_refusal",
    "prompt_mark",
    "shared_prompts",
]
