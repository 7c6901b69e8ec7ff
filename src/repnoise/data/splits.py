"""Disjoint sets: audit them, enforce it, split rows, withhold categories."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeVar

from ..errors import DataError, suggest
from .pairs import Pair, Row

T = TypeVar("T")
Prompts = Iterable[str | Pair | Row]

_NO_WORD = re.compile(r"[\W_]+")


def normalise(prompt: str) -> str:
    """The prompt without case, punctuation and spacing; prompts with the same normal form count as one."""
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    return _NO_WORD.sub(" ", folded).strip() or folded.strip()


def audit(**sets: Prompts) -> dict[str, Any]:
    """How far the named sets of prompts overlap, by normal form; holds counts and no texts.

    Returns:
        `{"sets": {name: {"rows", "distinct"}}, "overlaps": [{"sets": [a, b], "prompts", "rows": {a: n, b:
        n}}], "disjoint": bool}`: `prompts` counts the distinct prompts in both, `rows` the rows of each set
        that they make up.
    """
    keys = {name: [_key(item) for item in items] for name, items in sets.items()}
    overlaps = []
    for a, b in combinations(keys, 2):
        common = set(keys[a]) & set(keys[b])
        if common:
            rows = {name: sum(key in common for key in keys[name]) for name in (a, b)}
            overlaps.append({"sets": [a, b], "prompts": len(common), "rows": rows})
    return {
        "sets": {name: {"rows": len(found), "distinct": len(set(found))} for name, found in keys.items()},
        "overlaps": overlaps,
        "disjoint": not overlaps,
    }


def require_disjoint(*, allow_overlap: bool = False, **sets: Prompts) -> dict[str, Any]:
    """`audit(**sets)` with `allow_overlap` added, for the manifest.

    Raises:
        DataError: two sets share prompts and `allow_overlap` is false.
    """
    record = {**audit(**sets), "allow_overlap": allow_overlap}
    if record["disjoint"] or allow_overlap:
        return record
    lines = []
    for overlap in record["overlaps"]:
        parts = [f"{overlap['rows'][n]} of {record['sets'][n]['rows']} rows of {n}" for n in overlap["sets"]]
        lines.append(f"  {' and '.join(overlap['sets'])} share {overlap['prompts']} prompts ({', '.join(parts)})")
    raise DataError(
        "sets that must be disjoint overlap (case, punctuation and spacing ignored):\n"
        + "\n".join(lines)
        + "\nMeasured like this, resistance is memory and not protection. Split the data anew (`split`), or"
        " set allow_overlap: true to go on; the manifest will say so."
    )


def split(
    items: Sequence[T],
    sizes: Mapping[str, int | float],
    seed: int = 0,
    by: str | Callable[[T], str] = "prompt",
) -> dict[str, list[T]]:
    """Divide `items` into named parts and keep items with equal keys together.

    Args:
        items: pairs, rows, or anything that `by` can read.
        sizes: part -> number of items (int) or share of all (float in (0, 1]). Items are left over if the
            sizes ask for fewer. Groups are never cut, so a part may miss its share by less than one group; a
            number is exact or an error.
        seed: which items go where; the order of `items` has no influence on it, except among equal ones.
        by: attribute whose value is the key ("prompt" is compared in normal form), or a function.

    Returns:
        part -> its items, shuffled by the seed.

    Raises:
        DataError: too few items, or a part would be empty.
    """
    targets = _targets(len(items), sizes)
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(_group(item, by), []).append(item)
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    parts: dict[str, list[T]] = {name: [] for name in sizes}
    leftover = []
    for key in order:
        group = groups[key]
        fits = [name for name in parts if targets[name] - len(parts[name]) >= len(group)]
        if fits:
            parts[fits[0]].extend(group)
        else:
            leftover.append(group)
    shares = [name for name, size in sizes.items() if isinstance(size, float)]
    for group in leftover:  # a part that asked for a share may end up a group too large, but not two
        short = [name for name in shares if len(parts[name]) < targets[name]]
        if short:
            name = max(short, key=lambda part: targets[part] - len(parts[part]))
            parts[name].extend(group)
    for name, part in parts.items():
        if not part or (name not in shares and len(part) < targets[name]):
            raise DataError(
                f"part {name!r} gets {len(part)} of {targets[name]} items: there are {len(items)} items in"
                f" {len(groups)} groups with equal {by if isinstance(by, str) else 'key'}, which stay"
                " together. Ask for less, or give more data."
            )
    return parts


def withhold(pairs: Iterable[Pair], categories: Iterable[str]) -> tuple[list[Pair], list[Pair]]:
    """`(kept, withheld)`: pairs inside `categories` are withheld; kept are those whose prompt is not among theirs.

    Raises:
        DataError: a category does not occur, or nothing would be left.
    """
    pairs, wanted = list(pairs), sorted(set(categories))
    present = sorted({pair.category for pair in pairs if pair.category is not None})
    for name in wanted:
        if name not in present:
            raise DataError(
                f"no pair has the category {name!r}.{suggest(name, present)}"
                f" Categories there: {', '.join(present) or 'none (the source gives no category)'}."
            )
    withheld = [pair for pair in pairs if pair.category in wanted]
    hidden = set(map(_key, withheld))
    kept = [pair for pair in pairs if _key(pair) not in hidden]
    if not kept:
        raise DataError(f"withholding {', '.join(wanted)} leaves no pairs. Withhold fewer categories.")
    return kept, withheld


def _key(item: str | Pair | Row) -> str:
    return normalise(item if isinstance(item, str) else item.prompt)


def _group(item: Any, by: str | Callable[[Any], str]) -> str:
    if callable(by):
        return by(item)
    value = item.get(by) if isinstance(item, Mapping) else getattr(item, by, None)
    if not isinstance(value, str):
        raise DataError(f"cannot split by {by!r}: an item has no such text. Choose another key or fill it in.")
    return normalise(value) if by == "prompt" else value


def _targets(count: int, sizes: Mapping[str, int | float]) -> dict[str, int]:
    """Items wanted in each part; the parts' rounding adds up."""
    bad = [n for n, s in sizes.items() if isinstance(s, bool) or s <= 0 or (isinstance(s, float) and s > 1)]
    shares = {name: size for name, size in sizes.items() if isinstance(size, float)}
    if bad or not sizes or sum(shares.values()) > 1 + 1e-9:
        raise DataError(
            f"sizes are {dict(sizes)}; allowed: whole numbers of items, or shares above 0 that add up to at most 1.0."
        )
    targets = {name: int(size) for name, size in sizes.items() if name not in shares}
    total, given = 0.0, 0
    for name, share in shares.items():  # round the running sum, so that shares of 1.0 use every item
        total += share * count
        targets[name] = round(total) - given
        given += targets[name]
    if sum(targets.values()) > count:
        raise DataError(f"sizes {dict(sizes)} ask for {sum(targets.values())} of {count} items. Ask for less.")
    return {name: targets[name] for name in sizes}
