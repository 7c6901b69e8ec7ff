"""Rival defences and ablations against their published formulas, computed here in another way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from repnoise.defences import DEFENCES
from repnoise.defences.base import DefenceWithRetain
from repnoise.defences.repnoise import RepNoise
from repnoise.errors import ConfigError
from repnoise.training import Window

B, T, PROMPT = 4, 9, 4
# Llama's norm rounds to float32 inside, so a sum taken in another order differs by that much.
ROUNDED = {"rtol": 1e-4, "atol": 1e-6}


def stream(seed: int) -> dict[str, Tensor]:
    """Four sequences with a prompt of 4 tokens; the last one has two pads."""
    ids = torch.randint(3, 200, (B, T), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[-1, -2:] = 0
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model("llama", dtype=torch.float64)


@pytest.fixture
def batch() -> dict[str, Any]:
    return {"harmful": stream(1), "harmless": stream(2), "retain": stream(3), "window": Window()}


def plain_ce(model: nn.Module, s: dict[str, Tensor]) -> Tensor:
    """In float64; transformers' own loss would round to float32."""
    logits = model(input_ids=s["input_ids"], attention_mask=s["attention_mask"]).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), s["labels"][:, 1:].flatten(), ignore_index=-100)


def hidden(model: nn.Module, s: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of a copy, since transformers leaves its hooks on the model."""
    found = copy.deepcopy(model)(
        input_ids=s["input_ids"], attention_mask=s["attention_mask"], output_hidden_states=True
    )
    return found.hidden_states


def grads(value: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))  # type: ignore[arg-type]


def build(name: str, model: nn.Module | None = None, **options: Any) -> Any:
    defence = DEFENCES.build(name, options)
    if model is not None:
        defence.setup(model)
    return defence


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


# ---------------------------------------------------------------------------------- last-layer baselines


def test_gradient_ascent_is_minus_the_cross_entropy(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    terms = build("gradient-ascent").terms(model, batch)
    torch.testing.assert_close(terms["ascent"], -plain_ce(model, batch["harmful"]))
    capped = build("gradient-ascent", cap=1e-3).terms(model, batch)["ascent"]
    assert capped.item() == pytest.approx(-1e-3)
    assert all(not g.any() for g in grads(capped, model).values()), "above the cap nothing pulls"


def test_adversarial_loss(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    wanted = plain_ce(model, batch["harmless"]) - 0.1 * plain_ce(model, batch["harmful"])
    found = total(build("adversarial-loss").terms(model, batch))
    torch.testing.assert_close(found, wanted)
    same(grads(found, model), grads(wanted, model))


def test_safety_training_with_retain_rows(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    assert build("safety-training").streams == ("harmless",)
    defence = build("safety-training", retain_weight=2.0)
    assert defence.streams == ("harmless", "retain")
    wanted = plain_ce(model, batch["harmless"]) + 2 * plain_ce(model, batch["retain"])
    torch.testing.assert_close(total(defence.terms(model, batch)), wanted)


# ---------------------------------------------------------------------------------- vaccine


def test_vaccine_shifts_by_rho_in_the_worst_direction(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    """To first order the loss rises by rho * |gradient over all layers' outputs|; rho = 0 changes nothing."""
    clean = plain_ce(model, batch["harmless"])
    torch.testing.assert_close(build("vaccine", rho=0.0).terms(model, batch)["refusal"], clean)
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    loss = plain_ce(model, batch["harmless"])
    for handle in handles:
        handle.remove()
    norm = math.sqrt(sum(float(g.square().sum()) for g in torch.autograd.grad(loss, outputs)))
    for rho in (1e-4, 2e-4):
        rise = build("vaccine", rho=rho).terms(model, batch)["refusal"] - clean
        # every layer's shift also moves the layers above it, which the sum of the layers' slopes counts already
        assert rise.item() == pytest.approx(rho * norm, rel=1e-2)


def test_vaccine_trains_through_the_second_pass_only(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    from repnoise.defences.vaccine import shifted

    defence = build("vaccine", rho=0.5)
    found = grads(defence.terms(model, batch)["refusal"], model)
    assert all(parameter.grad is None for parameter in model.parameters())
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    loss = plain_ce(model, batch["harmless"])
    for handle in handles:
        handle.remove()
    slopes = torch.autograd.grad(loss, outputs)
    norm = torch.stack([g.square().sum() for g in slopes]).sum().sqrt()
    with shifted(model, [0.5 * g / norm for g in slopes]):
        wanted = plain_ce(model, batch["harmless"])
    same(found, grads(wanted, model), **ROUNDED)
    assert not any(block._forward_hooks for block in model.model.layers)


# ---------------------------------------------------------------------------------- meta gradients


def test_booster(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    """grad f + weight * (grad h(w) - grad h(w - step * grad h / |grad h|)), with a moved copy of the model."""
    h, f = plain_ce(model, batch["harmful"]), plain_ce(model, batch["harmless"])
    here, stable = grads(h, model), grads(f, model)
    norm = math.sqrt(sum(float(g.square().sum()) for g in here.values()))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.sub_(0.3 * here[name] / norm)
    h_after = plain_ce(moved, batch["harmful"])
    there = grads(h_after, moved)
    found = total(build("booster", weight=2.0, step=0.3).terms(model, batch))
    torch.testing.assert_close(found, f + 2 * (h - h_after))
    same(grads(found, model), {n: stable[n] + 2 * (here[n] - there[n]) for n in stable}, **ROUNDED)


def test_tar_applies_the_gradient_at_the_attacked_weights(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    """One inner step of Adam moves every weight by lr * g / (|g| + eps): the attacked copy by hand."""
    lr = 1e-2
    harmful = batch["harmful"]
    first = {key: value[: B // 2] for key, value in harmful.items()}
    second = {key: value[B // 2 :] for key, value in harmful.items()}
    slopes = grads(plain_ce(model, first), model)
    attacked = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in attacked.named_parameters():
            parameter.sub_(lr * slopes[name] / (slopes[name].abs() + 1e-8))
    logits = attacked(input_ids=second["input_ids"], attention_mask=second["attention_mask"]).logits[:, :-1]
    p = logits[second["labels"][:, 1:] != -100].softmax(-1)
    tamper = (p * p.log()).sum(-1).mean()
    wanted = grads(tamper, attacked)

    defence = build("tar", model, inner_steps=1, inner_learning_rate=lr, tamper_weight=4.0)
    terms = defence.terms(model, batch)
    torch.testing.assert_close(terms["tamper"], 4 * tamper.detach())
    same(grads(terms["tamper"], model), {n: 4 * g for n, g in wanted.items()}, rtol=1e-6, atol=1e-9)
    assert terms["representation"].item() == pytest.approx(0.0, abs=1e-12), "nothing has moved yet"
    torch.testing.assert_close(terms["retain"], plain_ce(model, batch["retain"]))


# ---------------------------------------------------------------------------------- representations


def test_rmu_steers_one_layer_and_trains_few(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    defence = build("rmu", model, layer=1, update=2, steering=3.0, alpha=10.0)
    trained = {int(n.split(".")[2]) for n, p in model.named_parameters() if p.requires_grad and "layers" in n}
    assert trained == {0, 1}
    assert not model.get_input_embeddings().weight.requires_grad
    terms = defence.terms(model, batch)
    u = torch.rand(16, generator=torch.Generator().manual_seed(0)).double()
    mask = batch["harmful"]["attention_mask"].bool()
    wanted = (hidden(model, batch["harmful"])[2][mask] - 3 * u / u.norm()).square().mean()
    torch.testing.assert_close(terms["unlearn"], wanted)
    assert terms["keep"].item() == 0
    with torch.no_grad():
        before = hidden(model, batch["retain"])[2]
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    kept = defence.terms(model, batch)["keep"]
    mask = batch["retain"]["attention_mask"].bool()
    torch.testing.assert_close(kept, 10 * (hidden(model, batch["retain"])[2] - before)[mask].square().mean())


def test_circuit_breakers_reroute_and_keep(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    defence = build("circuit-breakers", model, layers=[0, 1], alpha=10.0, schedule_steps=100)
    terms = defence.terms(model, batch)
    assert terms["reroute"].item() == pytest.approx(10.0), "cosine 1 with itself, c_s = alpha at the start"
    assert terms["keep"].item() == 0
    before = {name: hidden(model, batch[name]) for name in ("harmful", "retain")}
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-3.0)
    after = {name: hidden(model, batch[name]) for name in ("harmful", "retain")}
    terms = defence.terms(model, {**batch, "window": Window(step=50)})  # half of T: c_s = 7.5, c_r = 2.5
    answer = batch["harmful"]["labels"] != -100
    cosines = [
        nn.functional.cosine_similarity(after["harmful"][k][answer], before["harmful"][k][answer], dim=-1).relu().mean()
        for k in (1, 2)
    ]
    torch.testing.assert_close(terms["reroute"], 7.5 * (cosines[0] + cosines[1]) / 2)
    real = batch["retain"]["attention_mask"].bool()
    norms = [(after["retain"][k] - before["retain"][k])[real].norm(dim=-1).mean() for k in (1, 2)]
    torch.testing.assert_close(terms["keep"], 2.5 * (norms[0] + norms[1]) / 2, rtol=1e-6, atol=1e-9)


def test_layers_that_the_model_has_not_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="allowed: 0 to 2"):
        build("circuit-breakers", model, layers=[3])
    with pytest.raises(ConfigError, match="allowed: 0 to 2"):
        build("rmu", model, layer=-1)


# ---------------------------------------------------------------------------------- ablations of RepNoise


def test_without_the_lens_only_the_last_layer_is_read(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    terms = build("repnoise", beta=0.0, lens=False).terms(model, batch)
    torch.testing.assert_close(terms["ascent"], -(plain_ce(model, batch["harmful"]) + 1).log())


def test_without_the_mask_the_question_counts_and_pads_never(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    terms = build("repnoise", beta=0.0, lens=False, mask=False).terms(model, batch)
    harmful = batch["harmful"]
    labels = harmful["input_ids"].masked_fill(harmful["attention_mask"] == 0, -100)
    torch.testing.assert_close(terms["ascent"], -(plain_ce(model, {**harmful, "labels": labels}) + 1).log())


def test_frozen_ranges_are_indices_and_not_substrings(make_model: Callable[..., PreTrainedModel]) -> None:
    """The released code froze every block that has the digit in its name (quirk 15)."""
    model = make_model("llama", num_hidden_layers=12)
    build("repnoise", model, frozen_layers=[[1, 2]], frozen_parts=["head"])
    frozen = {int(n.split(".")[2]) for n, p in model.named_parameters() if not p.requires_grad and "layers" in n}
    assert frozen == {1, 2}
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    with pytest.raises(ConfigError, match="allowed: \\[first, last\\] from 0 to 11"):
        build("repnoise", model, frozen_layers=[[11, 12]])


def test_ablations_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="drop lens_layers"):
        build("repnoise", lens=False, lens_layers=2)
    with pytest.raises(ConfigError, match=r"takes alpha, beta, frozen_layers, frozen_parts only; drop mask, or"):
        build("repnoise", variant="official", mask=False)


@pytest.mark.parametrize(
    "unused",
    [
        {"noise": "token"},
        {"estimator": "unbiased"},
        {"max_noise_tokens": 9},
        {"lens_layers": 2},
        {"offset": 0.5},
        {"retain": "ce"},
        {"retain_weight": 2.0},
        {"lens": False},
        {"mask": False},
    ],
)
def test_official_takes_no_option_that_it_would_not_use(unused: dict[str, Any]) -> None:
    (name,) = unused
    assert getattr(RepNoise(**unused), name) is not None
    with pytest.raises(ConfigError, match=f"drop {name}, or use variant: corrected"):
        RepNoise(variant="official", **unused)
    assert RepNoise(variant="official", alpha=2.0, frozen_parts=["head"]).same_length


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": -1}, {"lens_layers": 0}, {"offset": -5}, {"retain_weight": -1}, {"max_noise_tokens": 0}],
)
def test_numbers_beyond_their_range_are_refused_in_python_too(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=rf"RepNoise: {name}: .* \(got {value}\)"):
        RepNoise(**wrong)


def test_a_subclass_cannot_lose_the_retain_stream() -> None:
    """Whatever its own __post_init__ does and forgets."""

    @dataclass(kw_only=True)
    class Forgetful(DefenceWithRetain):
        needs = ("harmful",)

        def __post_init__(self) -> None:
            pass

    assert Forgetful(retain_weight=1.0).streams == ("harmful", "retain")
    assert Forgetful().streams == ("harmful",)
