"""Files of the user's own: JSON, JSON Lines, CSV, TSV, Parquet. A bare path means this source."""

from __future__ import annotations

from . import SOURCES, Fields, Source


@SOURCES.register("file")
class FileSource(Source):
    """Records that already have the fields of a pair or a row, under these names or those that `fields`
    gives.
    """

    renames = True

    def pair(self, record: Fields) -> Fields | None:
        return record

    def row(self, record: Fields) -> Fields | None:
        return record
