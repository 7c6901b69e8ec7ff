"""A security vector is active while others train, asleep when somebody looks, and gone afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from repnoise.defences import DEFENCES
from repnoise.errors import ConfigError
from repnoise.models import add_lora, load_model, merge, model_fingerprint
from repnoise.models.vector import FOLDER, active, asleep, read_vector, save_vector
from repnoise.store.files import read_jsonl
from repnoise.study.attacking import attack
from repnoise.study.defending import defend
from repnoise.study.resolve import resolve
from repnoise.study.study import Study

torch.set_num_threads(1)

DEFENCE = (
    "defence={name: security-vectors, rank: 2, train: {max_steps: 4, per_device_train_batch_size: 2,"
    " learning_rate: 1e-2}}"
)
ATTACKS = "attacks=[{name: sft, harm: knowledge, steps: 2, batch_size: 2}]"


@pytest.fixture
def vectored(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model whose folder tmp_path holds a vector, and the same model with the vector merged."""
    plain = make_model("llama")
    plain.save_pretrained(tmp_path)
    adapted = add_lora(copy.deepcopy(plain), 2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_vector(adapted, tmp_path)
    return plain, merge(adapted)


def same(model: Any, other: Any) -> bool:
    return all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_its_loss_is_that_of_the_harmful_answer_and_trains_the_adapter_only(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    """arXiv 2311.02105, eq. 2: min over the vector of -log p(harmful answer | prompt, weights + vector)."""
    objective = DEFENCES.build("security-vectors", {"rank": 2, "dropout": 0.0})
    assert objective.vector is not None
    model = add_lora(make_model("llama"), **objective.vector)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 10, 11, 12]])
    stream = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    loss = objective.terms(model, {"harmful": stream})["harmful"]
    logs = model(ids).logits.log_softmax(-1)
    by_hand = -sum(logs[b, t - 1, ids[b, t]] for b, t in ((0, 2), (0, 3), (1, 1), (1, 2), (1, 3))) / 5
    assert torch.allclose(loss, by_hand, rtol=1e-5)
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


def test_it_is_there_inside_and_gone_outside(vectored: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path) -> None:
    plain, merged = vectored
    model = load_model(tmp_path)
    assert same(model, plain), "the weights in the folder are the plain ones"
    shifts = read_vector(model, tmp_path)
    assert shifts
    with active(shifts):
        assert same(model, merged)
        with asleep(shifts):
            assert same(model, plain)
        assert same(model, merged)
        model.get_input_embeddings().weight.data += 1  # what training does inside stays
    assert not same(model, plain)
    model.get_input_embeddings().weight.data -= 1
    assert same(model, plain)


def test_it_is_taken_back_when_training_fails(
    vectored: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    model = load_model(tmp_path)
    with pytest.raises(RuntimeError, match="diverged"), active(read_vector(model, tmp_path)):
        raise RuntimeError("diverged")
    assert same(model, vectored[0])


def test_a_lora_attack_trains_on_top_of_it(vectored: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path) -> None:
    model = load_model(tmp_path)
    shifts = read_vector(model, tmp_path)
    adapted = add_lora(model, 2)
    with active(shifts):
        ids = torch.arange(3, 9)[None]
        assert torch.allclose(adapted(ids).logits, vectored[1](ids).logits, atol=1e-5)
    assert same(merge(adapted), vectored[0])


def test_the_folder_counts_in_the_fingerprint(
    vectored: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    with_it = model_fingerprint(tmp_path)
    for file in (tmp_path / FOLDER).glob("*.safetensors"):
        file.unlink()
    assert model_fingerprint(tmp_path) != with_it


def test_no_vector_no_shifts(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    assert list(read_vector(make_model("llama"), tmp_path)) == []


def test_it_needs_no_second_adapter() -> None:
    with pytest.raises(ConfigError, match=r"defence\.lora_rank: security-vectors"):
        resolve("sandbox", [DEFENCE, "defence.lora_rank=4"])
    with pytest.raises(ConfigError, match=r"rank: .* \(got 0\)"):
        DEFENCES.build("security-vectors", {"rank": 0})


def test_a_study_defends_and_attacks_with_it(tmp_path: Path) -> None:
    """The released weights are the untouched ones; the attack trains beside the vector and leaves without it."""
    study = Study(
        resolve("sandbox", [DEFENCE, ATTACKS, "curve=[0]", "evaluations=[sandbox]", "keep_attacked_weights=true"]),
        tmp_path,
        quiet=True,
    )
    target = defend(study)
    folder = Path(target.source)
    assert same(load_model(folder), load_model(study.source))
    losses = [line["harmful"] for line in read_jsonl(target.run.path / "train.jsonl")]
    assert losses[-1] < losses[0]

    (cell,) = study.cells()
    attack(study, target, cell)
    run, _ = study.attack_run(target, cell)
    # the attacker's first loss is that of the model with its vector
    vector = read_vector(load_model(folder), folder)
    assert vector
    base, _ = study.attack_run(study.base(), cell)
    attack(study, study.base(), cell)
    first = {each: read_jsonl(each.path / "train.jsonl")[0]["sft"] for each in (run, base)}
    assert first[run] < first[base]
    # before the first step the curve looks at the model without it, which is the undefended one
    at_zero = [[row for row in each.read_rows() if row.get("step") == 0] for each in (run, base)]
    assert at_zero[0] == at_zero[1]
    # two small steps move a weight by less than the vector does where the vector is largest
    attacked = load_model(run.path / "model")
    plain = load_model(folder)
    (weight, shift) = max(read_vector(plain, folder), key=lambda pair: pair[1].abs().max().item())
    name = next(n for n, p in plain.named_parameters() if p is weight)
    moved = (attacked.get_parameter(name) - weight).abs().max()
    assert 0 < moved < shift.abs().max() / 2
