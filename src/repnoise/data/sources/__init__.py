"""Sources of pairs and rows, by name: one file each, in this package or behind the entry point
`repnoise.data.sources`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import DataError
from ...registry import Registry
from ..readers import Record, read_records

Fields = Mapping[str, Any]


class Source:
    """Turns one kind of data set into the fields of pairs and rows.

    A subclass says what a raw record means; reading, checking and counting are done for it. `pair` and `row`
    return None for a record of the other kind, and raise `ValueError` for a bad one. The message must not
    quote the record's text, because it is shown to the user.

    Args:
        target: what follows `name:` in the source string, usually a path or `hub:owner/name`.
        split: which part to read; what parts there are is up to the source.

    Further keyword arguments of a subclass are the source's options.
    """

    renames = False
    """Whether the user may rename the record's columns with `fields`."""

    def __init__(self, target: str, *, split: str | None = None) -> None:
        self.target, self.split = target, split

    def records(self) -> Iterator[Record]:
        """`(where, record)` for each raw record."""
        return read_records(self.target, self.split)

    def pair(self, record: Fields) -> Fields | None:
        """`prompt`, `harmful`, `harmless` and perhaps `category` of the record."""
        raise DataError(f"the data source {type(self).__name__} gives no pairs; read it with load_rows.")

    def row(self, record: Fields) -> Fields | None:
        """`prompt`, `answer` and perhaps `category` of the record."""
        raise DataError(f"the data source {type(self).__name__} gives no rows; read it with load_pairs.")


SOURCES: Registry[Source] = Registry("data source", "repnoise.data.sources", Source)
