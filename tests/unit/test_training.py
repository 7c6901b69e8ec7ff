"""The one loop: exact accumulation, resume bit for bit, logged terms, honest failure."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from repnoise.attacks.sft import Sft
from repnoise.data import Pair, Row
from repnoise.defences.repnoise import RepNoise
from repnoise.errors import DataError, RunError
from repnoise.models import unwrap
from repnoise.seeds import derive_seed
from repnoise.training import ObjectiveTrainer, Window, train

PAIRS = [Pair(f"question {i}", f"harmful answer {'x' * (i % 5)} {i}", f"no {'y' * (i % 3)}", "c") for i in range(16)]
RETAIN = [Row(f"ask {i}", f"harmless words {'z' * (i % 4)} {i}") for i in range(7)]


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def arguments(folder: Path, **more: object) -> TrainingArguments:
    given = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "seed": 3,
        **more,
    }
    return TrainingArguments(output_dir=str(folder), **given)


def trainer(make_model, make_tokenizer, folder: Path, objective, retain=None, dtype=torch.float32, **more):
    callbacks = more.pop("callbacks", None)
    log_file = more.pop("log_file", None)
    return ObjectiveTrainer(
        model=make_model("llama", dtype=dtype),
        objective=objective,
        args=arguments(folder, **more),
        train_dataset=PAIRS,
        processing_class=make_tokenizer(),
        retain_dataset=retain,
        template="plain",
        max_length=64,
        callbacks=callbacks,
        log_file=log_file,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


OBJECTIVES = {
    "all layers": lambda: RepNoise(alpha=1.0, beta=0.0, retain="ce"),
    "sampled layers": lambda: RepNoise(alpha=0.7, beta=0.0, lens_layers=2, retain="kl"),
    "attack": lambda: Sft(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_by_eight_equals_eight_by_one(name, make_model, make_tokenizer, tmp_path):
    """Gradient accumulation changes nothing on the deterministic terms: weights agree in float64."""
    trained = []
    for batch, accumulation in ((8, 1), (1, 8), (2, 4)):
        t = trainer(
            make_model,
            make_tokenizer,
            tmp_path / f"{batch}",
            OBJECTIVES[name](),
            retain=RETAIN,
            dtype=torch.float64,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
        )
        t.train()
        trained.append(weights(t.model))
    for other in trained[1:]:
        for key, value in trained[0].items():
            # the loss is summed in float32 by the trainer's log, the gradients are float64
            torch.testing.assert_close(other[key], value, rtol=1e-6, atol=1e-9)


def test_terms_are_logged_and_add_up(make_model, make_tokenizer, tmp_path):
    log = tmp_path / "train.jsonl"
    trainer(make_model, make_tokenizer, tmp_path, RepNoise(beta=0.5, retain="ce"), retain=RETAIN, log_file=log).train()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        total = sum(line[name] for name in ("stability", "noise", "ascent", "retain"))
        assert line["loss"] == pytest.approx(total, abs=1e-4)
        assert min(line["grad_norm"], line["tokens"], line["seconds"]) > 0


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (5, [5, 7])])
def test_a_line_is_the_mean_of_its_interval(every, steps, make_model, make_tokenizer, tmp_path):
    """Also of the last and shorter one, and of the rest of one after a kill: its terms add up to its loss."""

    def build(folder: Path, **more):
        objective = RepNoise(beta=0.5, retain="ce")
        given = {"max_steps": 7, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **more}
        log = folder / "train.jsonl"
        return trainer(make_model, make_tokenizer, folder, objective, retain=RETAIN, log_file=log, **given)

    def lines(folder: Path) -> list[dict]:
        return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]

    terms = ("stability", "noise", "ascent", "retain")
    build(tmp_path / "each").train()
    each = lines(tmp_path / "each")
    build(tmp_path / "some", logging_steps=every).train()
    some = lines(tmp_path / "some")
    assert [line["step"] for line in some] == steps
    done = 0
    for line in some:
        interval = each[done : line["step"]]
        assert line["loss"] == pytest.approx(sum(line[name] for name in terms), abs=1e-4)
        for name in (*terms, "loss"):
            assert line[name] == pytest.approx(sum(one[name] for one in interval) / len(interval), abs=1e-4)
        assert line["tokens"] == sum(one["tokens"] for one in interval)
        done = line["step"]
    resumable = {"logging_steps": every, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(ConnectionAbortedError):
        train(build(tmp_path / "broken", callbacks=[StopAt(5)], **resumable))
    train(build(tmp_path / "broken", **resumable))
    broken = lines(tmp_path / "broken")
    assert [line["step"] for line in broken] == steps
    for line in broken:
        assert line["loss"] == pytest.approx(sum(line[name] for name in terms), abs=1e-4)
    assert broken[-1] == some[-1] | {"seconds": broken[-1]["seconds"]}, "an interval that was whole"


class StopAt(TrainerCallback):
    """As a kill does: no warning, no clean-up."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise ConnectionAbortedError("killed")


