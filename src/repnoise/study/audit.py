"""What the data of a study are told for: rows that were cut, prompts that a judge was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..data import Row, RowDataset, side
from ..data.parties import StudyData
from ..errors import DataError
from ..evaluations import Evaluation
from ..judges import prompt_mark
from .identity import judges_of

Cut = dict[str, dict[str, int]]
"""Set of rows -> {"rows", "answers_cut", "prompts_cut"}."""


# ---- rows that are too long -------------------------------------------------------------------------------


def cut_rows(data: StudyData, tokenizer: Any) -> Cut:
    """How many answers of each set lose their end.

    Raises:
        DataError: a prompt leaves no room for an answer; now, and not hours later at the attack.
    """
    sets: dict[str, list[Row]] = {
        "defence pairs": side(data.defence, "harmful"),
        "refusals of the defence pairs": side(data.defence, "harmless"),
        "retain rows": data.retain,
        **{f"attack pairs ({harm})": side(pairs, "harmful") for harm, pairs in data.attacks.items()},
        "test pairs": side(data.test, "harmful"),
        **{f"test pairs ({harm})": side(pairs, "harmful") for harm, pairs in data.tests.items()},
        "harmless test rows": data.harmless_test,
    }
    found = {}
    for name, rows in sets.items():
        if rows:
            try:
                encoded = RowDataset(rows, tokenizer, "rows", template=data.template, max_length=data.max_length)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
            found[name] = counted(encoded.truncated["rows"], len(rows))
    return found


def counted(answers_cut: int, rows: int) -> dict[str, int]:
    return {"rows": rows, "answers_cut": answers_cut, "prompts_cut": 0}  # a prompt that is too long is an error


def cut_line(cut: Cut, max_length: int) -> str | None:
    """What was cut, in one line; None where nothing was."""
    words = [f"{name} {n['answers_cut']} of {n['rows']}" for name, n in cut.items() if n["answers_cut"]]
    return f"data: answers cut at {max_length} tokens: {', '.join(words)}" if words else None


def cut_much(cut: Cut, max_length: int, bar: float) -> Iterator[str]:
    """A warning for each set of which more than the share `bar` was cut."""
    for name, n in cut.items():
        if n["answers_cut"] > bar * n["rows"]:
            yield (
                f"{name}: {n['answers_cut']} of {n['rows']} answers lose their ends: data.max_length is {max_length}"
                " tokens. Raise it, or leave long rows out."
            )


# ---- judges that know the questions -----------------------------------------------------------------------


def judged(data: StudyData) -> dict[str, list[str]]:
    """Marks of the prompts that the study attacks and tests with: what a judge must not have been trained on."""
    attack = [pair.prompt for pairs in data.attacks.values() for pair in pairs]
    test = [pair.prompt for pairs in (data.test, *data.tests.values()) for pair in pairs]
    return {"attack": [*map(prompt_mark, attack)], "test": [*map(prompt_mark, (*test, *data.extra_prompts))]}


def audit_judges(data: StudyData, evaluations: Mapping[str, Evaluation]) -> None:
    """Hold the prompts that judges were trained on against those of the attack and the test, and record it.

    Raises:
        DataError: they overlap, and the data do not allow it.
    """
    held = judged(data)
    audit, lines = data.record["audit"], []
    for judge, trained in _trained(evaluations).items():
        audit["sets"][judge] = {"rows": len(trained), "distinct": len(trained)}
        for name, marks in held.items():
            common = trained & set(marks)
            if common:
                rows = {judge: len(common), name: sum(each in common for each in marks)}
                audit["overlaps"].append({"sets": [judge, name], "prompts": len(common), "rows": rows})
                audit["disjoint"] = False
                share = f"{rows[name]} of {len(marks)} rows"
                lines.append(f"  {judge} was trained on {len(common)} prompts of {name} ({share})")
    if lines and not data.allow_overlap:
        found = "\n".join(lines)
        raise DataError(
            f"a judge knows what it is to judge:\n{found}\nIts labels there are memory. Train it on other rows, such as"
            " the defence's share, or set data.allow_overlap: true to go on; the manifest will say so."
        )


def _trained(evaluations: Mapping[str, Evaluation]) -> dict[str, frozenset[str]]:
    """ "judge LABEL" -> marks of the prompts that it was trained on, of every judge that knows them."""
    found: dict[str, frozenset[str]] = {}
    for evaluation in evaluations.values():
        for label, judge in judges_of(evaluation).items():
            trained = judge.trained_prompts()
            if trained:
                found[f"judge {label}"] = found.get(f"judge {label}", frozenset()) | trained
    return found
