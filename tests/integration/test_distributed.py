"""Two processes on the CPU (gloo, torchrun) train what one process with the same global batch trains.

Sharded runs use FSDP2 as accelerate sets it up (see `shard_on_cpu` in the worker for the one thing that is not
stock) and, where it is installed, DeepSpeed ZeRO-3 with the config in docs/accelerate. float32, five steps; the bounds
are rounding of sums in another order, and a hundred times smaller than what a lost gradient of the head changes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

WORKER = Path(__file__).with_name("distributed_worker.py")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
ROUNDING = 1e-5
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs DeepSpeed: pip install -e '.[deepspeed]'",
)
ZERO3 = pytest.param("zero3", marks=needs_deepspeed)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or sys.platform != "linux",
    reason="needs torch.distributed with gloo",
)


def start(folder: Path, mode: str, **options: Any) -> Path:
    """Train in one process ("single") or two; the run's folder."""
    out = folder / mode
    out.mkdir(exist_ok=True)
    (out / "options.json").write_text(json.dumps({"mode": mode, "out": str(out), **options}))
    launcher = [] if mode == "single" else [*TORCHRUN, "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(WORKER), str(out / "options.json")],
        capture_output=True,
        text=True,
        timeout=300,  # a cold disk takes a minute to import torch three times
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **ON_CPU},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((out / "facts.json").read_text())
    assert facts["world"] == (1 if mode == "single" else 2)
    assert bool(facts["sharded"]) == (mode in ("fsdp2", "zero3"))
    return out


def steps(out: Path) -> list[dict[str, float]]:
    """What must be equal in every step's line: terms, loss, gradient norm, tokens."""
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(found: Path, expected: Path, tolerance: float = ROUNDING) -> None:
    for ours, theirs in zip(steps(found), steps(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    assert worst <= tolerance, worst


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Path:
    for name, tied in (("untied", False), ("tied", True)):
        make_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", ZERO3])
def test_two_processes_train_what_one_trains(mode: str, folder: Path) -> None:
    common = {"model": str(folder / "untied"), "objective": {"alpha": 1.0, "beta": 0.0}}
    expected = start(folder, "single", batch=4, **common)
    found = start(folder, mode, batch=2, **common)
    same(found, expected)
    before = load_file(folder / "untied" / "model.safetensors")
    moved = (weights(found)["lm_head.weight"] - before["lm_head.weight"]).abs().max().item()
    assert moved > 100 * ROUNDING
    # the folder is an ordinary one
    model = AutoModelForCausalLM.from_pretrained(found / "model")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(value, weights(found)[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", ZERO3])
def test_noise_retain_rows_tied_head_and_accumulation(mode: str, folder: Path) -> None:
    """Two processes with two micro-batches draw the noise of one process with four: by micro-batch, not by rank."""
    common = {
        "model": str(folder / "tied"),
        "objective": {"beta": 0.5, "noise": "token", "lens_layers": 2, "retain": "kl", "frozen_parts": ["norm"]},
        "batch": 1,
    }
    expected = start(folder, "single", accumulation=4, **common)
    same(start(folder, mode, accumulation=2, **common), expected)


@needs_deepspeed
def test_lost_lens_gradients_of_norm_and_head_are_seen(folder: Path) -> None:
    common = {"model": str(folder / "untied"), "objective": {"alpha": 1.0, "beta": 0.0}}
    expected = start(folder, "single", batch=4, **common)
    with pytest.raises(AssertionError, match="grad_norm"):
        same(start(folder, "zero3", batch=2, lose_lens=True, **common), expected)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("fsdp2", {"fsdp": {"activation_checkpointing": True}}),
        pytest.param("zero3", {"load_first": True}, marks=needs_deepspeed),
    ],
)
def test_a_sharded_run_goes_on_from_its_checkpoint(mode: str, options: dict[str, Any], folder: Path) -> None:
    """Stopped after three of five steps, with Adam's states; under FSDP2 with activation checkpointing."""
    train = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    common = {"model": str(folder / "untied"), "objective": {"beta": 0.5}}
    expected = start(folder, "single", batch=2, accumulation=2, train=train, **common)
    saving = {**train, "save_strategy": "steps", "save_steps": 3}
    start(folder, mode, batch=2, steps=3, train=saving, **common, **options)
    assert (folder / mode / "checkpoints" / "checkpoint-3" / "trainer_state.json").is_file()
    found = start(folder, mode, batch=2, train=saving, **common, **options)
    assert [line["step"] for line in steps(found)] == [1, 2, 3, 4, 5]
    same(found, expected, tolerance=1e-4)  # Adam divides by the gradient's size, rounding and all