def test_resumed_equals_straight_through_bit_for_bit(make_model, make_tokenizer, tmp_path):
    def build(folder: Path, **more):
        objective = RepNoise(beta=0.5, noise="token", max_noise_tokens=16, lens_layers=2, retain="ce")
        return trainer(
            make_model,
            make_tokenizer,
            folder,
            objective,
            retain=RETAIN,
            max_steps=7,
            save_strategy="steps",
            save_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            log_file=folder / "train.jsonl",
            **more,
        )

    straight = build(tmp_path / "straight")
    train(straight)
    broken = tmp_path / "broken"
    with pytest.raises(ConnectionAbortedError):
        train(build(broken, callbacks=[StopAt(5)]))
    resumed = build(broken)
    train(resumed)
    for key, value in weights(straight.model).items():
        assert torch.equal(weights(resumed.model)[key], value), key

    def log(folder: Path) -> list[dict]:
        lines = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    assert log(broken) == log(tmp_path / "straight")


def test_a_half_written_checkpoint_is_passed_over(make_model, make_tokenizer, tmp_path):
    def build():
        return trainer(make_model, make_tokenizer, tmp_path, Sft(), max_steps=4, save_strategy="steps", save_steps=2)

    train(build())
    expected = weights(build().model)
    (tmp_path / "checkpoint-9").mkdir()
    again = build()
    train(again)
    assert any(not torch.equal(value, expected[key]) for key, value in weights(again.model).items())
    assert again.state.global_step == 4


def test_ctrl_c_saves_and_goes_on(make_model, make_tokenizer, tmp_path):
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    def build(callbacks=None):
        return trainer(
            make_model,
            make_tokenizer,
            tmp_path,
            RepNoise(beta=0.5),
            max_steps=6,
            save_strategy="steps",
            save_steps=100,
            callbacks=callbacks,
        )

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(build([Press()]))
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").exists()
    resumed = build()
    train(resumed)
    straight = trainer(make_model, make_tokenizer, tmp_path / "s", RepNoise(beta=0.5), max_steps=6)
    straight.train()
    for key, value in weights(straight.model).items():
        assert torch.equal(weights(resumed.model)[key], value), key


def test_a_loss_that_is_not_finite_stops_with_advice(make_model, make_tokenizer, tmp_path):
    t = trainer(make_model, make_tokenizer, tmp_path, Sft())
    with torch.no_grad():
        next(t.model.parameters()).fill_(float("nan"))
    with pytest.raises(RunError, match=r"not finite at step 1.*Lower the learning rate"):
        t.train()


def test_missing_retain_rows_are_named(make_model, make_tokenizer, tmp_path):
    with pytest.raises(DataError, match="retain"):
        trainer(make_model, make_tokenizer, tmp_path, RepNoise(retain="ce")).train()


def test_no_hook_is_left_behind_also_when_the_forward_raises(make_model, make_tokenizer, tmp_path):
    t = trainer(make_model, make_tokenizer, tmp_path, RepNoise(beta=1.0))
    before = hooks(unwrap(t.model))
    t.train()
    assert hooks(unwrap(t.model)) == before
    last = unwrap(t.model).model.layers[-1]
    last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ZeroDivisionError()))
    before = hooks(unwrap(t.model))
    batch = t.data_collator([t.train_dataset[i] for i in range(4)])
    with pytest.raises(ZeroDivisionError):
        t.objective.terms(t.model, batch)
    assert hooks(unwrap(t.model)) == before


