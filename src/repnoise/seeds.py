"""Seeds from what a draw is for, so that no state is carried and a resumed run draws what an unbroken one would."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: str | int) -> int:
    """A seed of 63 bits: the same for the same parts on every machine, another one for any other parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
