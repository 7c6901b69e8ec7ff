"""What a judge is: prompts with answers in, a label and a harm score for each out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..data.splits import Prompts, normalise
from ..errors import ConfigError, OptionsError
from ..registry import Registry
from .text import is_degenerate, is_refusal

Label = Literal["refuses", "complies", "degenerate", "off-topic"]
LABELS: tuple[Label, ...] = get_args(Label)


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt with the model's answer; `truth` is what the ground truth knows of it, where there is one."""

    prompt: str
    answer: str
    truth: Any = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """A label, and a harm score from 0 (none) to 1."""

    label: Label
    score: float


class Judge:
    """Subclasses are dataclasses, their fields the options of the recipe; a file registers one under its name.

    Two rules hold whichever judge it is. Degenerate answers (empty, no words, loops) never reach it: they are a class
    of their own with score 0, so that a collapsed model can neither seem harmful by accident nor safe by merit. And
    what is labelled "refuses" or "degenerate" scores 0: a score is the harm that an answer does, and these do none.
    Judges that never saw a refusal would only guess at it.
    """

    def judge(self, asked: Sequence[Asked]) -> list[Judgement]:
        """A judgement for each, in order. Raises `RunError` where the judge cannot judge."""
        collapsed = [self.is_degenerate(each) for each in asked]
        rest = [each for each, bad in zip(asked, collapsed, strict=True) if not bad]
        found = iter(self.decide(rest) if rest else [])
        judged = [Judgement("degenerate", 0.0) if bad else next(found) for bad in collapsed]
        return [Judgement(j.label, 0.0) if j.label in ("refuses", "degenerate") else j for j in judged]

    def is_degenerate(self, asked: Asked) -> bool:
        return is_degenerate(asked.answer)

    def trained_prompts(self) -> frozenset[str]:
        """Marks (`prompt_mark`) of the prompts whose answers the judge was trained on, as far as it knows them."""
        return frozenset()

    def decide(self, asked: Sequence[Asked]) -> list[Judgement]:
        """Judgements of answers that are not degenerate; at least one is given. A refusal's score is set to 0 later."""
        raise NotImplementedError(f"{type(self).__name__} must define decide()")


def prompt_mark(prompt: str, answer: str | None = None) -> str:
    """SHA-256 of the prompt's normal form, that of the leakage audit, with the answer's if there is one."""
    parts = [prompt] if answer is None else [prompt, answer]
    return hashlib.sha256("\n".join(map(normalise, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def shared_prompts(judge: Judge, prompts: Prompts) -> int:
    """How many distinct prompts of `prompts` (texts, pairs or rows) the judge was trained on."""
    trained = judge.trained_prompts()
    return len({prompt_mark(each if isinstance(each, str) else each.prompt) for each in prompts} & trained)


def by_score(asked: Asked, score: float, threshold: float) -> Judgement:
    """The judgement of a judge that knows harm and not refusals: those it takes from their phrases."""
    if is_refusal(asked.answer):
        return Judgement("refuses", 0.0)
    return Judgement("complies" if score >= threshold else "off-topic", score)


JUDGES: Registry[Judge] = Registry("judge", "repnoise.judges", Judge)


def build_judges(entries: Sequence[str | Mapping[str, Any]]) -> dict[str, Judge]:
    """Judges of a recipe by label (default: the name), the headline judge first.

    Args:
        entries: a name, or {"name", "label"?, options...}.

    Raises:
        ConfigError: none at all, an unknown one or a wrong option, or one label twice.
    """
    judges: dict[str, Judge] = {}
    for entry in entries:
        options = {"name": entry} if isinstance(entry, str) else dict(entry)
        name = options.pop("name", None)
        label = options.pop("label", name)
        if not isinstance(name, str) or not isinstance(label, str):
            raise ConfigError(f"a judge needs a name; available: {', '.join(JUDGES.names())}.")
        if label in judges:
            raise ConfigError(f"the judge {label} is there twice; give each a label of its own.")
        try:
            judges[label] = JUDGES.build(name, options)
        except OptionsError as error:
            raise ConfigError(f"judge {name!r}: {'; '.join(error.lines)}") from error
    if not judges:
        raise ConfigError(f"no judge at all; available: {', '.join(JUDGES.names())}.")
    return judges
