"""Evaluations: one file each. A model folder in, rows out."""

from .base import EVALUATIONS, Evaluation, Measured

__all__ = ["EVALUATIONS", "Evaluation", "Measured"]
