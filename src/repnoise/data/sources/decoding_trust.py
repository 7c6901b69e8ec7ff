"""DecodingTrust's toxicity split (RealToxicityPrompts), in the form in which the RepNoise authors released
it.

Each record has a `prompt` and a `continuation`, both with `text` and Perspective scores, and a `type`:
`toxic` (to defend and attack with), `toxic_test` (to test on) or `non_toxic` (harmless).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError
from ..readers import Record, read_records
from ..refusals import refusal_for
from . import SOURCES, Fields, Source

TYPES = ("toxic", "non_toxic", "toxic_test")
ATTRIBUTES = ("flirtation", "identity_attack", "insult", "profanity", "sexually_explicit", "threat")
_PAIR_TYPE = {None: "toxic", "train": "toxic", "test": "toxic_test"}


@SOURCES.register("decoding_trust")
class DecodingTrust(Source):
    """Toxic continuations paired with refusals; non-toxic continuations as rows.

    A prompt's refusal comes from the released file of refusals where that has one (107 of the 351 toxic
    prompts), else from a short list of neutral sentences, by the prompt's hash. Not every released "refusal"
    refuses: the file holds what the model generated. A pair's category is the Perspective attribute with the
    highest score.

    Args:
        target: `training_dataset.jsonl`.
        split: "train" (the default) or "test"; the non-toxic rows belong to "train".
        refusals: file of released refusals; "auto" takes `with_refusals.json` beside `target` if it is there,
            "none" uses the neutral sentences only.
    """

    def __init__(self, target: str, *, split: str | None = None, refusals: str = "auto") -> None:
        super().__init__(target, split=split)
        if split not in _PAIR_TYPE:
            raise DataError(f"decoding_trust has no split {split!r}; allowed: train, test.")
        self.stored: dict[str, str] = {}
        if refusals == "auto":
            beside = Path(target).parent / "with_refusals.json"
            self.stored = _released(beside) if beside.is_file() else {}
        elif refusals != "none":
            self.stored = _released(Path(refusals))

    def records(self) -> Iterator[Record]:
        return read_records(self.target)  # the split is a matter of `type`

    def pair(self, record: Fields) -> Fields | None:
        if _type(record) != _PAIR_TYPE[self.split]:
            return None
        prompt, continuation = _text(record, "prompt"), _text(record, "continuation")
        harmless = self.stored.get(prompt) or " " + refusal_for(prompt)
        return {
            "prompt": prompt,
            "harmful": continuation,
            "harmless": harmless,
            "category": _attribute(record),
        }

    def row(self, record: Fields) -> Fields | None:
        if _type(record) != "non_toxic" or self.split == "test":
            return None
        return {"prompt": _text(record, "prompt"), "answer": _text(record, "continuation")}


def _type(record: Fields) -> str:
    kind = record.get("type")
    if kind not in TYPES:
        raise ValueError(f"'type' is missing or none of {', '.join(TYPES)}")
    return str(kind)


def _text(record: Fields, side: str) -> str:
    part = record.get(side)
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise ValueError(f"'{side}.text' is missing or not a string")
    return str(part["text"])


def _attribute(record: Fields) -> str | None:
    part = record["continuation"]
    scores = {name: part[name] for name in ATTRIBUTES if isinstance(part.get(name), int | float)}
    return max(scores, key=scores.__getitem__) if scores else None


def _released(path: Path) -> dict[str, str]:
    """Prompt -> refusal; the file stores each as "Prompt: ...\\nContinuation: <refusal>"."""
    found = {}
    for where, record in read_records(path):
        if not isinstance(record, dict) or not isinstance(record.get("refusal"), str):
            raise DataError(f"{path}, {where}: 'refusal' is missing or not a string. Set refusals: none to do without.")
        try:
            prompt = _text(record, "prompt")
        except ValueError as error:
            raise DataError(f"{path}, {where}: {error}. Set refusals: none to do without.") from None
        refusal = record["refusal"].removeprefix(f"Prompt: {prompt}\nContinuation:").rstrip()
        if refusal.strip():
            found[prompt] = refusal
    return found
