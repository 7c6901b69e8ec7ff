"""The anatomy of every family, judged by the model's own logits in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import LAYERS, TINY, VOCAB, WIDTH
from repnoise.errors import ModelError
from repnoise.models import FAMILIES, Family, add_lora, anatomy, capture, check_anatomy, register_family, unwrap

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
# families whose block adds the MLP output as it is, and nothing after it, to the residual stream
MLP_IS_ADDED_AS_IT_IS = {
    *("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "gpt_neox_sequential", "opt"),
    *("phi", "phi3", "smollm3", "cohere", "mixtral", "qwen3_moe"),
}


@pytest.fixture
def families():
    before = dict(FAMILIES)
    yield FAMILIES
    FAMILIES.clear()
    FAMILIES.update(before)


def test_every_registered_family_has_a_tiny_model(make_model):
    assert {make_model(name).config.model_type for name in TINY} == set(FAMILIES)


def test_logits_of_the_last_residual_are_the_models_own(family, make_model):
    model = make_model(family, dtype=torch.float64)
    parts = anatomy(model)
    with torch.no_grad(), capture(model) as seen:
        output = model(IDS, output_hidden_states=True)

    assert len(parts.layers) == len(parts.mlps) == LAYERS
    torch.testing.assert_close(parts.logits(seen.residual[-1]), output.logits, rtol=1e-10, atol=1e-10)
    # and no other layer gives them, so the test can fail
    assert not torch.allclose(parts.logits(seen.residual[-2]), output.logits, atol=1e-3)


def test_residuals_are_the_hidden_states_before_the_final_norm(family, make_model):
    model = make_model(family, dtype=torch.float64)
    parts = anatomy(model)
    with torch.no_grad(), capture(model) as seen:
        hidden = model(IDS, output_hidden_states=True).hidden_states
    assert len(seen.residual) == len(hidden) == LAYERS + 1
    for ours, theirs in zip(seen.residual[:-1], hidden[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    last = seen.residual[-1]
    for module in parts.final:
        last = module(last)
    if family != "opt_post_norm":  # transformers reports this one before project_out
        torch.testing.assert_close(last, hidden[-1], rtol=0, atol=0)
    assert [tuple(x.shape) for x in seen.mlp] == [(2, 9, WIDTH)] * LAYERS


def test_the_first_residual_is_the_embedding_as_the_model_scales_it(family, make_model):
    model = make_model(family, dtype=torch.float64)
    with torch.no_grad(), capture(model, mlp=False) as seen:
        model(IDS)
    table = model.get_input_embeddings().weight
    scale = {"gemma2": WIDTH**0.5, "gemma3_text": WIDTH**0.5, "granite": 2.0}.get(family, 1.0)
    expected = table[IDS] * scale
    if family == "gpt2":
        expected = expected + model.transformer.wpe.weight[: IDS.shape[1]]
    if family.startswith("opt"):
        decoder = model.model.decoder
        if decoder.project_in is not None:
            expected = decoder.project_in(expected)
        expected = expected + decoder.embed_positions.weight[2 : 2 + IDS.shape[1]]
    torch.testing.assert_close(seen.residual[0], expected.detach(), rtol=1e-10, atol=1e-10)


def test_removing_the_mlp_output_changes_the_residual_by_exactly_it(family, make_model):
    """Residual law: with the MLP silenced, a block's output lacks the MLP output and nothing else."""
    model = make_model(family, dtype=torch.float64)
    with torch.no_grad():
        with capture(model) as seen:
            model(IDS)
        handle = anatomy(model).mlps[-1].register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        with capture(model) as silenced:
            model(IDS)
        handle.remove()
    difference = seen.residual[-1] - silenced.residual[-1]
    assert difference.abs().max() > 1e-3
    if family in MLP_IS_ADDED_AS_IT_IS:
        torch.testing.assert_close(difference, seen.mlp[-1], rtol=1e-6, atol=1e-6)
    elif family == "granite":
        torch.testing.assert_close(difference, seen.mlp[-1] * 0.5, rtol=1e-6, atol=1e-6)
    else:  # a norm stands between the MLP and the residual stream, or after the sum
        assert family in {"gemma2", "gemma3_text", "olmo2", "opt_post_norm"}


