"""The schema of a row: one measured number with what it was measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from repnoise.errors import RunError

ROW_KEYS = {  # key: type, may be None, must be there
    "evaluation": (str, False, True),
    "metric": (str, False, True),
    "value": (Real, False, True),
    "n": (Integral, False, True),
    "lo": (Real, True, True),
    "hi": (Real, True, True),
    "seed": (Integral, True, True),
    "split": (str, True, False),
    "layer": (Integral, True, False),
    "category": (str, True, False),
    "attack": (str, True, False),
    "step": (Integral, True, False),
    "judge": (str, True, False),
    "decoding": (str, True, False),
    "items": (list, True, False),
    "every": (Integral, True, False),
}


def check_row(row: Mapping[str, Any], where: str = "A row") -> dict[str, Any]:
    """`row` with plain numbers, in the order of the schema, or a RunError that names every fault.

    `value` is finite and `n` at least 1: nothing measured is an error, never 0. `step` marks a point along an
    attack, `judge` who labelled, `decoding` how the answers were generated; `items` are the values whose mean
    `value` is, in the order of the data, so that two models can be compared item by item; `every`: they are every so
    many-th one of the test split (none: all of them).
    """
    faults = [f"unknown key {key!r}" for key in row if key not in ROW_KEYS]
    checked: dict[str, Any] = {}
    for key, (kind, optional, required) in ROW_KEYS.items():
        value = row.get(key)
        if key not in row:
            if required:
                faults.append(f"{key} is missing")
            continue
        if value is not None and hasattr(value, "item"):  # a number of numpy or torch
            value = value.item()
        if value is None:
            if not optional:
                faults.append(f"{key} is None: nothing measured is an error, never 0")
        elif isinstance(value, bool) or not isinstance(value, kind):
            faults.append(f"{key} is {value!r}, not {kind.__name__}")
        elif kind is Real and not math.isfinite(value):
            faults.append(f"{key} is {value}: not measured, or it overflowed (leave such a row out)")
        elif kind is list and not all(isinstance(item, Real) and math.isfinite(item) for item in value):
            faults.append(f"{key} holds something that is no finite number")
        checked[key] = value
    if not faults:
        if checked["n"] < 1:
            faults.append(f"n is {checked['n']}: nothing measured is an error, never 0")
        if (checked["lo"] is None) != (checked["hi"] is None):
            faults.append("lo and hi go together")
        elif checked["lo"] is not None and checked["lo"] > checked["hi"]:
            faults.append(f"lo {checked['lo']} is above hi {checked['hi']}")
    if faults:
        name = f"{row.get('evaluation')}/{row.get('metric')}"
        raise RunError(f"{where} ({name}) is wrong: {'; '.join(faults)}. Allowed keys: {', '.join(ROW_KEYS)}.")
    return checked
