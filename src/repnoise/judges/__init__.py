"""Judges: what kind of answer a text is."""

from .rules import LABELS, Label, is_degenerate, is_refusal, label_answer

__all__ = ["LABELS", "Label", "is_degenerate", "is_refusal", "label_answer"]
