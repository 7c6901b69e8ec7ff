"""A security vector: an adapter that lies beside the weights, is active while others train them, and then is not.

Source: Zhou et al., "Making Harmful Behaviors Unlearnable for Large Language Models", Findings of ACL 2024, arXiv
2311.02105, section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import adapters

FOLDER = "security_vector"
Shifts = Sequence[tuple[nn.Parameter, Tensor]]


def save_vector(model: Any, folder: str | Path) -> None:
    """Write the adapter of the peft `model` into the model folder, in peft's own format, beside the weights."""
    model.save_pretrained(str(Path(folder) / FOLDER), safe_serialization=True)


def read_vector(model: Any, source: str | Path) -> Shifts:
    """What the security vector in the model folder `source` adds to each weight of `model`; empty without one.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    folder = Path(source) / FOLDER
    if not folder.is_dir():
        return ()
    with_it = adapters.load_adapter(copy.deepcopy(model), folder)
    pairs = zip(model.parameters(), with_it.parameters(), strict=True)
    return [(weight, (added - weight).detach()) for weight, added in pairs if not torch.equal(weight, added)]


@contextmanager
def active(shifts: Shifts) -> Iterator[None]:
    """Inside, the model computes with its vector: w + shift. Whatever training did to w inside stays."""
    _add(shifts, 1)
    try:
        yield
    finally:
        _add(shifts, -1)


@contextmanager
def asleep(shifts: Shifts) -> Iterator[None]:
    """Inside `active`: the model without its vector, for a look on the way."""
    _add(shifts, -1)
    try:
        yield
    finally:
        _add(shifts, 1)


def _add(shifts: Shifts, sign: int) -> None:
    for weight, shift in shifts:
        weight.data.add_(shift, alpha=sign)
