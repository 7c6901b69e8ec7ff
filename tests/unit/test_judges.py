"""Judges: classifiers, the language model behind an endpoint, the linear judge, agreement. All text is invented."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from repnoise.errors import ConfigError, RunError
from repnoise.judges import JUDGES, Asked, Judge, Judgement
from repnoise.judges.agreement import agreement, cohen_kappa
from repnoise.judges.classifier import Classifier
from repnoise.judges.text import is_degenerate

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SECRET = "sk-invented-0123456789"
COLLAPSED = ["", "   ", "...!?", "blip blip blip blip blip", "a b c " * 20]
ASKED = [Asked("Where is the blue stone?", "Under the third bridge."), Asked("Who sings?", "I'm sorry, I cannot help.")]


# ---- degenerate answers ------------------------------------------------------------------------------------


class Trap(Judge):
    """Fails the test if it is asked anything."""

    def decide(self, asked: Sequence[Asked]) -> list[Judgement]:
        raise AssertionError("a degenerate answer reached the judge")


class AlwaysHarmful(Judge):
    def decide(self, asked: Sequence[Asked]) -> list[Judgement]:
        return [Judgement("complies", 1.0) for _ in asked]


def test_collapsed_answers_never_reach_a_judge() -> None:
    given = Trap().judge([Asked("p", answer) for answer in COLLAPSED])
    assert given == [Judgement("degenerate", 0.0)] * len(COLLAPSED)
    mixed = AlwaysHarmful().judge([Asked("p", "x y z"), Asked("p", ""), Asked("p", "one two")])
    assert [each.label for each in mixed] == ["complies", "degenerate", "complies"]


@pytest.mark.parametrize("text", ["YS" * 25, "word" * 10 + "!", "ok " + "ahab" * 12, "\n" + "la-" * 9])
def test_a_piece_over_and_over_without_a_space_is_degenerate(text: str) -> None:
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text", ["No!!!!!!!!!!!!!", "hmmmmmmmmmm, let me think about that", "x = 1000000000000", "-" * 40 + " end"]
)
def test_what_only_looks_like_it_is_not(text: str) -> None:
    assert not is_degenerate(text)


def test_every_judge_is_registered_and_refuses_wrong_options() -> None:
    assert {"classifier", "toxicity", "llm", "linear"} <= set(JUDGES.names())
    built = JUDGES.build("classifier", {"model": "m", "labels": {"0": "harmful", 1: "harmless"}})
    assert isinstance(built, Classifier)
    assert JUDGES.build("toxicity", {"model": "m", "labels": {"toxic": "harmful"}}).template == "{answer}"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"labels: none is mapped to harmful.*threshold.*batch_size.*template"):
        JUDGES.build(
            "classifier",
            {"model": "m", "labels": {"0": "harmless"}, "threshold": 2, "batch_size": 0, "template": "{question}"},
        )


# ---- classifier --------------------------------------------------------------------------------------------


def judged(labels: str, scores: Sequence[float] | None = None) -> list[Judgement]:
    names: dict[str, Any] = {"r": "refuses", "c": "complies", "d": "degenerate", "o": "off-topic"}
    return [Judgement(names[x], s) for x, s in zip(labels, scores or [0.0] * len(labels), strict=True)]


def test_agreement_by_hand() -> None:
    found = agreement({"a": judged("ccrr", [0.9, 0.8, 0.1, 0.2]), "b": judged("crro", [0.7, 0.6, 0.2, 0.1])})
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"], pair["n"], pair["agree"]) == ("a", "b", 4, 0.5)
    assert pair["lo"] < 0.5 < pair["hi"]
    assert pair["kappa"] == pytest.approx((0.5 - 0.375) / (1 - 0.375))  # expected: 2/4 * 1/4 + 2/4 * 2/4
    assert pair["spearman"] == pytest.approx(0.8)
    assert found["disagree"] == [1]  # the last row: refuses against off-topic, neither harmful
    assert found["judges"]["a"]["mean_score"] == pytest.approx(0.5)
    assert found["judges"]["b"]["complies"] == 0.25
    json.dumps(found)


def test_agreement_exposes_a_judge_that_always_says_safe() -> None:
    honest, other = judged("ccccrrco", [0.9, 0.8, 0.9, 0.7, 0.1, 0.0, 0.6, 0.3]), judged("cccorrcr")
    found = agreement({"honest": honest, "other": other, "safe": judged("r" * 8)})
    assert found["judges"]["safe"]["constant"]
    assert not found["judges"]["honest"]["constant"]
    kappas = {(pair["a"], pair["b"]): pair["kappa"] for pair in found["pairs"]}
    assert kappas["honest", "safe"] == pytest.approx(0, abs=1e-12)
    assert kappas["honest", "other"] > 0.5
    assert found["disagree"] == [0, 1, 2, 3, 6]
    assert all(pair["spearman"] is None for pair in found["pairs"] if "safe" in (pair["a"], pair["b"]))


def test_agreement_is_undefined_rather_than_wrong() -> None:
    assert agreement({"a": judged("rr"), "b": judged("rr")})["pairs"][0]["kappa"] is None
    assert agreement({"a": judged("r")})["pairs"] == []
    assert cohen_kappa("abab", "baba") == -1
    wrongs: list[dict[str, list[Judgement]]] = [{}, {"a": []}, {"a": judged("r"), "b": judged("rr")}]
    for wrong in wrongs:
        with pytest.raises(RunError, match="agreement needs"):
            agreement(wrong)
