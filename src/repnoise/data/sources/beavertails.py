"""BeaverTails: prompts with one response each, a flag per harm category and an overall `is_safe`.

`beavertails:PATH` reads a file, `beavertails:hub:PKU-Alignment/BeaverTails` with `split: 30k_train` the hub's
copy.
"""

from __future__ import annotations

from ...errors import DataError
from ..refusals import refusal_for
from . import SOURCES, Fields, Source

GROUPS: dict[str, tuple[str, ...]] = {
    "violence": ("violence,aiding_and_abetting,incitement",),
    "toxic": ("discrimination,stereotype,injustice", "hate_speech,offensive_language"),
    "privacy_misinformation": ("misinformation_regarding_ethics,laws_and_safety", "privacy_violation"),
    "crime_unethical": (
        "drug_abuse,weapons,banned_substance",
        "financial_crime,property_crime,theft",
        "non_violent_unethical_behavior",
        "terrorism,organized_crime",
    ),
    "sexually_explicit": ("sexually_explicit,adult_content",),
    "self_harm": ("self_harm",),
    # The released code puts these in none of its groups.
    "other": ("animal_abuse", "child_abuse", "controversial_topics,politics"),
}
"""The category groups that the paper withholds (its Table 5), and the data set's flags in each."""

GROUP_OF = {flag: group for group, flags in GROUPS.items() for flag in flags}


@SOURCES.register("beavertails")
class BeaverTails(Source):
    """Unsafe responses paired with neutral refusals; safe responses as rows.

    The data set has no refusals: the paper generated them with the model it defends. Here they are neutral
    sentences chosen by the prompt's hash. For the model's own, bring pairs of your own.

    Args:
        categories: "flag": a pair's category is its first true flag by name; "group": the paper's group of
            that flag.
    """

    def __init__(self, target: str, *, split: str | None = None, categories: str = "flag") -> None:
        super().__init__(target, split=split)
        if categories not in ("flag", "group"):
            raise DataError(f"beavertails: categories is {categories!r}; allowed: flag, group.")
        self.categories = categories

    def pair(self, record: Fields) -> Fields | None:
        if _safe(record):
            return None
        prompt = record.get("prompt")
        return {
            "prompt": prompt,
            "harmful": record.get("response"),
            "harmless": refusal_for(prompt) if isinstance(prompt, str) else None,
            "category": self._category(record),
        }

    def row(self, record: Fields) -> Fields | None:
        if not _safe(record):
            return None
        return {"prompt": record.get("prompt"), "answer": record.get("response")}

    def _category(self, record: Fields) -> str | None:
        flags = record.get("category")
        if not isinstance(flags, dict):
            raise ValueError("'category' is missing or not a table of flags")
        first = min((name for name, value in flags.items() if value is True), default=None)
        if first is None or self.categories == "flag":
            return first
        return GROUP_OF.get(first, "other")


def _safe(record: Fields) -> bool:
    safe = record.get("is_safe")
    if not isinstance(safe, bool):
        raise ValueError("'is_safe' is missing or not true or false")
    return safe
