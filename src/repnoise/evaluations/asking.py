"""Ask a model, let judges label the answers, make rows of it: what the evaluations of harm have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import Template
from ..judges import Asked, Judge, Judgement
from ..judges.agreement import agreement
from .base import Measured
from .generation import Decoding, generate

RATES = (("refuses", "refused"), ("complies", "complied"), ("degenerate", "degenerate"), ("off-topic", "off-topic"))


def ask(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    template: Template,
    decoding: Decoding,
    *,
    seed: int,
    truths: Sequence[Any] | None = None,
) -> list[Asked]:
    """The model's answers to `prompts`, with what the ground truth knows of each."""
    answers = generate(model, tokenizer, prompts, template, decoding, seed=seed)
    known = truths if truths is not None else [None] * len(prompts)
    return [Asked(p, a, t) for p, a, t in zip(prompts, answers, known, strict=True)]


def add_judged(
    found: Measured,
    metric: str,
    asked: Sequence[Asked],
    judges: Mapping[str, Judge],
    *,
    seed: int,
    categories: Sequence[str | None] = (),
    **keys: Any,
) -> None:
    """Rows `metric` (mean harm score) and `metric_refused`, `_complied`, `_degenerate`, `_off-topic` (rates) per
    judge, the headline judge first; agreement rows where there are several; one sample per answer.

    Args:
        categories: one per prompt; with more than one distinct category, rows per category as well.
        keys: further keys for every row.
    """
    verdicts = {label: judge.judge(asked) for label, judge in judges.items()}
    for label, judged in verdicts.items():
        found.add_score(metric, [each.score for each in judged], seed=seed, judge=label, **keys)
        for name, suffix in RATES:
            found.add_rate(
                f"{metric}_{suffix}", [each.label == name for each in judged], seed=seed, judge=label, **keys
            )
        kinds = sorted({each for each in categories if each is not None})
        for kind in kinds if len(kinds) > 1 else ():
            part = [each.score for each, of in zip(judged, categories, strict=True) if of == kind]
            found.add_score(metric, part, seed=seed, judge=label, category=kind, **keys)
    if len(verdicts) > 1:
        _add_agreement(found, metric, verdicts, seed, keys)
    found.samples += [
        {
            "metric": metric,
            "prompt": each.prompt,
            "answer": each.answer,
            "labels": {label: judged[index].label for label, judged in verdicts.items()},
            "scores": {label: judged[index].score for label, judged in verdicts.items()},
            "disagree": len({judged[index].label == "complies" for judged in verdicts.values()}) > 1,
        }
        for index, each in enumerate(asked)
    ]


def _add_agreement(
    found: Measured, metric: str, verdicts: Mapping[str, Sequence[Judgement]], seed: int, keys: Mapping[str, Any]
) -> None:
    for pair in agreement(verdicts)["pairs"]:
        row = {"n": pair["n"], "seed": seed, "split": "test", "category": f"{pair['a']}|{pair['b']}", **keys}
        found.rows.append(
            {"metric": f"{metric}_judge_agreement", "value": pair["agree"], "lo": pair["lo"], "hi": pair["hi"], **row}
        )
        for name in ("kappa", "spearman"):
            if pair[name] is not None:
                found.rows.append(
                    {"metric": f"{metric}_judge_{name}", "value": pair[name], "lo": None, "hi": None, **row}
                )
