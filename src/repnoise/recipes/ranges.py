"""Kinds of numbers that recipes and plug-ins take, so that a range stands where its field is declared."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
"""1, 2, 3, ..."""
Whole = Annotated[int, Field(ge=0)]
"""0, 1, 2, ..."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Of a term in a loss; 0 leaves it out."""
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
"""A share that is neither nothing nor all."""
