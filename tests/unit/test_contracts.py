"""What every defence, attack and evaluation must do; a new plug-in file is tested without a new test."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from repnoise.attacks import ATTACKS
from repnoise.data import Pair, Row
from repnoise.data.collate import STREAMS
from repnoise.data.parties import StudyData
from repnoise.defences import DEFENCES
from repnoise.evaluations import EVALUATIONS
from repnoise.registry import Registry
from repnoise.sandbox.data import study_data
from repnoise.store.files import read_jsonl, write_jsonl
from repnoise.store.run import Run
from repnoise.training import Objective, ObjectiveTrainer, train
from repnoise.training.arguments import training_arguments

REFERENCE = re.compile(r"arXiv|doi|paper|https?://")
OBJECTIVES = [(DEFENCES, name) for name in DEFENCES.names()] + [(ATTACKS, name) for name in ATTACKS.names()]
PAIRS = [Pair(f"say word {n}", f"grumpy blob {n}", "sorry, i can't help with that") for n in range(6)]
ROWS = [Row(f"count to {n}", f"one two {n}") for n in range(4)]

# Options of the evaluations that cannot do without; "rows", "more", ... are names of the files below.
OPTIONS: dict[str, dict[str, Any]] = {
    "crows-pairs": {"source": "crows"},
    "harness": {"tasks": ["truthfulqa_mc1"], "files": {"truthfulqa_mc1": "truthful"}},
    "over-refusal": {"prompts": "rows"},
    "perplexity": {"source": "texts"},
    "trainability": {"train": "rows", "test": "more", "steps": 2, "batch_size": 2},
    "truthfulqa": {"source": "truthful"},
}
TARGETS = {"choices": ["one", "two"], "labels": [1, 0]}
FILES = {
    "rows": [{"prompt": row.prompt, "answer": row.answer} for row in ROWS],
    "more": [{"prompt": "count to nine", "answer": "one two nine"}],
    "texts": [{"text": "one two three"}, {"text": "three two one"}],
    "truthful": [{"question": "how many", "mc1_targets": TARGETS, "mc2_targets": TARGETS}],
    "crows": [{"sent_more": "one two", "sent_less": "two one", "bias_type": "order", "stereo_antistereo": "stereo"}],
}


def options_of(name: str, folder: Path) -> dict[str, Any]:
    for file, rows in FILES.items():
        write_jsonl(folder / f"{file}.jsonl", rows)

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        return str(folder / f"{value}.jsonl") if isinstance(value, str) and value in FILES else value

    return filled(OPTIONS.get(name, {}))


objectives = pytest.mark.parametrize(("registry", "name"), OBJECTIVES, ids=[n for _, n in OBJECTIVES])


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@objectives
def test_it_documents_itself(registry: Registry[Any], name: str) -> None:
    cls = registry.get(name)
    assert dataclasses.is_dataclass(cls)
    texts = [cls.__doc__ or "", inspect.getmodule(cls).__doc__ or ""]  # type: ignore[union-attr]
    assert any(REFERENCE.search(text) for text in texts), "no reference to a paper"
    assert not texts[0].startswith(f"{cls.__name__}("), "the docstring is the one that dataclass writes"
    for field in dataclasses.fields(cls):
        if field.init:
            assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING, (
                f"{field.name} has no default"
            )


@objectives
def test_it_trains(
    registry: Registry[Any],
    name: str,
    make_model: Callable[..., PreTrainedModel],
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Two steps of two micro-batches: finite terms, weights moved, nothing left on model or disk."""
    objective: Objective = registry.build(name, {})
    assert objective.needs
    assert set(objective.needs) <= set(objective.streams) <= set(STREAMS)
    model = make_model("llama")
    before, counted = copy.deepcopy(model.state_dict()), hooks(model)
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    trainer = ObjectiveTrainer(
        model=model,
        objective=objective,
        args=training_arguments(values, tmp_path / "checkpoints", name),
        train_dataset=PAIRS,
        retain_dataset=ROWS if "retain" in objective.streams else None,
        processing_class=make_tokenizer(),
        max_length=64,
        log_file=tmp_path / "train.jsonl",
    )
    train(trainer, resumable=False)
    lines = read_jsonl(tmp_path / "train.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values()), line
    terms = set(lines[0]) - {"step", "loss", "grad_norm", "learning_rate", "epoch", "tokens", "seconds"}
    assert terms, "no term is logged"
    assert sum(lines[0][term] for term in terms) == pytest.approx(lines[0]["loss"], rel=1e-3, abs=1e-3)
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert hooks(model) == counted
    assert not list(tmp_path.rglob("*.safetensors"))


@objectives
def test_options_are_checked(registry: Registry[Any], name: str) -> None:
    from repnoise.errors import ConfigError

    with pytest.raises(ConfigError, match="no_such_option: unknown key"):
        registry.build(name, {"no_such_option": 1})
    cls, built = registry.get(name), registry.build(name, {})
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if isinstance(getattr(built, field.name), float):
            with pytest.raises(ConfigError, match=rf"{field.name}: .* \(got 'much'\)"):
                cls(**{field.name: "much"})
            with pytest.raises(ConfigError, match=rf"{field.name}: .* \(got nan\)"):
                registry.build(name, {field.name: math.nan})


@pytest.mark.parametrize("name", EVALUATIONS.names())
def test_it_measures(
    name: str, make_model: Callable[..., PreTrainedModel], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    """Rows that the run folder takes, before and along an attack; the model is left as it was."""
    if name == "sandbox":
        from repnoise.models import load_model, load_tokenizer
        from repnoise.sandbox import weights

        pytest.importorskip("repnoise.sandbox.world")
        model, tokenizer, data = (
            load_model(weights("aligned")),
            load_tokenizer(weights("aligned")),
            study_data(),
        )
    else:
        model, tokenizer = make_model("llama", max_position_embeddings=1024), make_tokenizer()
        data = StudyData(
            defence=PAIRS[:2],
            retain=ROWS[:2],
            attacks={"harmful": PAIRS[2:4]},
            test=PAIRS[4:],
            harmless_test=ROWS[2:],
            max_length=64,
        )
    if name == "harness":
        pytest.importorskip("lm_eval")
    if name == "trainability":
        pytest.importorskip("rouge_score")
    evaluation = EVALUATIONS.build(name, options_of(name, tmp_path))
    assert (evaluation.__doc__ or "").strip()
    state, counted, training = copy.deepcopy(model.state_dict()), hooks(model), model.training
    harm = next(iter(data.attacks))
    run = Run(tmp_path / "run").start(stage="base", name="base", hash="0")
    with run:
        found = evaluation.measure(model, tokenizer, data, seed=0)
        run.write_rows(name, found.rows)
        point = evaluation.along(model, tokenizer, data, seed=0, harm=harm)
        if point.rows:
            run.write_rows(name, [{**row, "step": 1} for row in point.rows])
        run.finish()
    metrics = {row["metric"] for row in found.rows}
    assert {row["metric"] for row in point.rows} <= metrics
    if evaluation.attacked:
        assert harm in metrics or f"{harm}_loss" in metrics, "the report finds no metric of this harm"
    assert hooks(model) == counted
    assert model.training is training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    again = evaluation.along(model, tokenizer, data, seed=0, harm=harm)
    assert again.rows == point.rows
