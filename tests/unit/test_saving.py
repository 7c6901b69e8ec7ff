"""Saving: every family comes back bit for bit, and nothing half-written ever carries the final name."""

from __future__ import annotations

import errno
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import VOCAB
from repnoise.errors import ModelError, RunError
from repnoise.models import load_model, model_fingerprint, save_model

IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_saved_model_comes_back_equal(family, make_model, make_tokenizer, tmp_path):
    model, tokenizer = make_model(family), make_tokenizer()
    folder = save_model(model, tokenizer, tmp_path / "new" / "model")
    assert folder == tmp_path / "new" / "model"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]  # no draft left
    plain = AutoModelForCausalLM.from_pretrained(folder)  # the ecosystem's loader
    assert torch.equal(logits(plain), logits(model))
    ours = load_model(folder)
    assert torch.equal(logits(ours), logits(model))
    assert not ours.training
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
    again = AutoTokenizer.from_pretrained(folder)
    assert again("Grüße!").input_ids == tokenizer("Grüße!").input_ids
    assert again.chat_template == tokenizer.chat_template


def test_tied_weights_are_stored_once(make_model, tmp_path):
    folder = save_model(make_model("llama_tied"), None, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_dtype(make_folder):
    folder, _, _ = make_folder("llama", dtype=torch.bfloat16)
    assert load_model(folder).dtype == torch.bfloat16
    assert load_model(folder, dtype="auto").dtype == torch.bfloat16
    assert load_model(folder, dtype="float32").dtype == torch.float32
    assert load_model(folder, dtype=torch.float64, device="cpu").dtype == torch.float64
    with pytest.raises(ModelError, match=r"'int8'.*bfloat16"):
        load_model(folder, dtype="int8")


def test_an_existing_folder_is_replaced_only_on_request(make_model, tmp_path):
    first, second = make_model("llama"), make_model("llama", seed=1)
    folder = save_model(first, None, tmp_path / "model")
    (folder / "stale.txt").write_text("old")
    with pytest.raises(ModelError, match="overwrite=True"):
        save_model(second, None, folder)
    assert torch.equal(logits(load_model(folder)), logits(first))
    save_model(second, None, folder, overwrite=True)
    assert torch.equal(logits(load_model(folder)), logits(second))
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    (tmp_path / "empty").mkdir()
    assert load_model(save_model(first, None, tmp_path / "empty"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="exists"):
        save_model(first, None, tmp_path / "file", overwrite=True)


class SafetensorError(Exception):
    """safetensors raises its own type, with the errno in the text."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(error, existing, make_model, tmp_path, monkeypatch):
    model = make_model("llama")
    folder = tmp_path / "model"
    if existing:
        save_model(make_model("llama", seed=1), None, folder)
        before = logits(load_model(folder))

    def full(path, **_):
        (path / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(RunError, match="disk is full") as caught:
        save_model(model, None, folder, overwrite=True)
    assert "Free some space" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if existing else [])
    if existing:
        assert torch.equal(logits(load_model(folder)), before)


def test_an_interrupted_save_leaves_nothing(make_model, make_tokenizer, tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_model(make_model("llama"), tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_rename_puts_the_old_folder_back(make_model, tmp_path, monkeypatch):
    old = make_model("llama")
    folder = save_model(old, None, tmp_path / "model")
    rename = type(folder).rename

    def fail(path, target):
        if ".writing-" in path.name:
            raise OSError(errno.EIO, "broken disk")
        return rename(path, target)

    monkeypatch.setattr(type(folder), "rename", fail)
    with pytest.raises(OSError, match="broken disk"):
        save_model(make_model("llama", seed=1), None, folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(logits(load_model(folder)), logits(old))


def test_a_contradictory_generation_config_does_not_lose_the_model(make_model, tmp_path, caplog):
    model = make_model("llama")
    model.generation_config.temperature = 0.5
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "plain")
    folder = save_model(model, None, tmp_path / "ours")
    assert "do_sample" in caplog.text
    assert load_model(folder).generation_config.temperature == 0.5


def test_fingerprints_follow_weights_and_config(make_model, make_tokenizer, tmp_path):
    model = make_model("llama")
    one = save_model(model, make_tokenizer(), tmp_path / "one")
    two = save_model(model, None, tmp_path / "two")
    print_one = model_fingerprint(one)
    assert len(print_one) == 16
    assert int(print_one, 16)
    assert model_fingerprint(two) == print_one  # neither the tokenizer nor the place counts
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert model_fingerprint(two) != print_one
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert model_fingerprint(save_model(model, None, tmp_path / "three")) != print_one
    assert model_fingerprint(one / "model.safetensors") == model_fingerprint(two / "model.safetensors")
    with pytest.raises(ModelError, match="No weights"):
        model_fingerprint(tmp_path)


def test_files_follow_the_umask(make_model, make_tokenizer, tmp_path):
    """safetensors writes 0600 and a temporary folder is 0700: nobody else could serve the model."""
    old = os.umask(0o027)
    try:
        folder = save_model(make_model("llama"), make_tokenizer(), tmp_path / "model")
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_a_place_that_cannot_be_written_is_a_clear_error(make_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"Cannot write .*file/model: .*Choose another folder"):
        save_model(make_model("llama"), None, tmp_path / "file" / "model")
