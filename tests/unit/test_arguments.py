"""Training arguments that the one loop cannot honour are refused before any work, each with its reason."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainingArguments

from repnoise.training.arguments import NOT_HONOURED, train_errors, train_fields

OTHER: dict[str, Any] = {  # a value that is not the default, of the right type
    "label_smoothing_factor": 0.1,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "resume_from_checkpoint": "folder",
    "metric_for_best_model": "loss",
    "eval_strategy": "steps",
    "eval_steps": 10,
    "eval_delay": 2,
    "per_device_eval_batch_size": 3,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "hub_model_id": "me/mine",
    "hub_strategy": "end",
    "hub_token": "x",
    "hub_revision": "main",
    "liger_kernel_config": {"rope": True},
}


@pytest.mark.parametrize("key", sorted(NOT_HONOURED))
def test_what_would_do_nothing_is_refused_with_its_reason(key: str) -> None:
    errors = list(train_errors({key: OTHER.get(key, True)}, "defence.train"))
    assert errors[0] == f"defence.train.{key}: cannot be set here: {NOT_HONOURED[key]}. Drop it."


@pytest.mark.parametrize("key", sorted(NOT_HONOURED))
def test_the_default_of_transformers_may_be_written_out(key: str) -> None:
    value = getattr(TrainingArguments("unused", use_cpu=True), key)
    value = value.value if hasattr(value, "value") else value
    if value is not None:
        assert list(train_errors({key: value}, "defence.train")) == []


def test_every_name_is_one_of_transformers() -> None:
    assert set(NOT_HONOURED) <= set(train_fields())


def test_what_the_loop_honours_is_taken() -> None:
    given = {"learning_rate": 1e-4, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
    assert list(train_errors(given, "defence.train")) == []
