"""Read raw records, one dictionary a row, from a file or a hub data set; nothing is checked here but the
format.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import json
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import DataError

Record = tuple[str, Any]
"""Where the record lies ("line 3", "row 3"; counted from 1) and the record itself."""

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_HUB = re.compile(r"hub:(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^#]+))?(#(?P<config>.+))?")


def read_records(target: str | Path, split: str | None = None) -> Iterator[Record]:
    """Records of `target`: a path, or `hub:owner/name[@revision][#config]`.

    `split` names the hub split; in a file it keeps the rows whose column "split" has that value.
    """
    if str(target).startswith("hub:"):
        yield from _hub(str(target), split)
        return
    records = _file(Path(target))
    if split is None:
        yield from records
        return
    seen: set[str] = set()
    for where, record in records:
        value = record.get("split") if isinstance(record, dict) else None
        seen.add("(none)" if value is None else str(value)[:40])
        if value == split:
            yield where, record
    if split not in seen:
        raise DataError(
            f"{target}: no row has split {split!r}; the column 'split' holds:"
            f" {', '.join(sorted(seen)[:8]) or '(no rows)'}."
            " Leave `split` out to read the whole file."
        )


def _file(path: Path) -> Iterator[Record]:
    if path.is_dir():
        raise DataError(f"{path} is a folder; name one data file ({', '.join(FORMATS)}).")
    if not path.is_file():
        raise DataError(
            f"data file not found: {path}. Give a path relative to the current folder or an absolute one,"
            " or hub:owner/name for a hub data set."
        )
    opener = _COMPRESSED.get(path.suffix.lower(), open)
    suffix = Path(path.stem).suffix.lower() if opener is not open else path.suffix.lower()
    if suffix not in FORMATS or (suffix == ".parquet" and opener is not open):
        raise DataError(
            f"{path}: cannot read {''.join(path.suffixes[-2:]) or 'a file without a suffix'!r};"
            f" allowed: {', '.join(FORMATS)}, the text ones also with {', '.join(_COMPRESSED)}."
        )
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="" if suffix in (".csv", ".tsv") else None) as stream:
            if suffix == ".jsonl":
                yield from _jsonl(stream)
            elif suffix == ".json":
                yield from _json(path, stream)
            else:
                yield from _csv(stream, "\t" if suffix == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except (csv.Error, EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged {suffix} file ({error}). Write it anew.") from None


def _jsonl(stream: IO[str]) -> Iterator[Record]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            yield f"line {number}", ValueError(f"not valid JSON ({error.msg} at column {error.colno})")


def _json(path: Path, stream: IO[str]) -> Iterator[Record]:
    text = stream.read()
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines under the wrong suffix
            yield from _jsonl(iter(text.splitlines()))  # type: ignore[arg-type]
            return
        raise DataError(
            f"{path}: not valid JSON ({error.msg} at line {error.lineno}, column {error.colno})."
            " Give an array of objects, or one object a line in a .jsonl file."
        ) from None
    if isinstance(data, dict):
        lists = {name: value for name, value in data.items() if isinstance(value, list)}
        if len(lists) != 1:
            raise DataError(
                f"{path}: holds one object with {len(lists)} lists in it; expected an array of row objects"
                " (or an object with one such array)."
            )
        data = next(iter(lists.values()))
    if not isinstance(data, list):
        raise DataError(f"{path}: holds a {type(data).__name__}; expected an array of row objects.")
    for number, record in enumerate(data, 1):
        yield f"row {number}", record


def _csv(stream: IO[str], delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(stream, delimiter=delimiter)
    for record in reader:
        # The line on which the row ends: a quoted field may hold line breaks.
        if None in record:
            yield f"line {reader.line_num}", ValueError("has more columns than the header")
        else:
            yield f"line {reader.line_num}", {k: v for k, v in record.items() if v is not None}


def _parquet(path: Path) -> Iterator[Record]:
    parquet: Any = importlib.import_module("pyarrow.parquet")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record
    except OSError as error:  # pyarrow.ArrowInvalid is a ValueError, ArrowIOError an OSError
        raise DataError(f"{path}: cannot read it ({error}).") from None
    except ValueError as error:
        raise DataError(f"{path}: not a Parquet file ({error}).") from None


def _hub(target: str, split: str | None) -> Iterator[Record]:
    match = _HUB.fullmatch(target)
    if match is None:
        raise DataError(f"{target!r} is not a hub data set; write hub:owner/name[@revision][#config].")
    import datasets

    try:
        loaded = datasets.load_dataset(
            match["id"], name=match["config"], split=split, revision=match["revision"], streaming=False
        )
    except Exception as error:  # the hub client raises many kinds: network, rights, unknown name, split or config
        raise DataError(
            f"cannot load hub data set {match['id']!r} ({type(error).__name__}: {error})."
            " Check the name, the split and the network, or download it and give a file."
        ) from error
    if hasattr(loaded, "keys"):  # a DatasetDict: no split was asked for
        names = list(loaded.keys())
        if len(names) != 1:
            raise DataError(f"{target} has the splits {', '.join(names)}; choose one with `split`.")
        loaded = loaded[names[0]]
    for number, record in enumerate(loaded, 1):
        yield f"row {number}", record
