"""QLoRA: the base in 4 bits, LoRA trained on it as on dense weights, the result in the original's own weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available

from conftest import VOCAB
from repnoise import sandbox
from repnoise.data import Pair, Row
from repnoise.defences import DEFENCES
from repnoise.errors import MissingExtraError, ModelError
from repnoise.models import (
    add_lora,
    anatomy,
    check_4bit,
    check_anatomy,
    load_model,
    load_tokenizer,
    merge,
    merge_into,
    quantised,
    save_model,
)
from repnoise.plugins import training_arguments
from repnoise.sandbox.data import study_data
from repnoise.training import ObjectiveTrainer, train

needs_bitsandbytes = pytest.mark.skipif(
    not is_bitsandbytes_available(), reason="bitsandbytes is not installed: pip install 'repnoise[quantized]'"
)
IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(2))
PAIRS = [Pair(f"question {i}", f"harmful answer {'x' * (i % 5)} {i}", f"no {'y' * (i % 3)}", "c") for i in range(16)]
ROWS = [Row(f"ask {i}", f"harmless words {'z' * (i % 4)} {i}") for i in range(7)]


def linear(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def packed(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in linear(model).items() if hasattr(module.weight, "quant_state")}


def dense(module: Any) -> torch.Tensor:
    """(out, in): what a 4-bit layer computes with."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def rounded(original: nn.Module, quantised_model: nn.Module) -> Any:
    """A dense model with the weights that the 4-bit model computes with."""
    model = copy.deepcopy(original)
    layers = linear(model)
    with torch.no_grad():
        for name, module in packed(quantised_model).items():
            weight = dense(module)
            layers[name].weight.copy_(weight.T if isinstance(layers[name], Conv1D) else weight)
    return model


def with_lora(model: Any, stir: float = 0.0) -> Any:
    torch.manual_seed(4)
    adapted = add_lora(model, rank=4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(stir * torch.randn_like(parameter))
    return adapted


def trainer(model: Any, tokenizer: Any, folder: Path, name: str = "repnoise", options: Any = None, **more: Any) -> Any:
    callbacks = more.pop("callbacks", None)
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }
    return ObjectiveTrainer(
        model=model,
        objective=DEFENCES.build(name, options or {}),
        args=training_arguments(arguments, folder, "train"),
        train_dataset=PAIRS,
        processing_class=tokenizer,
        retain_dataset=ROWS,
        template="plain",
        max_length=64,
        callbacks=callbacks,
        log_file=folder / "train.jsonl",
    )


def log(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# --- what is packed ---


@needs_bitsandbytes
def test_blocks_are_packed_and_the_lens_reads_real_weights(family, make_folder):
    folder, original, _ = make_folder(family)
    model = load_model(folder, load_in_4bit=True)
    parts, plain = check_anatomy(model), anatomy(original)  # capture and lens give the model's own logits
    for layer in parts.layers:
        assert linear(layer).keys() == packed(layer).keys()
    for ours, theirs in zip([*parts.final, parts.head], [*plain.final, plain.head], strict=True):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    expected = rounded(original, model)
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(original(IDS).logits, expected(IDS).logits, atol=1e-2)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_it_computes_in_the_dtype_that_is_asked_for(dtype, make_folder):
    folder, _, _ = make_folder("llama", dtype=torch.bfloat16)
    model = load_model(folder, dtype=dtype, load_in_4bit=True)
    wanted = torch.float32 if dtype == "float32" else torch.bfloat16  # None: as stored
    assert {module.compute_dtype for module in packed(model).values()} == {wanted}
    assert model.lm_head.weight.dtype == model(IDS).logits.dtype == wanted


# --- training ---


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_as_on_the_dense_weights_it_computes_with(
    family, checkpointing, make_folder, make_tokenizer, tmp_path
):
    folder, original, tokenizer = make_folder(family)
    model = load_model(folder, load_in_4bit=True)
    pair = {"dense": with_lora(rounded(original, model)), "packed": with_lora(model)}
    for name, each in pair.items():
        trainer(each, tokenizer, tmp_path / name, options={"beta": 0.1}, gradient_checkpointing=checkpointing).train()
    ours, theirs = (log(tmp_path / name) for name in pair)
    assert len(ours) == 6
    assert theirs[-1]["loss"] < theirs[0]["loss"]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@needs_bitsandbytes
def test_the_terms_fall_as_with_lora_on_the_unquantised_model(tmp_path):
    """Trained weights, those of the sandbox: what rounding them costs the training is small beside what it learns."""
    source, data = sandbox.weights("aligned"), study_data()
    tokenizer = load_tokenizer(source)
    for name in ("dense", "packed"):
        t = trainer(
            with_lora(load_model(source, load_in_4bit=name == "packed")), tokenizer, tmp_path / name, max_steps=24
        )
        t.train_dataset.pairs = data.defence
        t.train()
    ours, theirs = (log(tmp_path / name) for name in ("packed", "dense"))
    print(ours, theirs)
