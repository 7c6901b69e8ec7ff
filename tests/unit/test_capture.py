"""Captured activations: complete, differentiable, also under checkpointing, and nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import LAYERS, VOCAB
from repnoise.errors import ModelError, RunError
from repnoise.models import add_lora, capture

IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def checkpoint(model: nn.Module, **options: bool) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # transformers renamed it
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def activation_loss(model: nn.Module, *, backward_inside: bool = False) -> torch.Tensor:
    """Uses every captured tensor and the logits, with weights that tell the layers apart."""
    with capture(model) as seen:
        logits = model(IDS, use_cache=False).logits
        loss = logits.pow(2).mean()
        for index, tensor in enumerate([*seen.residual, *seen.mlp]):
            loss = loss + (index + 1) * tensor.sin().mean()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backward_inside", [False, True])
def test_checkpointing_gives_the_same_gradients(family, backward_inside, make_model):
    plain = make_model(family, dtype=torch.float64).train()
    checkpointed = copy.deepcopy(plain)
    checkpoint(checkpointed, use_reentrant=False)
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules())

    loss = activation_loss(plain)
    torch.testing.assert_close(activation_loss(checkpointed, backward_inside=backward_inside), loss)
    expected, found = gradients(plain), gradients(checkpointed)
    assert expected.keys() == found.keys()
    assert len(expected) > 10
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # only Gemma's recomputation gets as far as the MLP hook
def test_the_recomputation_does_not_replace_what_was_captured(name, make_model):
    model = make_model(name).train()
    checkpoint(model, use_reentrant=False)
    with capture(model) as seen:
        loss = model(IDS, use_cache=False).logits.sum()
        before = [id(tensor) for tensor in [*seen.mlp, *seen.residual]]
        loss.backward()
        assert [id(tensor) for tensor in [*seen.mlp, *seen.residual]] == before


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused(make_model):
    model = make_model("llama").train()
    checkpoint(model, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(ModelError, match="use_reentrant"), capture(model):
        model(IDS, use_cache=False)
    with torch.no_grad(), capture(model) as seen:  # without gradients there is nothing to lose
        model(IDS, use_cache=False)
    assert len(seen.mlp) == LAYERS


def test_gradients_reach_the_weights_before_the_captured_point_only(make_model):
    model = make_model("llama")
    with capture(model) as seen:
        model(IDS)
    seen.mlp[1].sum().backward()
    layers = model.model.layers
    assert layers[0].mlp.down_proj.weight.grad is not None
    assert layers[1].mlp.down_proj.weight.grad is not None
    assert layers[2].mlp.down_proj.weight.grad is None


def test_hooks_go_when_the_body_ends_or_raises(family, make_model):
    model = make_model(family)
    before = hooks(model)
    with capture(model):
        assert hooks(model) > before
        model(IDS)
    assert hooks(model) == before
    with pytest.raises(ZeroDivisionError), capture(model):
        raise ZeroDivisionError
    assert hooks(model) == before


def test_hooks_go_when_hooking_itself_fails(make_model, monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(model.model.layers[2], "register_forward_hook", None)
    with pytest.raises(TypeError), capture(model):
        pass
    assert hooks(model) == 0


def test_blocks_nest(make_model):
    model = make_model("gpt2")
    with capture(model) as outer:
        first = model(IDS).logits
        with capture(model, residual=False) as inner:
            second = model(IDS + 1).logits
        assert inner.mlp[0] is outer.mlp[0]  # the outer block sees the inner pass as well
        third = model(IDS).logits
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, third)
    assert not torch.equal(inner.mlp[0], outer.mlp[0])
    assert hooks(model) == 0


def test_the_latest_pass_counts_and_a_broken_one_leaves_no_mixture(make_model):
    model = make_model("llama")

    def explode(module, args):
        raise OverflowError

    block = capture(model)
    seen = block.__enter__()
    model(IDS)
    assert len(seen.mlp) == LAYERS
    model.model.layers[1].register_forward_pre_hook(explode)
    with pytest.raises(OverflowError):
        model(IDS + 1)
    with pytest.raises(RunError, match="cut short"):
        block.__exit__(None, None, None)
    with pytest.raises(RunError, match=r"indices \[1, 2\]"):
        _ = seen.mlp
    with pytest.raises(RunError, match=r"indices \[2, 3\]"):
        _ = seen.residual


def test_no_forward_pass_is_an_error_at_access_and_at_exit(make_model):
    model, other = make_model("llama"), make_model("llama")
    block = capture(model)
    seen = block.__enter__()
    with pytest.raises(RunError, match="did not run"):
        _ = seen.residual
    other(IDS)
    with pytest.raises(RunError, match=f"0 of {LAYERS + 1}"):
        block.__exit__(None, None, None)
    assert hooks(model) == 0


def test_a_skipped_layer_is_an_error(make_model):
    model = make_model("opt", layerdrop=1.0).train()
    with pytest.raises(RunError, match="layerdrop"), capture(model):
        model(IDS)


def test_only_what_was_asked_for(make_model):
    model = make_model("llama")
    with capture(model, residual=False) as seen:
        model(IDS)
    assert len(seen.mlp) == LAYERS
    with pytest.raises(RunError, match="residual=True"):
        _ = seen.residual
    with capture(model, mlp=False) as seen:
        model(IDS)
    assert len(seen.residual) == LAYERS + 1
    with pytest.raises(RunError, match="mlp=True"):
        _ = seen.mlp


def test_blocks_that_return_tuples(make_model):
    """Mixtures of experts and blocks return (hidden, ...) in some versions of transformers."""
    model = make_model("mixtral")
    with capture(model) as plain:
        model(IDS)
    modules = [model.model.layers[0], model.model.layers[0].mlp]
    for module in modules:
        module.register_forward_hook(lambda module, args, out: (out, "router logits"))
    with capture(model) as seen:  # its hooks see the tuples, which are taken apart again after them
        for module in modules:
            module.register_forward_hook(lambda module, args, out: out[0])
        model(IDS)
    torch.testing.assert_close(seen.mlp, plain.mlp)
    torch.testing.assert_close(seen.residual, plain.residual)


def test_adapted_models_are_captured_with_their_adapter(make_model):
    model = add_lora(make_model("opt"), rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
        with capture(model) as seen:
            model(IDS)
        with model.disable_adapter(), capture(model) as plain:
            model(IDS)
    assert not torch.allclose(seen.mlp[0], plain.mlp[0], atol=1e-3)
