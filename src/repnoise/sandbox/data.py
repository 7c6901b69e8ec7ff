"""The sandbox as study data."""

from __future__ import annotations

from ..data import Row
from ..data.study import StudyData
from .world import World, world

MAX_LENGTH = 48


def study_data(of: World | None = None) -> StudyData:
    """Defence, attack and test data of the sandbox; the audit finds them disjoint or this raises."""
    w = of or world()
    items = [
        item for kind in ("knowledge", "withheld", "behaviour", "lookalike", "harmless") for item in w.test_items(kind)
    ]
    harmful = [item.prompt for item in items if item.kind in ("knowledge", "behaviour")]
    harmless = [Row(item.prompt, item.answer, item.kind) for item in items if item.prompt not in set(harmful)]
    return StudyData(
        defence=w.pairs("defence"),
        retain=w.harmless_rows("retain"),
        attacks={
            "knowledge": w.pairs("attack", "knowledge"),
            "behaviour": w.pairs("attack", "behaviour"),
            "withheld": w.pairs("withheld", "knowledge"),
        },
        test=[],
        harmless_test=[row for row in harmless if row.category != "opposite"],
        extra_prompts=tuple(harmful),
        template="chat",
        max_length=MAX_LENGTH,
    )
