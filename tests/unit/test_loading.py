"""Loading: what is refused and why, tokenizers, the random control, GGUF."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import LAYERS, VOCAB
from repnoise.errors import MissingExtraError, ModelError
from repnoise.models import (
    check_anatomy,
    check_fits,
    load_model,
    load_tokenizer,
    model_fingerprint,
    random_model,
    save_model,
)
from repnoise.models.loading import clear_quantisation

IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# --- what is refused ----------------------------------------------------------------------------------------


def test_paths_that_are_no_model(tmp_path, make_folder):
    for text in ("./nowhere", "/no/such/folder", "a/b/c", "x.gguf", "~/nothing-here", "with space"):
        with pytest.raises(ModelError, match="No such file or folder"):
            load_model(text)
    with pytest.raises(ModelError, match=r"no config\.json.*nothing"):
        load_model(tmp_path)
    folder, _, _ = make_folder("llama")
    with pytest.raises(ModelError, match="folder that holds the file"):
        load_model(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json.*model\.safetensors"):
        load_model(folder)


def test_an_unreachable_hub_says_what_to_do():
    for load in (load_model, load_tokenizer, lambda source: random_model(source, seed=0)):
        with pytest.raises(ModelError, match="HF_HUB_OFFLINE") as caught:
            load("repnoise-tests/does-not-exist")
        assert "repnoise-tests/does-not-exist" in str(caught.value)


def test_pickles_are_not_loaded(make_folder):
    folder, model, _ = make_folder("llama")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*unpickling") as caught:
        load_model(folder)
    assert "save_pretrained" in str(caught.value)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="No weights"):
        load_model(folder)


def test_remote_code_is_never_run(make_folder):
    folder, _, _ = make_folder("llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "c.py").write_text("import pathlib; pathlib.Path('ran').touch(); raise SystemExit('remote code ran')")
    for load in (load_model, lambda source: random_model(source, seed=0)):
        with pytest.raises(ModelError, match="Could not load"):
            load(folder)


def test_a_damaged_tokenizer_is_an_error(make_folder):
    folder, _, _ = make_folder("llama")
    core = json.loads((folder / "tokenizer.json").read_text())
    core["model"]["merges"] = [["not", "there"]]
    (folder / "tokenizer.json").write_text(json.dumps(core))
    with pytest.raises(ModelError, match="Could not load"):
        load_tokenizer(folder)


@pytest.mark.parametrize("damage", ["missing", "shape", "truncated", "config", "not causal"])
def test_damaged_folders_are_errors_not_random_weights(damage, make_folder):
    folder, _, _ = make_folder("llama")
    file, config = folder / "model.safetensors", folder / "config.json"
    if damage == "missing":
        weights = load_file(file)
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
    elif damage == "shape":
        weights = load_file(file)
        weights["model.norm.weight"] = torch.ones(3)
        save_file(weights, file, metadata={"format": "pt"})
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "config":
        config.write_text("{not json")
    else:
        config.write_text(json.dumps({"model_type": "t5"}))
    match = r"lacks 1 of .*layers\.1\.mlp\.up_proj" if damage == "missing" else "Could not load"
    with pytest.raises(ModelError, match=match) as caught:
        load_model(folder)
    assert "Next step" in str(caught.value)


# --- tokenizers ---------------------------------------------------------------------------------------------


def test_a_missing_pad_token_becomes_eos_and_is_said_once(make_model, make_tokenizer, tmp_path, caplog):
    model, tokenizer = make_model("llama"), make_tokenizer(pad=False)
    folder = save_model(model, tokenizer, tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="repnoise"):
        loaded = load_tokenizer(folder)
    assert loaded.pad_token_id == loaded.eos_token_id
    assert len(loaded) == len(tokenizer)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'<eos>'" in caplog.text

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    assert load_tokenizer(folder).pad_token == "<unk>"
    settings |= {"eos_token": None, "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="no pad token"):
        load_tokenizer(folder)


def test_a_pad_token_that_is_there_stays(make_folder, caplog):
    folder, _, tokenizer = make_folder("llama")
    assert load_tokenizer(folder).pad_token == tokenizer.pad_token == "<pad>"
    assert caplog.records == []


def test_a_folder_without_tokenizer_is_an_error(make_model, tmp_path):
    with pytest.raises(ModelError, match="No tokenizer"):
        load_tokenizer(save_model(make_model("llama"), None, tmp_path / "model"))


def test_check_fits(make_model, make_tokenizer):
    tokenizer = make_tokenizer()
    check_fits(make_model("llama"), tokenizer)
    check_fits(make_model("gpt2", vocab_size=len(tokenizer)), tokenizer)
    with pytest.raises(ModelError, match=r"260 tokens.* 259"):
        check_fits(make_model("gpt2", vocab_size=259), tokenizer)
    gap = type("Gap", (), {"get_vocab": lambda self: {"a": 0, "far": 999}, "__len__": lambda self: 2})()
    with pytest.raises(ModelError, match="1000 tokens"):
        check_fits(make_model("llama"), gap)


# --- the random control ----------------------------------------------------------------------------------


def test_the_random_control_has_the_architecture_and_none_of_the_weights(family, make_folder):
    folder, model, _ = make_folder(family)
    state = torch.get_rng_state()
    one, same, other = (random_model(folder, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(one) is type(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in one.named_parameters()} == shapes
    assert torch.equal(logits(one), logits(same))
    assert not torch.allclose(logits(one), logits(other), atol=1e-4)
    table, taught = one.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert abs(torch.corrcoef(torch.stack([table.flatten(), taught.flatten()]))[0, 1]) < 0.1
    assert torch.equal(logits(random_model(model, seed=1)), logits(one))
    assert not one.training
    check_anatomy(one)


def test_the_random_control_is_stored_like_its_source(make_folder):
    folder, model, _ = make_folder("llama", dtype=torch.bfloat16)
    assert random_model(folder, seed=0).dtype == torch.bfloat16
    assert random_model(model, seed=0).dtype == torch.bfloat16
    assert random_model(folder, seed=0, dtype="float32").dtype == torch.float32
    assert random_model(folder, seed=0).generation_config.eos_token_id == model.generation_config.eos_token_id


# --- GGUF ---------------------------------------------------------------------------------------------------


def write_gguf(path, model, tokenizer):
    """The model as llama.cpp stores it: float32, with its order of the rotary dimensions."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'repnoise[gguf]'")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    # transformers adds <|endoftext|> to every byte-level GGUF tokenizer that lacks it, beyond the embeddings
    tokens += ["ab", "<|endoftext|>"] + [f"<unused{index}>" for index in range(2, config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(tokens) - 4))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)

    def rotary(weight, heads):
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{x}_proj": f"attn_{y}" for x, y in zip("qkvo", ("q", "k", "v", "output"), strict=True)},
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        for projection, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if f"{projection}_proj" in name:
                weight = rotary(weight, heads)
        name = name.replace("model.layers.", "blk.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_loads_saves_and_comes_back(make_model, make_tokenizer, tmp_path):
    model, tokenizer = make_model("llama"), make_tokenizer()
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", model, tokenizer)

    loaded = load_model(folder / "tiny.gguf")
    torch.testing.assert_close(logits(loaded), logits(model))
    assert loaded.dtype == torch.float32
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16  # a folder with exactly one
    assert "quantization_config" not in loaded.config.to_dict()
    words = load_tokenizer(folder)
    assert words("hi!").input_ids == tokenizer("hi!").input_ids
    assert words.chat_template == tokenizer.chat_template
    assert words.pad_token_id is not None
    check_fits(loaded, words)

    saved = save_model(loaded, words, tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved)), logits(loaded))
    assert load_tokenizer(saved)("hi!").input_ids == tokenizer("hi!").input_ids
    fresh = random_model(folder / "tiny.gguf", seed=0)
    assert fresh.config.num_hidden_layers == LAYERS
    assert model_fingerprint(folder) != model_fingerprint(saved)

    shutil.copy(folder / "tiny.gguf", folder / "other.gguf")
    with pytest.raises(ModelError, match=r"2 GGUF files: other\.gguf, tiny\.gguf"):
        load_model(folder)
    (folder / "other.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ModelError, match=r"Could not load .*other\.gguf"):
        load_model(folder / "other.gguf")


def test_safetensors_win_over_a_gguf_beside_them(make_folder):
    folder, model, _ = make_folder("llama")
    (folder / "model.gguf").write_bytes(b"not read")
    assert torch.equal(logits(load_model(folder)), logits(model))


def test_a_missing_gguf_package_prints_its_pip_line(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(MissingExtraError, match=r"pip install 'repnoise\[gguf\]'"):
            load(tmp_path / "x.gguf")


def test_quantisation_marks_are_cleared(make_model, tmp_path):
    """Independent of the gguf package: the marks that transformers sets."""
    model = make_model("llama")
    model.hf_quantizer = SimpleNamespace(
        is_serializable=lambda: False, quantization_config=SimpleNamespace(quant_method="gguf")
    )
    model.is_quantized, model.quantization_method = True, "gguf"
    model.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(ValueError, match="quantized"):
        model.save_pretrained(tmp_path / "marked")
    clear_quantisation(model)
    save_model(model, None, tmp_path / "cleared")
    assert "quantization_config" not in (tmp_path / "cleared" / "config.json").read_text()
    assert not getattr(model, "is_quantized", False)
    clear_quantisation(model)  # twice is once


def test_the_tests_are_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
