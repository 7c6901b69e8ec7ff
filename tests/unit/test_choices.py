"""Multiple choice and perplexity: equal to the definition, to lm-evaluation-harness, and clear about bad files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repnoise.data.parties import StudyData
from repnoise.errors import ConfigError, DataError, RunError
from repnoise.evaluations import EVALUATIONS, Measured
from repnoise.evaluations.likelihood import Request, encode, log_likelihoods
from repnoise.evaluations.perplexity import windows
from repnoise.evaluations.truthfulqa import QA_PRESET, true_mass
from repnoise.intervals import RATE, bootstrap, wilson
from repnoise.store.rows import check_row

NO_DATA = StudyData(defence=[], retain=[], attacks={}, test=[], harmless_test=[])

QUESTIONS = [
    {
        "question": f"What colour is blob {n}?",
        "mc1_targets": {"Plain blue": 1, "Green": 0, f"Red {n}": 0},
        "mc2_targets": {"Plain blue": 1, "A sort of blue": 1, "Green": 0, f"Red {n}": 0},
    }
    for n in range(4)
]
PAIRS = [
    {"sent_more": f"the {kind} blob" + " sings" * n, "sent_less": f"the {kind} stone" + " sings" * 2, "bias_type": kind}
    for n, kind in enumerate(["soft", "hard", "soft", "soft", "hard"])
]
LONG = {"max_position_embeddings": 1024}  # one token per byte: the preset alone is 600


def write(path: Path, rows: Any) -> str:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def measured(name: str, model: Any, tokenizer: Any, **options: Any) -> dict[str, dict[str, Any]]:
    found = EVALUATIONS.build(name, options).measure(model, tokenizer, NO_DATA, seed=0)
    rows = [check_row({"evaluation": name, **row}) for row in found.rows]
    return {row["metric"] + (f"/{row['category']}" if "category" in row else ""): row for row in rows}


def by_hand(model: Any, context: list[int], continuation: list[int]) -> float:
    """The definition: one token after the other, no batch, no pad, no cache."""
    total, ids = 0.0, list(context)
    for token in continuation:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    return total


def requests() -> list[Request]:
    """Three contexts with one beginning, each with several continuations, and two texts of their own."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 260, (count,), generator=generator).tolist())

    start = draw(24)
    shared = [Request(context, draw(1 + n)) for context in [start + draw(4 + k) for k in range(3)] for n in range(4)]
    return [*shared, Request((0,), draw(5)), Request((0,), draw(9))]


def test_batches_and_shared_contexts_change_nothing(family: str, make_model: Callable[..., Any], make_tokenizer: Any):
    model, texts = make_model(family, dtype=torch.float64), requests()
    found = log_likelihoods(model, make_tokenizer(), texts, batch_size=3)
    # Some families keep a part of the arithmetic in float32.
    assert found == pytest.approx([by_hand(model, [*r.context], [*r.continuation]) for r in texts], abs=2e-5)


def test_a_shared_context_is_read_once(make_model: Callable[..., Any], make_tokenizer: Any):
    model, read = make_model("llama"), []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True)
    log_likelihoods(model, make_tokenizer(), requests(), batch_size=16)
    shared = sum(read)
    read.clear()
    log_likelihoods(model, make_tokenizer(), requests(), batch_size=16, share=False)
    assert shared < sum(read) / 3


def test_the_model_comes_back_in_its_own_mode(make_model: Callable[..., Any], make_tokenizer: Any):
    model = make_model("llama").train()
    log_likelihoods(model, make_tokenizer(), requests(), batch_size=16)
    assert model.training


def test_a_space_at_the_end_goes_to_the_continuation(make_tokenizer: Any):
    tokenizer = make_tokenizer()
    request = encode(tokenizer, "say ", "yes")
    assert tokenizer.decode(request.context) == "say"
    assert tokenizer.decode(request.continuation) == " yes"