def test_scale_and_softcap_come_from_the_config(make_model):
    assert anatomy(make_model("cohere")).logit_scale == 0.25
    assert anatomy(make_model("granite")).logit_scale == 0.25  # divided by 4
    assert anatomy(make_model("gemma2")).softcap == 3.0
    assert anatomy(make_model("gemma3_text")).softcap is None
    assert anatomy(make_model("gemma3_text", final_logit_softcapping=5.0)).softcap == 5.0
    assert len(anatomy(make_model("opt_post_norm")).final) == 1  # project_out alone, no norm
    assert len(anatomy(make_model("opt")).final) == 1  # the norm alone


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch.compile
def test_wrapped_models_are_unwrapped(make_model):
    model = make_model("llama")
    layers = anatomy(model).layers
    wrapped = nn.DataParallel(torch.compile(model))
    assert unwrap(wrapped) is model
    assert anatomy(wrapped).layers == layers
    adapted = add_lora(model, rank=2)
    assert unwrap(nn.DataParallel(adapted)) is model
    assert anatomy(adapted).layers == layers


def test_the_mlp_of_an_adapted_opt_is_the_adapted_layer(make_model):
    adapted = add_lora(make_model("opt"), rank=2)
    assert all(hasattr(mlp, "lora_A") for mlp in anatomy(adapted).mlps)


def test_unknown_family_says_what_to_set(make_model, families):
    model = make_model("llama")
    del families["llama"]
    with pytest.raises(ModelError) as caught:
        anatomy(model)
    message = str(caught.value)
    assert all(word in message for word in ("'llama'", "register_family", "layers=", "mlp=", "final=", "head="))

    register_family("llama", Family())  # what the message says
    assert check_anatomy(model).family == "llama"


def test_registering_twice_needs_replace(families):
    with pytest.raises(ModelError, match="replace=True"):
        register_family("llama", Family())
    register_family("llama", Family(mlp="mlp.down_proj"), replace=True)
    assert families["llama"].mlp == "mlp.down_proj"


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (Family(mlp="ffn"), ("mlp", "'ffn'", "self_attn")),
        (Family(layers="model.blocks"), ("layers", "'blocks'", "embed_tokens")),
        (Family(head="output"), ("head", "'output'", "lm_head")),
        (Family(softcap="cap"), ("'cap'", "config value")),
    ],
)
def test_a_wrong_row_names_the_field_and_what_is_there(row, names, make_model, families):
    register_family("llama", row, replace=True)
    with pytest.raises(ModelError) as caught:
        anatomy(make_model("llama"))
    assert all(name in str(caught.value) for name in names)


def test_check_anatomy_rejects_a_row_that_forgets_something(make_model, families):
    assert check_anatomy(make_model("cohere")).family == "cohere"
    register_family("cohere", Family(), replace=True)
    with pytest.raises(ModelError, match="relative difference"):
        check_anatomy(make_model("cohere"))
    register_family("llama", Family(mlp="mlp.gate_proj"), replace=True)
    with pytest.raises(ModelError, match="differ in shape"):
        check_anatomy(make_model("llama"))


def test_check_anatomy_leaves_the_mode_of_every_module_alone(make_model):
    model = make_model("gpt2").train()
    model.lm_head.eval()
    check_anatomy(model)
    assert model.training
    assert not model.lm_head.training


def test_something_else_is_not_a_model():
    with pytest.raises(ModelError, match="Linear"):
        anatomy(nn.Linear(2, 2))
    odd = nn.Linear(2, 2)
    odd.config = SimpleNamespace(model_type="bert")
    with pytest.raises(ModelError, match="bert"):
        anatomy(odd)