def test_alpha_and_beta_zero_equal_plain_fine_tuning_on_the_harmless_side(make_model, make_tokenizer, tmp_path):
    ours = trainer(make_model, make_tokenizer, tmp_path, RepNoise(alpha=0.0, beta=0.0))
    ours.train()
    swapped = [Pair(p.prompt, p.harmless, p.harmful) for p in PAIRS]
    plain = ObjectiveTrainer(
        model=make_model("llama"),
        objective=Sft(),
        args=arguments(tmp_path / "plain"),
        train_dataset=swapped,
        processing_class=make_tokenizer(),
        template="plain",
        max_length=64,
    )
    plain.train()
    for key, value in weights(plain.model).items():
        assert torch.equal(weights(ours.model)[key], value), key


def test_official_variant_trains(make_model, make_tokenizer, tmp_path):
    t = trainer(make_model, make_tokenizer, tmp_path, RepNoise(variant="official", beta=0.1))
    before = weights(t.model)
    t.train()
    assert any(not torch.equal(value, before[key]) for key, value in weights(t.model).items())


def test_seeds_are_the_same_on_every_machine_and_differ_by_every_part():
    assert derive_seed(0, 1, -1, "noise") == 8116889073172256003
    parts = [(0, 1), (1, 0), (0, "1"), ("0, 1",), (0,), (0, 1, ""), (-1, 1)]
    found = {derive_seed(*each) for each in parts}
    assert len(found) == len(parts)
    assert all(0 <= seed < 2**63 for seed in found)


@pytest.mark.parametrize("objective", [RepNoise(), RepNoise(noise="token"), RepNoise(variant="official")])
def test_noise_is_drawn_where_the_activations_are(objective, make_model, make_tokenizer, tmp_path):
    t = trainer(make_model, make_tokenizer, tmp_path, objective)
    asked = []

    class Watched(Window):
        def generator(self, name, *, per_micro_batch=True, device=None):
            asked.append((name, device))
            return super().generator(name, per_micro_batch=per_micro_batch, device=device or "cpu")

    batch = t.data_collator([t.train_dataset[i] for i in range(4)])
    t.objective.terms(t.model, {**batch, "window": Watched()})
    assert asked == [("noise", torch.device("cpu"))], "the device is passed on, and is that of the activations"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_generator_on_a_gpu_draws_there():
    drawn = torch.randn(9, generator=Window(1, 2).generator("noise", device="cuda"), device="cuda")
    again = torch.randn(9, generator=Window(1, 2).generator("noise", device="cuda"), device="cuda")
    assert torch.equal(drawn, again)


def test_random_draws_depend_on_seed_step_and_name_only():
    def draw(*key, **how):
        seed, step, index, name = key
        return torch.rand(3, generator=Window(seed, step, index).generator(name, **how))

    assert torch.equal(draw(0, 1, 0, "noise"), draw(0, 1, 0, "noise"))
    others = [draw(1, 1, 0, "noise"), draw(0, 2, 0, "noise"), draw(0, 1, 1, "noise"), draw(0, 1, 0, "lens")]
    assert not any(torch.equal(draw(0, 1, 0, "noise"), other) for other in others)
    assert torch.equal(draw(0, 1, 0, "lens", per_micro_batch=False), draw(0, 1, 5, "lens", per_micro_batch=False))


class StopEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize(
    ("more", "made"),
    [
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 64}, "0 of 4"),  # the loader is empty
        ({"callbacks": [StopEarly()]}, "2 of 4"),
        ({"max_steps": -1, "num_train_epochs": 0}, "0 of 0"),
    ],
)
def test_a_training_that_ends_early_is_not_done(more, made, make_model, make_tokenizer, tmp_path):
    with pytest.raises(RunError, match=f"made {made} optimiser steps and ended without an error"):
        train(trainer(make_model, make_tokenizer, tmp_path, Sft(), **more))
