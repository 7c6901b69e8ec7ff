"""QLoRA: the base in 4 bits, LoRA trained on it as on dense weights, the result in the original's own weights."""

from __future__ import annotations

import copy
import json
import warnings
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
from repnoise.sandbox.data import study_data
from repnoise.training import ObjectiveTrainer, train
from repnoise.training.arguments import training_arguments

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
    pairs, callbacks = more.pop("pairs", PAIRS), more.pop("callbacks", None)
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
        train_dataset=pairs,
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
def test_the_terms_move_as_with_lora_on_the_unquantised_model(tmp_path):
    """The sandbox's trained weights: what rounding them changes is small beside what is learned."""
    source, data = sandbox.weights("aligned"), study_data()
    tokenizer = load_tokenizer(source)
    for name in ("packed", "dense"):
        model = with_lora(load_model(source, load_in_4bit=name == "packed"))
        trainer(model, tokenizer, tmp_path / name, options={"beta": 0.1}, pairs=data.defence, max_steps=30).train()
    ours, theirs = (log(tmp_path / name) for name in ("packed", "dense"))
    for term in ("ascent", "noise", "stability"):
        a, b = (torch.tensor([line[term] for line in lines]) for lines in (ours, theirs))
        # measured with three seeds: 0.06-0.10 of the way for the ascent, 0.04-0.06 for noise, 0.01-0.02 for stability
        assert (a - b).abs().mean() < 0.2 * (b.max() - b.min()), term


OPTIONS = {
    "repnoise": {"retain": "kl", "frozen_layers": [[0, 0]], "frozen_parts": ["head"]},
    "rmu": {"layer": 1, "update": 1},
    "tar": {"inner_steps": 2},
}


@needs_bitsandbytes
@pytest.mark.parametrize("name", [name for name in DEFENCES.names() if DEFENCES.build(name, {}).vector is None])
def test_every_defence_trains_the_adapter_and_nothing_else(name, make_folder, tmp_path):
    """Frozen copies and copies that are attacked, too."""
    folder, _, tokenizer = make_folder("llama")
    model = with_lora(load_model(folder, load_in_4bit=True), stir=0.02)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    trainer(model, tokenizer, tmp_path, name, OPTIONS.get(name), max_steps=2).train()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert changed
    assert all("lora_" in key for key in changed)
    left_out = {"repnoise": ("layers.0",), "rmu": ("layers.0", "layers.2")}.get(name, ())
    assert not any(layer in key for key in changed for layer in left_out)


class StopAt(TrainerCallback):
    """As a kill does: no warning, no clean-up."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise ConnectionAbortedError("killed")


@needs_bitsandbytes
def test_resumed_equals_straight_through_bit_for_bit(make_folder, tmp_path):
    folder, _, tokenizer = make_folder("llama")

    def build(name: str, **more: Any) -> Any:
        model = with_lora(load_model(folder, load_in_4bit=True))
        more = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, **more}
        return trainer(model, tokenizer, tmp_path / name, options={"retain": "kl"}, **more)

    straight = build("straight")
    train(straight)
    with pytest.raises(ConnectionAbortedError):
        train(build("broken", callbacks=[StopAt()]))
    assert (tmp_path / "broken" / "checkpoint-4" / "adapter_model.safetensors").exists()
    resumed = build("broken")
    train(resumed)
    expected = dict(straight.model.named_parameters())
    for key, value in resumed.model.named_parameters():
        assert torch.equal(value, expected[key]), key
    assert log(tmp_path / "broken") == log(tmp_path / "straight")


# --- merging ---


def assert_merged(merged: nn.Module, original: nn.Module, adapted: nn.Module) -> None:
    """Each weight is the original's, plus scaling * B A where there is an adapter: bit for bit."""
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and "experts" not in name
    }
    before, transposed = original.state_dict(), isinstance(next(iter(linear(original).values())), Conv1D)
    for name, value in merged.state_dict().items():
        expected = before[name]
        if (layer := layers.get(name.removesuffix(".weight"))) is not None:
            product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * layer.scaling["default"]
            expected = expected + (product.T if transposed else product).to(expected.dtype)
        if "experts" not in name:  # LoRA's product over experts is peft's own
            assert torch.equal(value, expected), name


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_the_original_plus_the_product(family, dtype, make_folder, tmp_path):
    folder, original, _ = make_folder(family, dtype=dtype)
    model = load_model(folder, dtype="float32", load_in_4bit=True)
    wrong = rounded(original, model)
    adapted = with_lora(model, stir=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft's, about GPT-2's layout and about models without a name
        merged, wrong = merge_into(load_model(folder), adapted), merge_into(wrong, adapted)
    assert_merged(merged, original, adapted)
    with pytest.raises(AssertionError):  # what merging into the packed weights would give
        assert_merged(wrong, original, adapted)

    saved = save_model(merged, None, tmp_path / "merged")
    again = load_model(saved)
    assert all(torch.equal(value, merged.state_dict()[name]) for name, value in again.state_dict().items())
    assert again.dtype == dtype
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    assert not packed(again)


@needs_bitsandbytes
def test_merged_experts_do_what_the_adapter_did(make_folder):
    folder, original, _ = make_folder("mixtral")
    adapted = with_lora(load_model(folder, load_in_4bit=True), stir=0.05)
    merged = merge_into(load_model(folder), adapted)
    experts = [name for name in original.state_dict() if "experts" in name]
    assert experts
    assert all(not torch.equal(merged.state_dict()[name], original.state_dict()[name]) for name in experts)
    same = with_lora(copy.deepcopy(original))
    same.load_state_dict({k: v for k, v in adapted.state_dict().items() if "lora_" in k}, strict=False)
    torch.testing.assert_close(merged(IDS).logits, same(IDS).logits, rtol=1e-4, atol=1e-5)


@needs_bitsandbytes
def test_what_cannot_be_merged_is_refused(make_folder, make_model):
    folder, original, _ = make_folder("llama")
    adapted = with_lora(load_model(folder, load_in_4bit=True))
    with pytest.raises(ModelError, match="merge_into"):
        merge(adapted)
    with pytest.raises(ModelError, match="does not fit the original"):
        merge_into(make_model("gpt2"), adapted)
    with pytest.raises(ModelError, match="does not fit the original"):
        merge_into(make_model("llama", intermediate_size=32), adapted)
    with pytest.raises(ModelError, match="no adapter"):
        merge_into(original, load_model(folder))


# --- refusals ---


def test_without_bitsandbytes_the_pip_line_is_named(make_folder, monkeypatch):
    folder, _, _ = make_folder("llama")
    monkeypatch.setattr(quantised, "is_bitsandbytes_available", lambda: False)
    for refused in (lambda: check_4bit(folder), lambda: load_model(folder, load_in_4bit=True)):
        with pytest.raises(MissingExtraError, match=r"pip install 'repnoise\[quantized\]'"):
            refused()


def test_sources_that_are_not_dense_are_refused(make_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantised, "is_bitsandbytes_available", lambda: True)
    folder, model, _ = make_folder("llama")
    check_4bit(folder)
    add_lora(model, 2).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"is an adapter.*\n.*repnoise convert"):
        check_4bit(tmp_path / "adapter")
    config = json.loads((folder / "config.json").read_text())
    quantised_already = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantised_already}))
    with pytest.raises(ModelError, match="quantised already"):
        check_4bit(folder)
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"is a GGUF.*\n.*repnoise convert"):
        check_4bit(tmp_path / "model.gguf")
