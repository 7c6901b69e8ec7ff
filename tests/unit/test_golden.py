"""`official_repnoise_loss` against the values that the released code itself produced (float64)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from repnoise.errors import DataError, ModelError
from repnoise.losses import official_repnoise_loss

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))


class Case:
    def __init__(self, name: str):
        self.expected = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.model = LlamaForCausalLM(LlamaConfig(**self.expected["config"])).double()
        weights = self.part("weight.")
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        if self.expected["config"]["tie_word_embeddings"]:
            assert self.model.lm_head.weight is self.model.model.embed_tokens.weight

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: v.double() for k, v in self.tensors.items() if k.startswith(prefix)}

    def side(self, side: str) -> dict[str, torch.Tensor]:
        return {key: self.tensors[f"{side}_{key}"] for key in ("input_ids", "attention_mask")}

    def loss(self, **changes):
        noise = [value for _, value in sorted(self.part("noise.").items())]
        arguments = {"alpha": self.expected["alpha"], "beta": self.expected["beta"], "noise": noise} | changes
        return official_repnoise_loss(self.model, self.side("harmful"), self.side("harmless"), **arguments)


def hooks(model: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(request.param)


def test_there_are_three_golden_cases():
    assert CASES == ["llama-padded", "llama-plain", "llama-token-id-0"]


def test_terms(case):
    terms = case.loss()
    names = {
        "loss": "loss",
        "stability": "stability_ce",
        "noise": "noise_mmd_mean",
        "ascent": "ascent_log_argument",
    }
    assert set(terms) == set(names)
    for ours, theirs in names.items():
        assert terms[ours].item() == pytest.approx(case.expected[theirs], rel=1e-12, abs=1e-9), ours


def test_every_gradient(case):
    case.loss()["loss"].backward()
    expected = case.part("grad.")
    ours = {name: parameter.grad for name, parameter in case.model.named_parameters()}
    assert set(ours) == set(expected)
    for name, gradient in ours.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-7, f"{name}: {error:.1e}"
    norm = torch.stack([gradient.norm() for gradient in ours.values()]).norm().item()
    assert norm == pytest.approx(case.expected["grad_norm"], rel=1e-7)


def test_no_hook_is_left(case):
    before = hooks(case.model)
    case.loss()
    case.loss()
    assert hooks(case.model) == before


@pytest.mark.parametrize("part", ["mlp", "lm_head"])
def test_no_hook_is_left_when_the_forward_raises(part, monkeypatch):
    case = Case("llama-plain")
    broken = case.model.model.layers[1].mlp if part == "mlp" else case.model.lm_head

    def fail(*_):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(broken, "forward", fail)
    before = hooks(case.model)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        case.loss()
    assert hooks(case.model) == before


def test_weights_scale_their_own_term():
    case = Case("llama-plain")
    terms = case.loss(alpha=0.0, beta=0.0)
    assert terms["loss"].item() == pytest.approx(terms["stability"].item(), abs=1e-12)
    terms = case.loss(alpha=0.0, beta=1.0)
    assert terms["loss"].item() == pytest.approx((terms["stability"] + terms["noise"]).item(), abs=1e-12)


def test_noise_is_drawn_anew_when_not_given():
    case = Case("llama-plain")
    torch.manual_seed(0)
    first, second = case.loss(noise=None), case.loss(noise=None)
    torch.manual_seed(0)
    again = case.loss(noise=None)
    assert first["noise"] != second["noise"]
    assert first["noise"] == again["noise"]
    assert first["ascent"] == second["ascent"]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")  # its successor is 5.x only
def test_gradient_checkpointing_changes_nothing():
    case = Case("llama-plain")
    case.loss()["loss"].backward()
    plain = {name: parameter.grad.clone() for name, parameter in case.model.named_parameters()}
    case.model.zero_grad()
    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    case.model.train()
    case.loss()["loss"].backward()
    for name, parameter in case.model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-10, atol=1e-12)


def test_wrong_input_is_named():
    case = Case("llama-plain")
    with pytest.raises(DataError, match="2 tensors for 3 layers"):
        case.loss(noise=[torch.zeros(4, 16, 32)] * 2)
    same = case.side("harmful")
    with pytest.raises(DataError, match="are equal"):
        official_repnoise_loss(case.model, same, same, alpha=1.0, beta=1.0)
    short = {key: value[:, :8] for key, value in same.items()}
    with pytest.raises(DataError, match="pad both"):
        official_repnoise_loss(case.model, same, short, alpha=1.0, beta=1.0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=97))
    with pytest.raises(ModelError, match="corrected"):
        official_repnoise_loss(gpt2, same, case.side("harmless"), alpha=1.0, beta=1.0)