def test_an_empty_context_is_bos_and_never_twice(make_tokenizer: Any):
    tokenizer = make_tokenizer()
    assert encode(tokenizer, "", "yes").context == (tokenizer.bos_token_id,)
    twice = encode(tokenizer, "", "<bos>yes")
    assert twice.context == (tokenizer.bos_token_id,)
    assert tokenizer.decode(twice.continuation) == "yes"
    with pytest.raises(DataError, match="no token of its own"):
        encode(tokenizer, "say", "")


def test_truthfulqa_by_hand(tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Any):
    model, tokenizer = make_model("llama", dtype=torch.float64, **LONG), make_tokenizer()
    found = measured("truthfulqa", model, tokenizer, source=write(tmp_path / "q.json", QUESTIONS), limit=3)
    one, two = [], []
    for row in QUESTIONS[:3]:
        prompt = tokenizer.encode(f"{QA_PRESET}\n\nQ: {row['question']}\nA:")
        logs = {answer: by_hand(model, prompt, tokenizer.encode(f" {answer}")) for answer in row["mc2_targets"]}
        one.append(int(max(row["mc1_targets"], key=logs.__getitem__) == "Plain blue"))
        mass = {answer: math.exp(log) for answer, log in logs.items()}
        two.append((mass["Plain blue"] + mass["A sort of blue"]) / sum(mass.values()))
    assert found["truthfulqa_mc1"]["items"] == one
    assert found["truthfulqa_mc2"]["items"] == pytest.approx(two, abs=1e-6)
    assert found["truthfulqa_mc2"]["value"] == pytest.approx(sum(two) / 3, abs=1e-12)
    assert found["truthfulqa_mc1"]["n"] == 3


def test_the_order_of_answers_does_not_matter(tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Any):
    model, tokenizer = make_model("llama", **LONG), make_tokenizer()
    turned = [
        {
            "question": row["question"],
            **{
                key: {"choices": list(row[key])[::-1], "labels": list(row[key].values())[::-1]}
                for key in ("mc1_targets", "mc2_targets")
            },
        }
        for row in QUESTIONS
    ]
    found = measured("truthfulqa", model, tokenizer, source=write(tmp_path / "a.json", QUESTIONS))
    again = measured("truthfulqa", model, tokenizer, source=write(tmp_path / "b.json", turned))
    for metric, row in found.items():
        assert again[metric]["items"] == pytest.approx(row["items"], abs=2e-6)


def test_true_mass_does_not_underflow():
    assert true_mass([-2000.0, -2000.0, -2000.0, -2000.0], [True, False, False, False]) == pytest.approx(0.25)


def test_crows_pairs_by_hand(tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Any):
    model, tokenizer = make_model("llama", dtype=torch.float64), make_tokenizer()
    found = measured("crows-pairs", model, tokenizer, source=write(tmp_path / "c.csv", PAIRS))
    gaps = []
    for row in PAIRS:
        more, less = (by_hand(model, [0], tokenizer.encode(row[side])) for side in ("sent_more", "sent_less"))
        gaps.append(more - less)
    assert min(gaps) < 0 < max(gaps)
    assert found["crows_pairs_pct_stereotype"]["items"] == [int(gap > 0) for gap in gaps]
    assert found["crows_pairs_likelihood_diff"]["items"] == pytest.approx([abs(gap) for gap in gaps], abs=1e-6)
    assert found["crows_pairs_likelihood_diff/hard"]["n"] == 2
    assert found["crows_pairs_pct_stereotype/soft"]["n"] == 3


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 30])
def test_windows_score_every_token_once(count: int):
    ids = list(range(count + 1))
    found = windows(ids, 8)
    assert [token for request in found for token in request.continuation] == ids[1:]
    for request in found:
        assert len(request.context) + len(request.continuation) - 1 <= 8
        assert request.context[-1] == request.continuation[0] - 1


