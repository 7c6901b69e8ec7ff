"""The schema of training data: pairs and rows, read from any source and checked before anything uses them."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import DataError
from .problems import Problems
from .sources import SOURCES, Source

Side = Literal["harmful", "harmless"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One harmful prompt with a harmful answer and a harmless one, usually a refusal."""

    prompt: str
    harmful: str
    harmless: str
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with one answer: retain data, or plain fine-tuning data."""

    prompt: str
    answer: str
    category: str | None = None


Item = TypeVar("Item", Pair, Row)
DataSource = str | Path | Iterable[Mapping[str, Any]]

_SCHEMA: dict[type, tuple[str, ...]] = {Pair: ("prompt", "harmful", "harmless"), Row: ("prompt", "answer")}
_NAMED = re.compile(r"(?P<name>[A-Za-z]\w+):(?P<target>.+)", re.DOTALL)  # two letters or more: not a drive


def load_pairs(
    source: DataSource,
    *,
    split: str | None = None,
    limit: int | None = None,
    fields: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Pair]:
    """Pairs from `source`, in its order.

    Args:
        source: a path (.jsonl, .json, .csv, .tsv, .parquet), `name:target` for a registered source
            (`decoding_trust:PATH`, `beavertails:PATH`, `hub:owner/name`), or dictionaries already in memory.
        split: which part of the source to read.
        limit: keep the first `limit` pairs; the whole source is checked all the same.
        fields: our name -> the source's column, for example `{"harmful": "response"}`; a dot reaches into a
            nested column. Only for files, hub data sets and dictionaries.
        options: options of a registered source, for example `{"refusals": "none"}`.

    Raises:
        DataError: nothing to read, or bad rows; the message counts them all and never quotes their text.
    """
    return _load(Pair, source, split, limit, fields, options)


def load_rows(
    source: DataSource,
    *,
    split: str | None = None,
    limit: int | None = None,
    fields: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Rows from `source`; arguments and errors as for `load_pairs`. `fields={"answer": "harmful"}` reads one
    side of a file of pairs.
    """
    return _load(Row, source, split, limit, fields, options)


def side(pairs: Iterable[Pair], which: Side) -> list[Row]:
    """One side of the pairs as rows: `harmful` is what an attacker trains on."""
    if which not in ("harmful", "harmless"):
        raise DataError(f"a pair has no side {which!r}; allowed: harmful, harmless.")
    return [Row(pair.prompt, getattr(pair, which), pair.category) for pair in pairs]


