"""Launch configs are ones that accelerate reads; what cannot work is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import TrainingArguments

from repnoise import ObjectiveTrainer, RepNoise, training
from repnoise.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "docs" / "accelerate"


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_launch_configs(name: str, kind: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


def test_zero3_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "is_deepspeed_zero3_enabled", lambda: True)
    args: Any = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ConfigError, match="FSDP2"):
        ObjectiveTrainer(model=None, objective=RepNoise(), args=args, train_dataset=[])
