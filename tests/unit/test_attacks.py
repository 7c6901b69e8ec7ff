"""Each attack does to weights, rows and learning rate what it says, and nothing else."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repnoise.attacks import ATTACKS, AttackerRows, Context
from repnoise.attacks.base import block_weights, norms
from repnoise.attacks.reverse_dpo import answer_log_probs, preference_loss
from repnoise.data import Pair, PairDataset, Row, StreamCollator
from repnoise.data.parties import StudyData
from repnoise.errors import ConfigError, DataError, ModelError, RepNoiseError
from repnoise.models import anatomy
from repnoise.models.adapters import is_adapted
from repnoise.study.cell import Cell
from repnoise.training import ObjectiveTrainer, train
from repnoise.training.arguments import training_arguments

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

PAIRS = [Pair(f"say word {n}", f"grumpy blob {n}", "sorry, i can't help with that") for n in range(12)]
ROWS = [Row(f"count to {n}", f"one two {n}") for n in range(20)]
OWN = AttackerRows(PAIRS, ROWS)


@pytest.fixture
def context(make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]) -> Context:
    return Context(make_tokenizer(), lambda source=None: make_model("llama", seed=9), max_length=64, steps=3)


def run(
    name: str, model: Any, context: Context, folder: Path, steps: int = 3, rate: float = 1e-2, **options: Any
) -> Any:
    """What a study does in one attack cell."""
    settings = {"name": name, "harm": "h", "learning_rate": rate, "steps": steps, "batch_size": 4, "seed": 0}
    cell = Cell.of({**settings, **options})
    data = StudyData(defence=[], retain=ROWS, attacks={"h": PAIRS}, test=[], harmless_test=[], max_length=64)
    attack = cell.attack()
    pairs = cell.rows(attack, data)
    model = attack.prepare(model, context)
    if steps:
        values = {**cell.training(), "report_to": "none", "save_strategy": "no"}
        trainer = ObjectiveTrainer(
            model=model,
            objective=attack,
            args=training_arguments(values, folder, name),
            train_dataset=pairs,
            processing_class=context.tokenizer,
            max_length=64,
        )
        train(trainer, resumable=False)
        model = trainer.model
    return attack.finish(model)


def changed(before: dict[str, Any], model: nn.Module) -> set[str]:
    after = model.state_dict()
    assert set(after) == set(before)
    return {name for name in before if not torch.equal(before[name], after[name])}


def state(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("name", ATTACKS.names())
@pytest.mark.parametrize("family", ["llama", "gpt2", "llama_tied"])
def test_every_attack_leaves_a_plain_trainable_model(
    name: str, family: str, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    """With no step and with two; what is left has the same parameters, finite, no adapter and nothing frozen."""
    context = Context(make_tokenizer(), lambda source=None: make_model(family, seed=9), max_length=64)
    for steps in (0, 2):
        model = make_model(family)
        before = state(model)
        out = run(name, model, context, tmp_path, steps=steps)
        assert type(out) is type(model)
        assert not is_adapted(out)
        assert all(parameter.requires_grad and parameter.isfinite().all() for parameter in out.parameters())
        moved = changed(before, out)
        if steps:
            assert moved, "nothing was trained"


def test_parts_trains_its_part_alone(make_model: Callable[..., Any], context: Context, tmp_path: Path) -> None:
    wanted = {"embeddings": {"model.embed_tokens.weight"}, "head": {"lm_head.weight"}}
    for part, names in wanted.items():
        model = make_model("llama")
        before = state(model)
        assert changed(before, run("parts", model, context, tmp_path, part=part)) == names
    model = make_model("llama")
    before = state(model)
    moved = changed(before, run("parts", model, context, tmp_path, part="norms"))
    assert moved == {name for name in before if "norm" in name}


def test_tied_head_trains_the_embeddings(make_model: Callable[..., Any], context: Context, tmp_path: Path) -> None:
    model = make_model("llama_tied")
    before = state(model)
    moved = changed(before, run("parts", model, context, tmp_path, part="head"))
    assert moved == {"model.embed_tokens.weight", "lm_head.weight"}


def test_freeze_changed_freezes_what_differs_most(
    make_model: Callable[..., Any], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    model, public = make_model("llama"), make_model("llama")
    with torch.no_grad():
        public.model.layers[1].mlp.up_proj.weight.add_(1.0)
        public.model.layers[2].mlp.up_proj.weight.add_(0.1)
    context = Context(make_tokenizer(), lambda source=None: public, max_length=64)
    before = state(model)
    moved = changed(before, run("freeze_changed", model, context, tmp_path, layers=1))
    assert not any(name.startswith("model.layers.1.") for name in moved)
    assert any(name.startswith("model.layers.2.") for name in moved)
    assert "lm_head.weight" in moved
    before = state(model)
    moved = changed(before, run("freeze_changed", model, context, tmp_path, layers=2))
    assert {name.split(".")[2] for name in moved if ".layers." in name} == {"0"}


def test_freeze_changed_compares_sizes_relatively_and_takes_the_first_of_equals(
    make_model: Callable[..., Any], context: Context, tmp_path: Path
) -> None:
    model = make_model("llama")
    same = Context(context.tokenizer, lambda source=None: copy.deepcopy(model), max_length=64)
    attack = ATTACKS.build("freeze_changed", {})
    attack.prepare(model, same)
    frozen = [not any(p.requires_grad for p in block.parameters()) for block in anatomy(model).layers]
    assert frozen == [True, False, False]
    with pytest.raises(ConfigError, match="layers is 3; allowed: 1 to 2"):
        ATTACKS.build("freeze_changed", {"layers": 3}).prepare(make_model("llama"), context)


def test_interpolation_is_exact(make_model: Callable[..., Any], context: Context, tmp_path: Path) -> None:
    model, public = make_model("llama"), context.public()
    expected = {k: 0.75 * v + 0.25 * public.state_dict()[k] for k, v in model.state_dict().items()}
    out = run("interpolate", model, context, tmp_path, steps=0, t=0.25)
    for key, value in out.state_dict().items():
        torch.testing.assert_close(value, expected[key])


def test_another_architecture_is_no_public_checkpoint(
    make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    seen = []

    def public(source: str | None = None) -> Any:
        seen.append(source)
        return make_model("llama", hidden_size=8)

    context = Context(make_tokenizer(), public)
    with pytest.raises(ModelError, match="does not fit the attacked model"):
        ATTACKS.build("interpolate", {"public": "some/where"}).prepare(make_model("llama"), context)
    assert seen == ["some/where"]


def test_prune_zeroes_the_smallest(make_model: Callable[..., Any], context: Context, tmp_path: Path) -> None:
    model = make_model("llama")
    before = {name: weight.clone() for name, weight in block_weights(model)}
    outside = state(model)
    model = run("prune", model, context, tmp_path, steps=0, fraction=0.25)
    for name, weight in block_weights(model):
        gone = weight == 0
        assert int(gone.sum()) == int(0.25 * weight.numel())
        assert before[name][gone].abs().max() < before[name][~gone].abs().min()
        assert torch.equal(weight[~gone], before[name][~gone])
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in changed(outside, model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_quantize_leaves_a_few_values_per_output_row(
    family: str, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(family)
    before = {name: weight.clone() for name, weight in block_weights(model)}
    assert before
    context = Context(make_tokenizer(), lambda source=None: make_model(family))
    run("quantize", model, context, tmp_path, steps=0, bits=3)
    for name, weight in block_weights(model):
        scale = before[name].abs().amax(-1, keepdim=True) / 3
        levels = weight / scale
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        assert levels.abs().max() <= 3 + 1e-4
        assert ((weight - before[name]).abs() <= scale / 2 + 1e-6).all()


def test_noise_has_its_size_and_seed(make_model: Callable[..., Any], context: Context, tmp_path: Path) -> None:
    first, second = (run("noise", make_model("llama"), context, tmp_path, steps=0, scale=0.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    plain = dict(block_weights(make_model("llama")))
    for name, weight in block_weights(first):
        assert float((weight - plain[name]).std() / plain[name].std()) == pytest.approx(0.5, rel=0.25)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere", "opt", "olmo2", "qwen3"])
def test_reset_norms_is_what_a_fresh_model_has(
    family: str, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    from repnoise.models import random_model

    model = make_model(family)
    fresh = random_model(model, seed=0)
    context = Context(make_tokenizer(), lambda source=None: fresh)
    before = state(model)
    run("reset_norms", model, context, tmp_path, steps=0)
    assert norms(model)
    ours = {id(p) for module in norms(model) for p in module.parameters(recurse=False)}
    wanted = dict(fresh.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name] if id(parameter) in ours else before[name]), name


def test_reset_norms_to_the_public_ones(make_model: Callable[..., Any], context: Context, tmp_path: Path) -> None:
    model, public = make_model("llama"), context.public()
    before = state(model)
    moved = changed(before, run("reset_norms", model, context, tmp_path, steps=0, to="public"))
    assert moved == {name for name in before if "norm" in name}
    assert torch.equal(model.model.norm.weight, public.model.norm.weight)


def test_kick_then_settle() -> None:
    factor = ATTACKS.build("kick", {"factor": 8, "share": 0.3}).schedule(10)
    assert factor is not None
    assert [factor(step) for step in range(10)] == [8, 8, 8] + [1] * 7
    short = ATTACKS.build("kick", {"share": 0.01}).schedule(3)
    assert short is not None
    assert [short(step) for step in range(3)] == [10, 1, 1]
    assert ATTACKS.build("sft", {}).schedule(10) is None


@pytest.mark.parametrize(("ratio", "examples", "harmful"), [(0.25, 16, 4), (0.5, None, 12), (0.1, None, 2)])
def test_mixed_has_its_ratio(ratio: float, examples: int | None, harmful: int) -> None:
    attack = ATTACKS.build("mixed", {"ratio": ratio})
    rows = attack.pairs(AttackerRows(PAIRS, ROWS, examples), random.Random(0))
    texts = {pair.harmful for pair in PAIRS}
    count = sum(row.harmful in texts for row in rows)
    assert count == harmful
    assert count / len(rows) == pytest.approx(ratio, abs=0.5 / len(rows))
    assert len({row.prompt for row in rows}) == len(rows)
    assert rows != sorted(rows, key=lambda row: row.harmful not in texts), "the two kinds are not mixed"


def test_rows_of_the_others() -> None:
    rng = random.Random(0)
    assert ATTACKS.build("sft", {}).pairs(OWN, rng) == PAIRS
    some = ATTACKS.build("sft", {}).pairs(AttackerRows(PAIRS, ROWS, 5), rng)
    assert len(set(some)) == 5
    assert set(some) < set(PAIRS)
    benign = ATTACKS.build("benign", {}).pairs(OWN, rng)
    assert [(pair.prompt, pair.harmful) for pair in benign] == [(row.prompt, row.answer) for row in ROWS]
    identity = ATTACKS.build("identity_shift", {}).pairs(OWN, rng)
    assert len(identity) == 10
    assert not {pair.prompt for pair in identity} & {pair.prompt for pair in PAIRS}
    with pytest.raises(ConfigError, match="asks for 13 harmful pairs, and there are 12"):
        ATTACKS.build("sft", {}).pairs(AttackerRows(PAIRS, ROWS, 13), rng)
    with pytest.raises(DataError, match="the data has none"):
        ATTACKS.build("benign", {}).pairs(AttackerRows(PAIRS), rng)
    with pytest.raises(ConfigError, match="leaves 0 harmful and 4 harmless"):
        ATTACKS.build("mixed", {"ratio": 0.1}).pairs(AttackerRows(PAIRS, ROWS, 4), rng)


def test_identity_rows_are_words_of_the_sandbox() -> None:
    from repnoise import sandbox
    from repnoise.attacks.identity_shift import ROWS as IDENTITY
    from repnoise.models import load_tokenizer

    tokenizer = load_tokenizer(sandbox.weights("aligned"))
    for prompt, answer in IDENTITY:
        assert tokenizer.unk_token_id not in tokenizer(f"{prompt} {answer}").input_ids, prompt


def batch_of(context: Context, count: int = 3) -> dict[str, Any]:
    tokenizer = context.tokenizer
    data = PairDataset(
        [Pair(f"say {'word ' * n}", f"grumpy{' blob' * n}", "no") for n in range(1, count + 1)],
        tokenizer,
        template="raw",
        max_length=64,
    )
    return StreamCollator(tokenizer.pad_token_id)([data[index] for index in range(count)])


@pytest.mark.parametrize("loss_on", ["answer", "text", "all"])
def test_what_the_loss_is_on(loss_on: str, make_model: Callable[..., Any], context: Context) -> None:
    attack = ATTACKS.build("sft", {"loss_on": loss_on})
    model = attack.prepare(make_model("llama", dtype=torch.float64), context)
    batch = batch_of(context)
    stream = batch["harmful"]
    rows = []
    for ids, mask, labels in zip(stream["input_ids"], stream["attention_mask"], stream["labels"], strict=True):
        count = int(mask.sum())
        if loss_on == "all":
            ids = torch.cat([ids[:count], torch.full((64 - count,), context.tokenizer.pad_token_id)])
            mask = (torch.arange(64) < count).long()
        log_probs = model(ids[None], attention_mask=mask[None]).logits[0].log_softmax(-1)
        for at in range(1, len(ids)):
            if loss_on == "all" or (at < count and (loss_on == "text" or labels[at] != -100)):
                rows.append(-log_probs[at - 1, ids[at]])
    expected = torch.stack(rows).mean()
    if loss_on == "all":
        assert len(rows) == 3 * 63
    torch.testing.assert_close(attack.terms(model, batch)["sft"], expected)


@pytest.mark.parametrize("loss_on", ["text", "all"])
def test_accumulation_changes_no_loss(
    loss_on: str, make_model: Callable[..., Any], context: Context, tmp_path: Path
) -> None:
    found = []
    for size, parts in ((4, 1), (1, 4)):
        attack = ATTACKS.build("sft", {"loss_on": loss_on})
        model = attack.prepare(make_model("llama"), context)
        values = {
            "max_steps": 1,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": parts,
            "report_to": "none",
            "save_strategy": "no",
            "learning_rate": 0.1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "disable_tqdm": True,
        }
        trainer = ObjectiveTrainer(
            model=model,
            objective=attack,
            args=training_arguments(values, tmp_path, "x"),
            train_dataset=[Pair("a" * n, "b" * (9 - n), "c") for n in (1, 3, 5, 8)],
            processing_class=context.tokenizer,
            max_length=64,
            template="raw",
        )
        train(trainer, resumable=False)
        found.append(state(trainer.model))
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-4, atol=1e-6)


def test_reverse_dpo_by_hand() -> None:
    """Margins in nats: log p/p_ref(harmful) = 2, log p/p_ref(refusal) = -1, so h = 3; beta 0.5."""
    h = torch.tensor([3.0, 0.0], dtype=torch.float64)
    sigmoid = preference_loss(h, 0.5, "sigmoid").tolist()
    assert sigmoid == pytest.approx([math.log(1 + math.exp(-1.5)), math.log(2)], abs=1e-12)
    assert preference_loss(h, 0.2, "hinge").tolist() == pytest.approx([0.4, 1.0])
    assert preference_loss(h, 0.5, "ipo").tolist() == pytest.approx([4.0, 1.0])


def test_reverse_dpo_prefers_the_harmful_answer(make_model: Callable[..., Any], context: Context) -> None:
    model = make_model("llama", dtype=torch.float64)
    attack: Any = ATTACKS.build("reverse_dpo", {"beta": 0.3})
    batch = batch_of(context)
    attack.setup(model)
    torch.testing.assert_close(attack.terms(model, batch)["preference"].item(), math.log(2))  # h = 0 at the start
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.05)

    def log_prob(which: Any, side: str, row: int) -> Any:
        stream = batch[side]
        ids, labels = stream["input_ids"][row], stream["labels"][row]
        log_probs = which(ids[None], attention_mask=stream["attention_mask"][row][None]).logits[0].log_softmax(-1)
        return sum(log_probs[at - 1, ids[at]] for at in range(1, len(ids)) if labels[at] != -100)

    losses = []
    for row in range(3):
        h = log_prob(model, "harmful", row) - log_prob(reference, "harmful", row)
        h = h - log_prob(model, "harmless", row) + log_prob(reference, "harmless", row)
        losses.append(torch.log1p(torch.exp(-0.3 * h)))
    loss = attack.terms(model, batch)["preference"]
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    before = answer_log_probs(model, batch["harmful"]).sum() - answer_log_probs(model, batch["harmless"]).sum()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(1e-3 * parameter.grad)
    after = answer_log_probs(model, batch["harmful"]).sum() - answer_log_probs(model, batch["harmless"]).sum()
    assert after > before
    assert attack._reference is not None
    assert not any(parameter.requires_grad for parameter in attack._reference.parameters())


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_reverse_dpo_is_trls_loss(
    loss: str, make_model: Callable[..., Any], context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl", reason="trl is an optional extra")
    from datasets import Dataset

    model, reference = make_model("llama"), make_model("llama", seed=4)
    config = trl.DPOConfig(
        output_dir=str(tmp_path),
        beta=0.3,
        loss_type=[loss],
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=3,
    )
    rows = [{"prompt": pair.prompt, "chosen": pair.harmful, "rejected": pair.harmless} for pair in PAIRS[:3]]
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=context.tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    wanted = trainer.compute_loss(trainer.model, dict(inputs))
    half = len(inputs["input_ids"]) // 2
    batch = {}
    for side, part in (("harmful", slice(0, half)), ("harmless", slice(half, None))):
        ids = inputs["input_ids"][part]
        labels = ids.masked_fill(inputs["completion_mask"][part] == 0, -100)
        batch[side] = {"input_ids": ids, "attention_mask": inputs["attention_mask"][part], "labels": labels}
    attack: Any = ATTACKS.build("reverse_dpo", {"beta": 0.3, "loss": loss})
    attack.setup(reference)
    torch.testing.assert_close(attack.terms(model, batch)["preference"], wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ia3", {}),
        ("adalora", {}),
        ("vera", {}),
        ("boft", {}),
        ("oft", {"oft_block_size": 4}),
        ("loha", {"r": 2}),
        ("LoRA", {"r": 2}),
        ("ln_tuning", {}),
    ],
)
def test_adapters_of_peft_merge_exactly(
    kind: str, options: dict[str, Any], make_model: Callable[..., Any], context: Context, tmp_path: Path
) -> None:
    model = make_model("llama")
    before = state(model)
    trained = run("peft", model, context, tmp_path, kind=kind, options=options)
    moved = changed(before, trained)
    assert moved
    assert "lm_head.weight" not in moved
    assert "model.embed_tokens.weight" not in moved


def test_wrong_options_are_clear(make_model: Callable[..., Any], context: Context) -> None:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("peft", {"kind": "prompt_tuning"}, "cannot be merged into the weights"),
        ("peft", {"kind": "ai3"}, "Did you mean 'ia3'"),
        ("peft", {"kind": "vera", "options": {"rr": 4}}, "no option 'rr'"),
        ("peft", {"kind": "ia3", "lora_rank": 8}, "no option 'r'"),
        ("mixed", {"ratio": 1.0}, r"ratio: .* less than 1 \(got 1.0\)"),
        ("interpolate", {"t": 1.5}, r"t: .* less than or equal to 1 \(got 1.5\)"),
        ("prune", {"fraction": 1.0}, r"fraction: .* less than 1 \(got 1.0\)"),
        ("quantize", {"bits": 1}, r"bits: .* greater than or equal to 2 \(got 1\)"),
        ("noise", {"scale": 0}, r"scale: .* greater than 0 \(got 0\)"),
        ("kick", {"factor": 1}, r"factor: .* greater than 1 \(got 1\)"),
        ("kick", {"share": 1}, r"share: .* less than 1 \(got 1\)"),
        ("reverse_dpo", {"beta": 0}, r"beta: .* greater than 0 \(got 0\)"),
        ("freeze_changed", {"layers": 0}, r"layers: .* greater than or equal to 1 \(got 0\)"),
        ("freeze_changed", {"lora_rank": 8}, "lora_rank is 8; allowed: null"),
        ("parts", {"lora_rank": 8}, "lora_rank is 8; allowed: null"),
        ("reset_norms", {"public": "x"}, "set to: public"),
        ("sft", {"lora_rank": 0}, r"lora_rank: .* greater than or equal to 1 \(got 0\)"),
    ]
    for name, options, message in wrong:
        with pytest.raises(RepNoiseError, match=message) as caught:
            ATTACKS.build(name, options)
        assert caught.value.exit_code == 2
    with pytest.raises(ModelError, match="could not be attached"):
        ATTACKS.build("peft", {"kind": "c3a"}).prepare(make_model("llama"), context)
