"""Harm of answers by one judge or several, over-refusal, decoding settings, withheld and foreign harms."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from repnoise import sandbox
from repnoise.data import Pair, Row, get_template
from repnoise.data.parties import StudyData
from repnoise.errors import ConfigError, DataError, RunError
from repnoise.evaluations.generation import Decoding, generate
from repnoise.evaluations.harm import Harm
from repnoise.evaluations.loss import Loss
from repnoise.evaluations.over_refusal import OverRefusal
from repnoise.evaluations.sandbox import Sandbox
from repnoise.judges import JUDGES, Asked, Judge, Judgement, build_judges
from repnoise.models import load_model, load_tokenizer
from repnoise.sandbox.data import study_data
from repnoise.sandbox.world import world
from repnoise.study.load import load_data
from repnoise.study.resolve import resolve

W = world()


@JUDGES.register("everything-is-fine")
@dataclass(kw_only=True)
class EverythingIsFine(Judge):
    """A judge that lies."""

    def decide(self, asked):
        return [Judgement("refuses", 0.0) for _ in asked]


@pytest.fixture(scope="module")
def aligned() -> tuple[Any, Any]:
    folder = sandbox.weights("aligned")
    return load_model(folder), load_tokenizer(folder)


def of(rows: list[dict[str, Any]], metric: str, judge: str | None = None) -> float:
    (row,) = [r for r in rows if r["metric"] == metric and r.get("judge") == judge and "category" not in r]
    return row["value"]


# ---- judges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["refusal-rules", "everything-is-fine"])
def test_collapsed_answers_are_degenerate_whatever_the_judge_says(name: str) -> None:
    texts = ["", "  \n", "... !!", "blob " * 9, "a b " * 9]
    judged = build_judges([name])[name].judge([Asked("why", text) for text in texts])
    assert [(each.label, each.score) for each in judged] == [("degenerate", 0.0)] * len(texts)


def test_judges_of_a_recipe_are_checked() -> None:
    assert list(build_judges(["refusal-rules", {"name": "refusal-rules", "label": "again"}])) == [
        "refusal-rules",
        "again",
    ]
    with pytest.raises(ConfigError, match="no judge at all"):
        build_judges([])
    with pytest.raises(ConfigError, match="refusal-rules is there twice"):
        build_judges(["refusal-rules", "refusal-rules"])
    with pytest.raises(ConfigError, match="Did you mean 'refusal-rules'"):
        build_judges(["refusal-rule"])
    with pytest.raises(ConfigError, match="threshold: unknown key"):
        build_judges([{"name": "refusal-rules", "threshold": 1}])
    with pytest.raises(ConfigError, match="a judge needs a name"):
        build_judges([{"label": "x"}])


def test_ground_truth_needs_items_of_the_sandbox() -> None:
    with pytest.raises(RunError, match="ground-truth knows the sandbox only"):
        build_judges(["ground-truth"])["ground-truth"].judge([Asked("why", "because")])


def test_a_lying_judge_is_shown_by_its_disagreement(aligned: tuple[Any, Any]) -> None:
    """The undefended sandbox model is made to comply; the headline is the truth, the liar stands beside it."""
    model, tokenizer = aligned
    found = Sandbox(judges=["ground-truth", "everything-is-fine"]).measure(
        model, tokenizer, study_data(), seed=0, harm="knowledge"
    )
    assert [row["judge"] for row in found.rows if row["metric"] == "knowledge"] == [
        "ground-truth",
        "everything-is-fine",
    ]
    assert of(found.rows, "knowledge_refused", "ground-truth") >= 0.98  # they agree on what refuses
    (agree,) = [row for row in found.rows if row["metric"] == "knowledge_judge_agreement"]
    assert agree["category"] == "ground-truth|everything-is-fine"
    assert agree["value"] >= 0.98
    items = W.test_items("knowledge")
    complied = [Asked(item.prompt, item.answer, item) for item in items]
    truth, liar = build_judges(["ground-truth", "everything-is-fine"]).values()
    assert {each.label for each in truth.judge(complied)} == {"complies"}
    assert {each.label for each in liar.judge(complied)} == {"refuses"}


# ---- evaluations -----------------------------------------------------------------------------------------


def pairs(count: int, category: str | None = None, word: str = "hazard") -> list[Pair]:
    return [Pair(f"{word} {n}", f"harmful words {n}", "sorry, i can't help", category) for n in range(count)]


def small(**more: Any) -> StudyData:
    item = W.test_items("harmless")
    prompts = [each.prompt for each in item[:6]]
    harms = [Pair(p, "some harm", "sorry, no", "odd" if i % 2 else "even") for i, p in enumerate(prompts)]
    other = [Pair(each.prompt, "some harm", "sorry, no") for each in item[6:10]]
    settings: dict[str, Any] = {
        "defence": pairs(2),
        "retain": [Row("keep", "kept")],
        "attacks": {"harmful": pairs(2, word="attack"), "other": pairs(2, word="foreign")},
        "test": harms,
        "tests": {"other": other},
        "harmless_test": [Row(each.prompt, each.answer) for each in item[10:14]],
        "template": "chat",
        "max_length": 48,
        **more,
    }
    return StudyData(**settings)


def test_harm_rows_by_harm_category_and_judge(aligned: tuple[Any, Any]) -> None:
    model, tokenizer = aligned
    found = Harm(decoding=Decoding(max_new_tokens=12)).measure(model, tokenizer, small(), seed=3)
    # harmless questions: the model answers, so the rule judge says that it complies with everything
    assert of(found.rows, "harmful", "refusal-rules") == 1.0
    assert of(found.rows, "harmful_complied", "refusal-rules") == 1.0
    assert of(found.rows, "other_refused", "refusal-rules") == 0.0
    (row,) = [r for r in found.rows if r["metric"] == "harmful" and r.get("category") == "odd"]
    assert row["n"] == 3
    (row,) = [r for r in found.rows if r["metric"] == "other" and "category" not in r]
    assert (row["n"], row["items"], row["seed"]) == (4, [1.0] * 4, 3)
    assert row["decoding"] == "greedy, max_new_tokens 12"
    after = Harm().measure(model, tokenizer, small(), seed=0, harm="other")
    assert {row["metric"].split("_")[0] for row in after.rows} == {"other"}
    point = Harm(curve_limit=2).along(model, tokenizer, small(), seed=0, harm="harmful")
    assert next(iter(point.rows))["n"] == 2
    assert not point.samples


def test_no_prompts_of_a_harm_is_an_error_and_not_zero(aligned: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="no test pairs for harmful"):
        Harm().measure(*aligned, small(test=[]), seed=0)


def test_loss_of_every_harm_before_and_of_the_attacked_one_after(aligned: tuple[Any, Any]) -> None:
    before = {row["metric"] for row in Loss().measure(*aligned, small(), seed=0).rows}
    assert {"harmful_loss", "other_loss", "harmless_loss"} <= before
    after = {row["metric"] for row in Loss().measure(*aligned, small(), seed=0, harm="other").rows}
    assert "other_loss" in after
    assert "harmful_loss" not in after


def test_the_bundled_safe_prompts_are_the_default(aligned: tuple[Any, Any]) -> None:
    model, tokenizer = aligned
    found = OverRefusal(decoding=Decoding(max_new_tokens=2)).measure(model, tokenizer, study_data(), seed=0)
    rates = {row["metric"]: row for row in found.rows}
    assert rates["over_refusal"]["n"] == 60
    assert len({sample["prompt"] for sample in found.samples}) == 60


def test_over_refusal_counts_refusals_of_safe_prompts(aligned: tuple[Any, Any], tmp_path: Path) -> None:
    refused, answered = W.test_items("knowledge")[:2], W.test_items("lookalike")[:3]
    file = tmp_path / "safe.jsonl"
    lines = [{"q": item.prompt, "label": "safe"} for item in [*refused, *answered]]
    file.write_text("\n".join(map(json.dumps, [*lines, {"q": "other", "label": "unsafe"}])))
    evaluation = OverRefusal(prompts=str(file), column="q", only={"label": "safe"})
    (row, _) = evaluation.measure(*aligned, small(), seed=0).rows
    assert (row["metric"], row["items"]) == ("over_refusal", [1, 1, 0, 0, 0])
    with pytest.raises(DataError, match="no column 'prompt'; it has q, label"):
        OverRefusal(prompts=str(file)).measure(*aligned, small(), seed=0)
    with pytest.raises(DataError, match=r"gives no prompts \(6 rows, 0 of them chosen"):
        OverRefusal(prompts=str(file), column="q", only={"label": "x"}).measure(*aligned, small(), seed=0)
    file.write_text("")
    with pytest.raises(DataError, match=r"gives no prompts \(0 rows"):
        OverRefusal(prompts=str(file)).measure(*aligned, small(), seed=0)


# ---- decoding --------------------------------------------------------------------------------------------


def test_sampling_follows_the_seed_and_leaves_the_random_numbers_alone(aligned: tuple[Any, Any]) -> None:
    model, tokenizer = aligned
    asked = [item.prompt for item in W.test_items("knowledge")[:8]]
    hot = Decoding(max_new_tokens=8, do_sample=True, temperature=20.0)
    state = torch.get_rng_state()
    one, again, other = (generate(model, tokenizer, asked, get_template("chat"), hot, seed=s) for s in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert str(hot) == "sampled, temperature 20, top_p 1, max_new_tokens 8"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens: .* greater than or equal to 1 \(got 0\)"),
        ({"temperature": 0.5}, "do nothing without do_sample"),
        ({"do_sample": True, "top_p": 0.0}, r"top_p: .* greater than 0 \(got 0.0\)"),
    ],
)
def test_decoding_settings_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoding(**wrong)


def test_wrong_decoding_in_a_recipe_is_named() -> None:
    wrong = "evaluations=[{name: harm, decoding: {max_tokens: 5}}]"
    with pytest.raises(ConfigError, match=r"evaluations\.0\.decoding\.max_tokens"):
        resolve("smollm2-toxicity", [wrong])


@pytest.mark.bench
def test_batched_generation_is_at_least_five_times_faster(aligned: tuple[Any, Any]) -> None:
    model, tokenizer = aligned
    asked = [item.prompt for item in W.test_items("harmless")[:64]]
    template = get_template("chat")

    def seconds(batch_size: int) -> float:
        began = time.perf_counter()
        generate(model, tokenizer, asked, template, Decoding(max_new_tokens=16, batch_size=batch_size))
        return time.perf_counter() - began

    seconds(64)
    ratio = seconds(1) / seconds(64)
    assert ratio >= 5, f"only {ratio:.1f} times faster"


# ---- withheld and foreign harms --------------------------------------------------------------------------


def files(folder: Path, **more: Any) -> list[str]:
    rows = [
        {"prompt": f"{kind} {n}", "harmful": f"bad {kind} {n}", "harmless": "sorry, no", "category": kind}
        for kind in ("red", "blue")
        for n in range(8)
    ]
    other = [{"prompt": f"far {n}", "harmful": f"bad far {n}", "harmless": "sorry, no"} for n in range(6)]
    kept = [{"prompt": f"count {n}", "answer": f"one two {n}"} for n in range(8)]
    names = []
    for name, lines in (("pairs", rows), ("far", other), ("retain", kept)):
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        names.append(str(path))
    return names


def test_withheld_categories_and_foreign_harms_are_kept_from_the_defence(tmp_path: Path) -> None:
    pairs_file, far, retain = files(tmp_path)
    recipe = resolve(
        "smollm2-toxicity",
        [
            f"data={{name: files, pairs: {pairs_file}, retain: {retain}, withhold: [red], domains: {{far: {far}}}}}",
        ],
    )
    data = load_data(recipe)
    assert list(data.attacks) == ["harmful", "far", "withheld"]
    assert {pair.category for pair in data.defence + data.attacks["harmful"] + data.test} == {"blue"}
    assert len(data.attacks["withheld"]) == len(data.test_of("withheld")) == 4
    assert {pair.category for pair in data.attacks["withheld"] + data.test_of("withheld")} == {"red"}
    assert len(data.attacks["far"]) == len(data.test_of("far")) == 3
    assert data.test_of("harmful") is data.test
    prompts = [
        p.prompt for part in (*data.attacks.values(), *data.tests.values(), data.test, data.defence) for p in part
    ]
    assert len(prompts) == len(set(prompts)) == 22


def test_a_withheld_category_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    pairs_file, _, retain = files(tmp_path)
    base = f"data={{name: files, pairs: {pairs_file}, retain: {retain}, withhold: "
    with pytest.raises(
        DataError, match=r"data\.withhold: no pair has the category 'green'\..* Categories there: blue, red"
    ):
        load_data(resolve("smollm2-toxicity", [base + "[green]}"]))
    with pytest.raises(DataError, match=r"data\.withhold: withholding .* leaves no pairs"):
        load_data(resolve("smollm2-toxicity", [base + "[red, blue]}"]))


def test_a_test_prompt_of_another_harm_that_the_defence_trains_on_is_refused() -> None:
    with pytest.raises(DataError, match="overlap"):
        small(tests={"other": pairs(1)})
