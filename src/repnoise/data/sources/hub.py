"""Data sets of the Hugging Face hub: `hub:owner/name[@revision][#config]`, read through `datasets`."""

from __future__ import annotations

from . import SOURCES, Fields, Source


@SOURCES.register("hub")
class HubSource(Source):
    """Records that already have the fields of a pair or a row, under these names or those that `fields`
    gives.
    """

    renames = True

    def __init__(self, target: str, *, split: str | None = None) -> None:
        super().__init__(f"hub:{target}", split=split)

    def pair(self, record: Fields) -> Fields | None:
        return record

    def row(self, record: Fields) -> Fields | None:
        return record
