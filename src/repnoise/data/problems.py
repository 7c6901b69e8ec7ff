"""Collect every bad row before complaining, and complain without quoting any text.

Rows may hold harmful text, so messages carry row numbers, field names, counts and types only.
"""

from __future__ import annotations

from ..errors import DataError

SHOWN = 5


class Problems:
    """A list of `(where, what)` that becomes one `DataError`.

    Args:
        subject: what is being read or checked ("pairs from train.jsonl"); opens the message.
        advice: what to do next; closes the message.
    """

    def __init__(self, subject: str, advice: str) -> None:
        self.subject, self.advice = subject, advice
        self.found: list[tuple[str, str]] = []

    def add(self, where: str, what: str) -> None:
        self.found.append((where, what))

    def raise_if_any(self, seen: int | None = None) -> None:
        """Raise `DataError` with the first five problems and their number; `seen` counts the rows read."""
        if not self.found:
            return
        bad = len({where for where, _ in self.found})
        of = f" of {seen}" if seen is not None else ""
        lines = [f"  {where}: {what}" for where, what in self.found[:SHOWN]]
        if len(self.found) > SHOWN:
            lines.append(f"  ... and {len(self.found) - SHOWN} more")
        plural = "row is" if bad == 1 else "rows are"
        raise DataError(f"{self.subject}: {bad}{of} {plural} bad.\n" + "\n".join(lines) + f"\n{self.advice}")
