"""Launch configs are ones that accelerate reads; what cannot work is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import TrainingArguments

from repnoise import ObjectiveTrainer, RepNoise
from repnoise.defences import DEFENCES
from repnoise.errors import ConfigError
from repnoise.training import trainer as training

CONFIGS = Path(__file__).parents[2] / "docs" / "accelerate"


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_launch_configs(name: str, kind: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


def test_zero3_config() -> None:
    config = load_config_from_file(str(CONFIGS / "zero3.yaml")).deepspeed_config
    found = CONFIGS.parents[1] / config["deepspeed_config_file"]
    assert json.loads(found.read_text())["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("name", ["booster", "tar", "vaccine"])
def test_zero3_is_refused_where_weights_are_handled(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_model: Any, make_tokenizer: Any
) -> None:
    monkeypatch.setattr(training, "is_zero3", lambda accelerator: True)
    args: Any = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    common = {"model": make_model("llama"), "args": args, "processing_class": make_tokenizer()}
    with pytest.raises(ConfigError, match="ZeRO-3"):
        ObjectiveTrainer(objective=DEFENCES.build(name, {}), **common)
    ObjectiveTrainer(objective=RepNoise(), **common)


def test_the_official_variant_is_refused_under_fsdp(monkeypatch: pytest.MonkeyPatch, make_model: Any) -> None:
    monkeypatch.setattr("repnoise.defences.repnoise.is_sharded", lambda model: True)
    ids = torch.arange(3, 9)[None]
    side = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with pytest.raises(ConfigError, match='variant="official" loses gradients'):
        RepNoise(variant="official").terms(make_model("llama"), {"harmful": side, "harmless": side})