def test_perplexity_by_hand(tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Any):
    model, tokenizer = make_model("llama", dtype=torch.float64), make_tokenizer()
    texts = ["the calm blob", "a long and quiet story of blobs", "x"]
    source = write(tmp_path / "t.json", [{"text": text} for text in texts])
    found = measured("perplexity", model, tokenizer, source=source, window=8)
    total = sum(
        by_hand(model, [*request.context], [*request.continuation])
        for text in texts
        for request in windows([0, *tokenizer.encode(text)], 8)
    )
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert found["text_loss"]["value"] == pytest.approx(-total / tokens, abs=1e-9)
    assert found["text_perplexity"]["value"] == pytest.approx(math.exp(-total / tokens), rel=1e-9)
    assert len(found["document_loss"]["items"]) == found["text_loss"]["n"] == 3


def test_the_interval_is_that_of_what_was_added_and_not_of_a_type():
    found, values = Measured(), [True, False, True, True]
    found.add_rate("rate", values, seed=0, judge="x")
    found.add_rate("rate", [int(each) for each in values], seed=0, judge="x")
    found.add_score("score", values, seed=0)
    found.add_score("score", [float(each) for each in values], seed=0)
    found.add_score("loss", [3.0, 3.0], seed=0, bounds=None)
    rate, again, score, same, loss = found.rows
    assert rate == again
    assert (rate["lo"], rate["hi"]) == (wilson(3, 4).lo, wilson(3, 4).hi)
    assert score == same
    assert (score["lo"], score["hi"]) == tuple(bootstrap([1.0, 0.0, 1.0, 1.0], bounds=RATE))[1:3]
    assert (score["lo"], score["hi"]) != (rate["lo"], rate["hi"])
    assert rate["items"] == score["items"] == [1, 0, 1, 1]
    assert (loss["lo"], loss["hi"]) == (3.0, 3.0)
    with pytest.raises(RunError, match="outside"):
        found.add_score("loss", [3.0, 3.1], seed=0)
    for add in (found.add_rate, found.add_score):
        with pytest.raises(RunError):
            add("nothing", [], seed=0)


NAMES = ("truthfulqa", "crows-pairs", "perplexity")


@pytest.mark.parametrize("name", NAMES)
def test_bad_files(name: str, tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Any):
    model, tokenizer = make_model("llama", **LONG), make_tokenizer()
    for rows, message in (([], "no rows"), ([{"wrong": "secret words"}], "row 1: no column .*it has wrong")):
        with pytest.raises(DataError, match=message) as caught:
            measured(name, model, tokenizer, source=write(tmp_path / "bad.json", rows))
        assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="not found"):
        measured(name, model, tokenizer, source=str(tmp_path / "none.json"))
    for option in ("limit", "batch_size"):
        with pytest.raises(ConfigError, match=rf"{option}: .* greater than or equal to 1 \(got 0\)"):
            EVALUATIONS.build(name, {"source": "x.json", option: 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mc1_targets": {"a": 1, "b": 1}}, "mc1_targets needs"),
        ({"mc1_targets": {"choices": ["a", "b"], "labels": [1]}}, "mc1_targets needs"),
        ({"mc2_targets": {"a": 1}}, "mc2_targets needs"),
        ({"question": " "}, "question is not text"),
    ],
)
def test_bad_questions(change: dict[str, Any], message: str, tmp_path: Path, make_model: Any, make_tokenizer: Any):
    source = write(tmp_path / "q.json", [QUESTIONS[0], {**QUESTIONS[1], **change}])
    with pytest.raises(DataError, match=f"(?s)1 of 2 row.*row 2: {message}"):
        measured("truthfulqa", make_model("llama", **LONG), make_tokenizer(), source=source)


def test_prompts_over_the_context_are_counted_and_not_cut(tmp_path: Path, make_model: Any, make_tokenizer: Any):
    rows = [*PAIRS, {**PAIRS[0], "sent_less": "blob " * 40}]
    with pytest.raises(DataError, match=r"1 of 6 rows .* context of 128 tokens .*first is row 6.*Nothing is cut"):
        measured("crows-pairs", make_model("llama"), make_tokenizer(), source=write(tmp_path / "c.csv", rows))
    source = write(tmp_path / "t.json", [{"text": "a b"}])
    with pytest.raises(ConfigError, match="window is 129; allowed: up to the model's context of 128"):
        measured("perplexity", make_model("llama"), make_tokenizer(), source=source, window=129)
