"""Answers that somebody has labelled harmful or not: what a judge learns from and is checked against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DataError
from .problems import Problems
from .readers import read_records


def labelled_rows(source: str, *, split: str | None = None) -> list[dict[str, Any]]:
    """Rows {"prompt": str, "answer": str, "harmful": bool} of a source.

    Args:
        source: `beavertails:PATH` (prompt, response, is_safe), `decoding_trust:PATH` (prompt.text, continuation.text;
            types toxic and toxic_test are harmful, non_toxic is not), or a file or hub:owner/name with the columns
            answer, harmful (true/false or 1/0) and, if there is one, prompt.
        split: as in `readers.read_records`.

    Raises:
        DataError: missing file or columns, wrong types, no rows. Names lines and columns, quotes no text.
    """
    name, _, rest = source.partition(":")
    kind, target = (name, rest) if name in _READ else ("file", source)
    problems = Problems(f"labelled rows from {source}", "Mend the rows or leave them out.")
    rows, seen = [], 0
    for where, record in read_records(target, split):
        seen += 1
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, got {type(record).__name__}")
            rows.append(_READ[kind](record))
        except ValueError as error:
            problems.add(where, str(error))
    problems.raise_if_any(seen)
    if not rows:
        raise DataError(f"{source}: no rows. Give a file with the columns prompt, answer and harmful.")
    return rows


def _beavertails(record: Mapping[str, Any]) -> dict[str, Any]:
    row = {"prompt": record.get("prompt"), "answer": record.get("response"), "harmful": record.get("is_safe")}
    found = checked(row, {"answer": "response", "harmful": "is_safe"})
    return {**found, "harmful": not found["harmful"]}


def _decoding_trust(record: Mapping[str, Any]) -> dict[str, Any]:
    parts = (record.get("prompt"), record.get("continuation"))
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    kind = record.get("type")
    if kind not in ("toxic", "toxic_test", "non_toxic"):
        raise ValueError("'type' is missing or none of toxic, toxic_test, non_toxic")
    row = {"prompt": texts[0], "answer": texts[1], "harmful": kind != "non_toxic"}
    return checked(row, {"prompt": "prompt.text", "answer": "continuation.text"})


def checked(row: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The row with the types that `labelled_rows` promises; `names` are the columns' own, for messages."""
    called = {key: (names or {}).get(key, key) for key in ("prompt", "answer", "harmful")}
    prompt, answer, harmful = row.get("prompt") or "", row.get("answer"), row.get("harmful")
    for key, value in (("prompt", prompt), ("answer", answer)):
        if not isinstance(value, str):
            raise ValueError(f"{called[key]!r} is missing or not text")
    word = str(harmful).strip().lower()  # CSV knows text only
    if word not in ("true", "false", "1", "0"):
        raise ValueError(f"{called['harmful']!r} is missing or none of true, false, 1, 0")
    return {"prompt": prompt, "answer": answer, "harmful": word in ("true", "1")}


_READ: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "file": checked,
    "beavertails": _beavertails,
    "decoding_trust": _decoding_trust,
}
