"""LoRA attaches to every family, merges exactly, and leaves a plain model."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from conftest import VOCAB
from repnoise.errors import ModelError, RunError
from repnoise.models import add_lora, load_adapter, load_model, load_tokenizer, merge, save_model
from repnoise.models.adapters import is_adapted

IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(2))


def stir(model, amount=0.1):
    """Make the adapter do something (B starts as 0)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * amount)


def test_merged_logits_are_the_unmerged_ones(family, make_model):
    model = make_model(family, dtype=torch.float64)
    with torch.no_grad():
        plain = model(IDS).logits
        adapted = add_lora(model, rank=2)
        torch.testing.assert_close(adapted(IDS).logits, plain)  # a fresh adapter does nothing
        stir(adapted)
        expected = adapted(IDS).logits
        assert not torch.allclose(expected, plain, atol=1e-2)
        merged = merge(adapted)
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-9, atol=1e-9)
    assert not is_adapted(merged)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_only_the_adapter_trains_and_the_head_is_left_out(family, make_model):
    model = add_lora(make_model(family), rank=2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in trained)
    assert {found[1] for name in trained if (found := re.search(r"\.(\d)\.", name))} == {"0", "1", "2"}


def test_experts_are_adapted_too(make_model):
    model = add_lora(make_model("mixtral"), rank=2)
    assert any("experts" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    with pytest.raises(ModelError, match=r"dropout 0\.1"):
        add_lora(make_model("mixtral"), rank=2, dropout=0.1)
    adapted = add_lora(make_model("mixtral"), rank=2, dropout=0.1, target_modules=["q_proj"])
    assert not any("experts" in n for n, p in adapted.named_parameters() if p.requires_grad)


def test_rank_alpha_dropout_and_targets_reach_the_layers(make_model):
    config = add_lora(make_model("llama"), 4, dropout=0.25, target_modules=["q_proj", "v_proj"]).peft_config
    assert config["default"].r == 4
    assert config["default"].lora_alpha == 8
    assert config["default"].lora_dropout == 0.25
    model = add_lora(make_model("llama"), 4, alpha=4, target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0].self_attn
    assert layer.q_proj.scaling["default"] == 1.0
    assert not hasattr(layer.v_proj, "lora_A")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attaching_and_merging_warn_about_nothing(name, make_model, recwarn):
    merge(add_lora(make_model(name), rank=2))
    assert [str(warning.message) for warning in recwarn] == []


def test_attaching_twice_and_merging_nothing_are_errors(make_model):
    model = add_lora(make_model("llama"), rank=2)
    with pytest.raises(ModelError, match="already"):
        add_lora(model, rank=2)
    with pytest.raises(ModelError, match="already"):
        add_lora(model.get_base_model(), rank=2)
    with pytest.raises(ModelError, match="no adapter"):
        merge(make_model("llama"))


def test_bad_arguments_are_user_errors(make_model):
    with pytest.raises(ModelError, match="got 0"):
        add_lora(make_model("llama"), rank=0)
    with pytest.raises(ModelError, match=r"got 1\.5"):
        add_lora(make_model("llama"), rank=2, dropout=1.5)
    with pytest.raises(ModelError) as caught:
        add_lora(make_model("llama"), rank=2, target_modules=["c_attn"])
    assert "c_attn" in str(caught.value)
    assert "q_proj" in str(caught.value)


def test_a_diverged_adapter_is_not_merged(make_model):
    model = add_lora(make_model("llama"), rank=2)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(RunError, match="learning rate"):
        merge(model)


def test_an_adapter_folder_is_its_base_plus_the_adapter(make_folder, tmp_path):
    base, model, _ = make_folder("llama_tied")
    adapted = add_lora(load_model(base), rank=2)
    stir(adapted)
    with torch.no_grad():
        expected, plain = adapted(IDS).logits, model(IDS).logits
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)

    with torch.no_grad():
        loaded = load_model(folder)
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, plain, atol=1e-2)
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()  # the base's
    saved = save_model(loaded, None, tmp_path / "merged")  # an ordinary model
    with torch.no_grad():
        torch.testing.assert_close(load_model(saved)(IDS).logits, loaded(IDS).logits, rtol=0, atol=0)

    with pytest.raises(ModelError, match="merge"):
        save_model(adapted, None, tmp_path / "never")
    shutil.move(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="unpickling"):
        load_model(folder)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="No such file or folder"):
        load_model(folder)


def test_an_adapter_for_another_base_is_an_error(make_folder, make_model, tmp_path):
    adapted = add_lora(make_model("llama"), rank=2)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(make_model("gpt2"), tmp_path / "adapter")
    with pytest.raises(ModelError, match="base_model_name_or_path"):  # made from a model without a name
        load_model(tmp_path / "adapter")
