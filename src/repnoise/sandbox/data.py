"""The sandbox as study data."""

from __future__ import annotations

from ..data.parties import StudyData
from .world import World, world

MAX_LENGTH = 48


def study_data(of: World | None = None) -> StudyData:
    """Defence, attack and test data of the sandbox; the audit finds them disjoint or this raises."""
    w = of or world()
    harmful = [item.prompt for kind in ("knowledge", "withheld", "behaviour") for item in w.test_items(kind)]
    return StudyData(
        defence=w.pairs("defence"),
        retain=w.harmless_rows("retain"),
        attacks={
            "knowledge": w.pairs("attack", "knowledge"),
            "behaviour": w.pairs("attack", "behaviour"),
            "withheld": w.pairs("withheld", "knowledge"),
        },
        roles={"withheld": "withheld"},
        test=[],
        harmless_test=w.harmless_rows("test"),
        extra_prompts=tuple(harmful),
        template="chat",
        max_length=MAX_LENGTH,
    )
