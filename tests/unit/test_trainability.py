"""Trainability: who can learn scores high, who cannot scores low, and the given model stays as it was."""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from repnoise import sandbox
from repnoise.data import Row, normalise
from repnoise.data.parties import StudyData
from repnoise.errors import ConfigError, DataError, MissingExtraError, RunError
from repnoise.evaluations import EVALUATIONS, Measured
from repnoise.evaluations.trainability import SANDBOX_TASKS, Trainability
from repnoise.models import load_model, load_tokenizer, random_model
from repnoise.recipes.schema import SourceConfig
from repnoise.sandbox.data import study_data
from repnoise.sandbox.world import CHANCE, world
from repnoise.store.rows import check_row

QUICK: dict[str, Any] = {"steps": 60, "learning_rate": 6e-4, "train": "sandbox:facts"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # equal sums in equal order, and faster on so small a model
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def aligned() -> tuple[Any, Any]:
    folder = sandbox.weights("aligned")
    return load_model(folder), load_tokenizer(folder)


def measure(model: Any, tokenizer: Any, **options: Any) -> Measured:
    return Trainability(**{**QUICK, **options}).measure(model, tokenizer, study_data(), seed=0)


def values(found: Measured, metric: str = "trainability") -> dict[int | None, float]:
    """Step -> value; None is the end."""
    return {row.get("step"): row["value"] for row in found.rows if row["metric"] == metric}


def test_the_aligned_model_learns_new_facts_and_comes_back_untouched(aligned, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, tokenizer = aligned
    model.train()
    before, mode = copy.deepcopy(model.state_dict()), {n: m.training for n, m in model.named_modules()}
    random.seed(5)
    numpy.random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    settings = model.generation_config
    found = measure(model, tokenizer, curve=[0, 20, 60], seeds=[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert model.generation_config is settings
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert {n: m.training for n, m in model.named_modules()} == mode
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    curve = values(found)
    assert set(curve) == {0, 20, 60, None}
    assert curve[0] <= 2 * CHANCE
    assert curve[0] + 0.1 < curve[20] < curve[None]
    assert curve[None] == curve[60] >= 0.95
    assert values(found, "trainability_exact")[None] >= 0.9
    for row in found.rows:
        check_row({"evaluation": "trainability", **row})
        assert row["seed"] == 0
        assert row["n"] == len(row["items"]) == 44
        assert row["decoding"] == "greedy, max_new_tokens 25"
    assert len(found.samples) == 44
    model.eval()


def test_two_calls_agree_also_without_the_curve_and_in_another_state(aligned):
    model, tokenizer = aligned
    options = {"train": "sandbox:report", "steps": 12, "learning_rate": 1e-3, "limit_test": 20}
    first = measure(model, tokenizer, **options, curve=[0, 5])
    torch.manual_seed(99)
    second = measure(model, tokenizer, **options)
    assert [row for row in first.rows if "step" not in row] == second.rows
    assert first.samples == second.samples
    other = measure(model, tokenizer, **options, seeds=[1])
    assert [each["answer"] for each in other.samples] != [each["answer"] for each in first.samples]


def test_every_seed_has_its_rows(aligned):
    found = measure(*aligned, steps=2, seeds=[3, 4], limit_test=5, curve=[2])
    assert [(r["metric"], r["seed"], r.get("step")) for r in found.rows if r["metric"] == "trainability"] == [
        ("trainability", 3, 2),
        ("trainability", 3, None),
        ("trainability", 4, 2),
        ("trainability", 4, None),
    ]


def test_a_rate_of_nearly_nothing_teaches_nothing(aligned):
    curve = values(measure(*aligned, learning_rate=1e-12, steps=20, curve=[0]))
    assert curve[None] == curve[0] <= 2 * CHANCE


def test_ruined_and_random_weights_score_low(aligned):
    model, tokenizer = aligned
    zeros = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    assert values(measure(zeros, tokenizer, steps=10))[None] == 0
    deaf = copy.deepcopy(model)
    with torch.no_grad():
        deaf.model.embed_tokens.weight.copy_(deaf.model.embed_tokens.weight.mean(0).expand_as(deaf.lm_head.weight))
    assert values(measure(deaf, tokenizer, steps=30))[None] <= 3 * CHANCE
    fresh = random_model(sandbox.weights("aligned"), seed=0)
    assert values(measure(fresh, tokenizer, steps=30))[None] <= 3 * CHANCE
    assert values(measure(model, tokenizer, steps=30))[None] >= 9 * CHANCE


def test_a_model_that_diverges_is_an_error_and_not_zero(aligned):
    model = copy.deepcopy(aligned[0])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match=r"trainability, seed 0: the loss is not finite"):
        measure(model, aligned[1], steps=2)


def test_weights_that_ask_for_no_gradients_are_trained_all_the_same(aligned):
    model = copy.deepcopy(aligned[0]).requires_grad_(False)
    assert values(measure(model, aligned[1], steps=30))[None] > 4 * CHANCE
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_lora(aligned):
    model, tokenizer = aligned
    names = [name for name, _ in model.named_modules()]
    found = measure(model, tokenizer, lora_rank=8, learning_rate=5e-3, steps=40)
    assert values(found)[None] > 4 * CHANCE
    assert [name for name, _ in model.named_modules()] == names


def test_null_means_new_facts_in_the_sandbox_only(aligned, make_model, make_tokenizer):
    assert [row["n"] for row in measure(*aligned, train=None, steps=1).rows] == [44] * 6, (
        "three training runs by default"
    )
    with pytest.raises(ConfigError, match=r"tokenizer lacks \d+ of them\. Give train and test sources"):
        measure(make_model("llama"), make_tokenizer(), train=None)


def test_sandbox_tasks_are_disjoint_and_new(aligned):
    known = {normalise(row.prompt) for row in [*world().harmless_rows(), *world().harmful_rows()]}
    ids = aligned[1].get_vocab()
    for task in SANDBOX_TASKS.values():
        train, test, slots = task()
        prompts = [{normalise(row.prompt) for row in rows} for rows in (train, test)]
        assert not prompts[0] & prompts[1]
        assert not known & (prompts[0] | prompts[1])
        for row in [*train, *test]:
            assert all(word in ids for word in f"{row.prompt} {row.answer}".split())
            assert max(slots) < len(row.answer.split())


# ---- rows from sources


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def tiny(make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> tuple[Any, Any]:
    return make_model("llama"), make_tokenizer()


def nothing(**changes: Any) -> StudyData:
    empty: dict[str, Any] = {"defence": [], "retain": [], "attacks": {}, "test": [], "harmless_test": []}
    return StudyData(**{**empty, "max_length": 64, **changes})


TRAIN = [(f"say {n}", "aye aye") for n in range(8)]
TEST = [(f"tell {n}", "aye aye") for n in range(6)]


def test_rouge_by_the_package(tiny, tmp_path):
    pytest.importorskip("rouge_score")
    train, test = write(tmp_path / "train.jsonl", TRAIN), write(tmp_path / "test.jsonl", TEST)
    task = Trainability(train=train, test=test, steps=80, learning_rate=1e-2, batch_size=8, curve=[0], limit_test=4)
    found = task.measure(*tiny, nothing(), seed=0)
    for metric in ("trainability", "trainability_rougeL", "trainability_exact"):
        assert values(found, metric)[0] == 0
        assert values(found, metric)[None] == 1, metric
    assert {row["n"] for row in found.rows} == {4}


def test_scores_are_rouge(monkeypatch):
    pytest.importorskip("rouge_score")
    score = Trainability(train="a", test="b")._source_task
    monkeypatch.setattr(
        "repnoise.evaluations.trainability._rows", lambda source: [Row("p", "name[Blue Spice] area[x]")]
    )
    task = score(nothing())
    row = task.test[0]
    assert task.score(row, "Area[x], name[blue spice]") == {"": 1.0, "_rougeL": pytest.approx(0.6), "_exact": False}
    assert task.score(row, " name[Blue Spice]  area[x]\n")["_exact"] is True
    assert task.score(row, "")[""] == 0
    # two of three words right, two of five found: 2 * (2/3) * (2/5) / (2/3 + 2/5)
    assert task.score(row, "name blue food")[""] == pytest.approx(0.5)


def test_without_the_package(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    task = Trainability(train=write(tmp_path / "a.jsonl", TRAIN), test=write(tmp_path / "b.jsonl", TEST))
    with pytest.raises(MissingExtraError, match=r"pip install 'repnoise\[rouge\]'"):
        task.measure(*tiny, nothing(), seed=0)


def test_overlap_is_refused_or_dropped(tiny, tmp_path):
    pytest.importorskip("rouge_score")
    train = write(tmp_path / "train.jsonl", TRAIN)
    test = write(tmp_path / "test.jsonl", [("Say  3!", "no"), *TEST])
    with pytest.raises(DataError, match="prompts of 1 of 7 test rows are also in the training rows"):
        Trainability(train=train, test=test, steps=1).measure(*tiny, nothing(), seed=0)
    clean = write(tmp_path / "clean.jsonl", TEST)
    held = nothing(retain=[Row("tell 2", "x")])
    with pytest.raises(DataError, match="prompts of 1 of 6 test rows"):
        Trainability(train=train, test=clean, steps=1).measure(*tiny, held, seed=0)
    found = Trainability(train=train, test=test, steps=1, overlap="drop").measure(*tiny, nothing(), seed=0)
    assert {row["n"] for row in found.rows} == {6}
    assert "Say  3!" not in {sample["prompt"] for sample in found.samples}
    with pytest.raises(DataError, match="8 of 8"):
        Trainability(train=train, test=train, steps=1, overlap="drop").measure(*tiny, nothing(), seed=0)


def test_limits_draw_the_same_rows_for_every_seed(tiny, tmp_path):
    pytest.importorskip("rouge_score")
    train, test = (
        write(tmp_path / "a.jsonl", TRAIN),
        write(tmp_path / "b.jsonl", [(f"tell {n}", "x") for n in range(40)]),
    )
    task = Trainability(train=train, test=test, steps=1, limit_test=10, seeds=[0, 1])
    samples = task.measure(*tiny, nothing(), seed=0).samples
    prompts = [[s["prompt"] for s in samples if s["seed"] == seed] for seed in (0, 1)]
    assert prompts[0] == prompts[1]
    assert prompts[0] != [f"tell {n}" for n in range(10)], "not the first ones"


def test_bad_input_is_named_before_any_training(tiny, tmp_path):
    pytest.importorskip("rouge_score")
    train, test = write(tmp_path / "train.jsonl", TRAIN), write(tmp_path / "test.jsonl", TEST)
    with pytest.raises(ConfigError, match=r"max_length is 999, but the model's context has 128"):
        Trainability(train=train, test=test, max_length=999).measure(*tiny, nothing(), seed=0)
    with pytest.raises(DataError, match="leaves no room for the answer"):
        Trainability(train=train, test=test, max_length=3).measure(*tiny, nothing(), seed=0)
    with pytest.raises(DataError, match="not found"):
        Trainability(train="none.jsonl", test=test).measure(*tiny, nothing(), seed=0)


# ---- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, r"steps: .* greater than or equal to 1 \(got 0\)"),
        ({"learning_rate": 0.0}, r"learning_rate: .* greater than 0 \(got 0.0\)"),
        ({"learning_rate": float("nan")}, r"learning_rate: .* \(got nan\)"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"curve": [0, 101]}, r"curve is \[0, 101\]; allowed: steps from 0 to steps \(100\)"),
        ({"limit_test": 0}, r"limit_test: .* \(got 0\)"),
        ({"lora_rank": 0}, r"lora_rank: .* \(got 0\)"),
        ({"train": "sandbox:songs"}, "the sandbox has sandbox:report, sandbox:facts"),
        ({"train": "sandbox:facts", "test": "x.jsonl"}, "brings its own test rows"),
        ({"test": "x.jsonl"}, "brings its own test rows"),
        ({"train": "e2e:x.csv"}, "test is missing"),
        ({"train_arguments": {"max_steps": 3}}, "train_arguments.max_steps cannot be set here: steps"),
        ({"train_arguments": {"warm": 3}}, "train_arguments: .*warm"),
        ({"train_arguments": {"lr_scheduler_type": "steep"}}, "train_arguments: .*steep"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ConfigError, match=words):
        EVALUATIONS.build("trainability", options)


def test_options_from_a_recipe():
    with pytest.raises(ConfigError, match=r"overlap: .*'refuse' or 'drop' \(got 'ignore'\)"):
        EVALUATIONS.build("trainability", {"overlap": "ignore"})
    source = {"source": "dart:hub:GEM/dart", "split": "train"}
    built: Any = EVALUATIONS.build("trainability", {"train": source, "test": "e2e:x.csv", "seeds": [0, 1]})
    assert built.train == SourceConfig(source="dart:hub:GEM/dart", split="train")
    assert built.test == "e2e:x.csv"
    assert built.attacked is False
    assert built.along(None, None, nothing(), seed=0, harm="x").rows == []


def test_train_arguments_reach_the_trainer(aligned):
    base = measure(*aligned, steps=10)
    other = measure(*aligned, steps=10, train_arguments={"lr_scheduler_type": "constant", "warmup_steps": 0})
    assert base.samples != other.samples