def fingerprint(items: Iterable[Pair | Row]) -> str:
    """SHA-256 of the items' content and order, for manifests and run hashes."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([type(item).__name__, *(getattr(item, f) for f in item.__slots__)]).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _load(
    kind: type[Item],
    source: DataSource,
    split: str | None,
    limit: int | None,
    fields: Mapping[str, str] | None,
    options: Mapping[str, Any] | None,
) -> list[Item]:
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; allowed: 1 or more, or none to read everything.")
    reader = _open(source, split, options)
    word = f"{kind.__name__.lower()}s"
    columns = _columns(kind, fields, reader)
    need = ", ".join(_SCHEMA[kind])
    problems = Problems(
        f"{word} from {_describe(source)}",
        f"Each row needs {need} as non-empty strings (category: a string or nothing)."
        " Correct the rows, or name the columns with `fields`.",
    )
    items: list[Item] = []
    seen = 0
    for where, record in reader.records():
        seen += 1
        try:
            if isinstance(record, ValueError):  # a line that could not be parsed
                raise record
            if not isinstance(record, Mapping):
                raise ValueError(f"is a {type(record).__name__}, not an object with named fields")
            values = reader.pair(record) if kind is Pair else reader.row(record)
        except ValueError as error:
            problems.add(where, str(error))
            continue
        if values is None:
            continue
        taken = {name: _get(values, column) for name, column in columns.items()}
        taken["category"] = taken["category"] or None  # an empty cell of a CSV file
        wrong = _wrong(kind, taken, columns)
        if wrong:
            if not problems.found and isinstance(record, Mapping):
                names = ", ".join(str(name)[:40] for name in list(record)[:12])
                problems.advice += f" The first bad row has the columns: {names}."
            problems.add(where, "; ".join(wrong))
        else:
            items.append(kind(**taken))
    problems.raise_if_any(seen)
    if not items:
        raise DataError(
            f"{word} from {_describe(source)}: none found in {seen} records"
            f"{f' of split {split!r}' if split else ''}. An empty set cannot be trained on or measured;"
            f" each row needs {need}."
        )
    return items[:limit]


def _wrong(kind: type, taken: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """What is wrong with the fields of one row, by name."""
    wrong = []
    for name in _SCHEMA[kind]:
        shown = f"'{name}'" if columns[name] == name else f"'{columns[name]}' (for {name})"
        value = taken[name]
        if value is None:
            wrong.append(f"{shown} is missing")
        elif not isinstance(value, str):
            wrong.append(f"{shown} is a {type(value).__name__}, not a string")
        elif not value.strip():
            wrong.append(f"{shown} is empty")
        elif not _encodable(value):
            wrong.append(f"{shown} holds half of a surrogate pair, which is no text")
    if not isinstance(taken["category"], str | None):
        wrong.append(f"'category' is a {type(taken['category']).__name__}, not a string")
    if kind is Pair:
        missing = [name for name in ("harmful", "harmless") if taken[name] is None]
        if len(missing) == 1:
            wrong.append("the row is unpaired: a pair has a harmful and a harmless answer to the same prompt")
        elif not wrong and taken["harmful"].strip() == taken["harmless"].strip():
            wrong.append("'harmful' and 'harmless' are the same text")
    return wrong


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Memory(Source):
    """Dictionaries (or pairs and rows) that the caller already holds."""

    renames = True

    def __init__(self, items: Iterable[Any]) -> None:
        super().__init__("memory")
        self.items = items

    def records(self) -> Iterator[tuple[str, Any]]:
        for number, item in enumerate(self.items, 1):
            known = isinstance(item, Pair | Row)
            yield f"row {number}", {f: getattr(item, f) for f in item.__slots__} if known else item

    def pair(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        return record

    row = pair


def _open(source: DataSource, split: str | None, options: Mapping[str, Any] | None) -> Source:
    if not isinstance(source, str | Path):
        if split is not None or options:
            raise DataError("rows given in memory have no split and no options; filter them before the call.")
        return _Memory(source)
    name, target = "file", str(source)
    match = _NAMED.fullmatch(target)
    if match is not None and not Path(target).exists():
        name, target = match["name"], match["target"]
    cls = SOURCES.get(name)
    allowed = [p for p in inspect.signature(cls).parameters if p not in ("target", "split")]
    unknown = sorted(set(options or {}) - set(allowed))
    if unknown:
        raise DataError(
            f"data source {name!r} has no option {', '.join(map(repr, unknown))}; allowed:"
            f" {', '.join(allowed) or 'none'}."
        )
    return cls(target, split=split, **(options or {}))


def _columns(kind: type, fields: Mapping[str, str] | None, reader: Source) -> dict[str, str]:
    """Our name -> column, the identity where `fields` says nothing."""
    names = (*_SCHEMA[kind], "category")
    unknown = sorted(set(fields or {}) - set(names))
    if unknown:
        raise DataError(
            f"fields names {', '.join(map(repr, unknown))}; allowed: {', '.join(names)} (our name: column)."
        )
    if fields and not reader.renames:
        raise DataError(f"the source of {reader.target!r} has a fixed layout; `fields` renames columns of files only.")
    return {name: (fields or {}).get(name, name) for name in names}


def _get(values: Mapping[str, Any], column: str) -> Any:
    if column in values or "." not in column:
        return values.get(column)
    inner: Any = values
    for part in column.split("."):
        inner = inner.get(part) if isinstance(inner, Mapping) else None
    return inner


def _describe(source: DataSource) -> str:
    return str(source) if isinstance(source, str | Path) else "memory"
