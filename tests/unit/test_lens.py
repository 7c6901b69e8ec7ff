"""`lens_cross_entropy` against its two-line definition: values, gradients, rounding, memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from repnoise.errors import ConfigError, DataError
from repnoise.lens import CHUNK_BYTES, _default_chunk, choose_layers, lens_cross_entropy
from repnoise.losses import masked_cross_entropy
from repnoise.models.structure import Anatomy

B, T, D, V, K = 3, 8, 12, 23, 4


def naive_lens_cross_entropy(hidden, labels, anatomy, denominator=None):
    """The definition."""
    values = torch.stack([masked_cross_entropy(anatomy.logits(h), labels, denominator=denominator) for h in hidden])
    return values.mean(), values.detach()


class RMSNorm(nn.Module):
    """As in Llama: statistics in float32, so the weight meets the input's dtype again."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def parts(final="rms", bias=False, width=D, vocabulary=V, **more) -> Anatomy:
    norms = {"rms": [RMSNorm(width)], "layer": [nn.LayerNorm(width)], "none": []}
    norms["two"] = [nn.LayerNorm(width), nn.Linear(width, width, bias=False)]  # OPT: norm, then project_out
    head = nn.Linear(width, vocabulary, bias=bias)
    made = Anatomy(family="test", layers=(), mlps=(), final=tuple(norms[final]), head=head, **more)
    for parameter in parameters(made).values():
        nn.init.normal_(parameter, 0.3 if parameter.dim() == 1 else 0.0, 0.5)
    return made


def parameters(anatomy: Anatomy) -> dict[str, nn.Parameter]:
    return dict(nn.ModuleList([*anatomy.final, anatomy.head]).named_parameters())


def to(anatomy: Anatomy, dtype: torch.dtype) -> Anatomy:
    nn.ModuleList([*anatomy.final, anatomy.head]).to(dtype)
    return anatomy


def streams(dtype=torch.float64, width=D, batch=B, length=T, count=K) -> list[Tensor]:
    return [(torch.randn(batch, length, width) * (k + 1)).to(dtype).requires_grad_() for k in range(count)]


def answers(vocabulary=V, batch=B, length=T) -> Tensor:
    labels = torch.randint(vocabulary, (batch, length))
    for row in range(batch):
        labels[row, : 2 + row % 3] = -100
    labels[0, -2:] = -100
    labels[0, 3] = 0
    return labels


def gradients(function, hidden, labels, anatomy, outer=lambda mean: mean, **arguments):
    wanted = [h for h in hidden if h.requires_grad] + [p for p in parameters(anatomy).values() if p.requires_grad]
    mean, values = function(hidden, labels, anatomy, **arguments)
    return mean.detach(), values, torch.autograd.grad(outer(mean), wanted)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("chunk", [None, 1, 5, 1000])
@pytest.mark.parametrize(
    "kind",
    [
        {"final": "rms"},
        {"final": "layer", "bias": True},
        {"final": "two"},
        {"final": "none"},
        {"softcap": 3.0},
        {"logit_scale": 0.25, "softcap": 2.0, "bias": True},
    ],
    ids=str,
)
def test_equals_the_definition(kind, chunk):
    anatomy, hidden, labels = to(parts(**kind), torch.float64), streams(), answers()

    def outer(mean):
        return -2.0 * torch.log(mean + 1)

    mean, values, ours = gradients(lens_cross_entropy, hidden, labels, anatomy, outer, chunk_tokens=chunk)
    naive_mean, naive_values, theirs = gradients(naive_lens_cross_entropy, hidden, labels, anatomy, outer)
    torch.testing.assert_close(mean, naive_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(values, naive_values, rtol=1e-12, atol=0)
    assert not values.requires_grad
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_tied_head_adds_both_of_its_gradients():
    anatomy = to(parts(), torch.float64)
    embedding = nn.Embedding(V, D, dtype=torch.float64)
    embedding.weight = anatomy.head.weight
    ids, labels = torch.randint(V, (B, T)), answers()

    def gradient(function):
        embedding.weight.grad = None
        hidden = [embedding(ids), embedding(ids).tanh()]
        function(hidden, labels, anatomy)[0].backward()
        return embedding.weight.grad

    expected = gradient(naive_lens_cross_entropy)
    torch.testing.assert_close(gradient(lens_cross_entropy), expected, rtol=1e-12, atol=1e-14)
    embedding.weight.grad = None
    lens_cross_entropy([embedding(ids).detach()], labels, anatomy)[0].backward()
    assert not torch.allclose(embedding.weight.grad, expected)


def test_denominator_and_gradient_accumulation():
    anatomy, hidden, labels = to(parts(), torch.float64), streams(), answers()
    count = (labels[:, 1:] != -100).sum()
    mean, values, whole = gradients(lens_cross_entropy, hidden, labels, anatomy)
    pieces = []
    for row in range(B):
        piece = [h[row : row + 1] for h in hidden]
        pieces.append(lens_cross_entropy(piece, labels[row : row + 1], anatomy, denominator=count))
    torch.testing.assert_close(sum(m for m, _ in pieces), mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(v for _, v in pieces), values, rtol=1e-12, atol=0)
    accumulated = torch.autograd.grad(sum(m for m, _ in pieces), [*hidden, *parameters(anatomy).values()])
    for a, b in zip(accumulated, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_only_positions_before_an_answer_token_get_gradient():
    anatomy, hidden, labels = to(parts(), torch.float64), streams(), answers()
    gradient = gradients(lens_cross_entropy, hidden, labels, anatomy)[2][0]
    kept = nn.functional.pad(labels[:, 1:] != -100, (0, 1), value=False)
    assert torch.equal((gradient != 0).any(-1), kept)


def test_padding_changes_nothing():
    anatomy, hidden, labels = to(parts(), torch.float64), streams(), answers()
    mean, values, _ = gradients(lens_cross_entropy, hidden, labels, anatomy)
    pad = nn.functional.pad
    for left, right in ((3, 0), (0, 4)):
        wide = [pad(h, (0, 0, left, right), value=9.0) for h in hidden]
        padded = lens_cross_entropy(wide, pad(labels, (left, right), value=-100), anatomy)
        torch.testing.assert_close(padded[0].detach(), mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(padded[1], values, rtol=1e-12, atol=0)


# --- what is not asked for is not computed ---


@pytest.mark.parametrize("frozen", ["head", "final", "hidden", "one layer"])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(frozen):
    anatomy, hidden, labels = to(parts(bias=True), torch.float64), streams(), answers()
    if frozen == "head":
        anatomy.head.requires_grad_(False)
    elif frozen == "final":
        anatomy.final[0].requires_grad_(False)
    else:
        for h in hidden[: 1 if frozen == "one layer" else K]:
            h.requires_grad_(False)
    ours = gradients(lens_cross_entropy, hidden, labels, anatomy)[2]
    for a, b in zip(ours, gradients(naive_lens_cross_entropy, hidden, labels, anatomy)[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_without_gradients_no_gradient_work_is_done(monkeypatch):
    anatomy, hidden, labels = to(parts(), torch.float64), streams(), answers()
    expected = gradients(lens_cross_entropy, hidden, labels, anatomy)

    def forbidden(*_, **__):
        raise AssertionError("asked for a gradient")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    with pytest.raises(AssertionError, match="asked for a gradient"):
        lens_cross_entropy(hidden, labels, anatomy)
    with torch.no_grad():
        mean, values = lens_cross_entropy(hidden, labels, anatomy)
    with torch.inference_mode():
        assert torch.equal(lens_cross_entropy(hidden, labels, anatomy)[1], values)
    assert not mean.requires_grad
    assert torch.equal(mean, expected[0])
    assert torch.equal(values, expected[1])
    for parameter in parameters(anatomy).values():
        parameter.requires_grad_(False)
    assert not lens_cross_entropy([h.detach() for h in hidden], labels, anatomy)[0].requires_grad


def test_the_model_is_left_as_it_was():
    anatomy, hidden, labels = to(parts(), torch.float64), streams(), answers()
    before = parameters(anatomy)
    lens_cross_entropy(hidden, labels, anatomy)
    after = parameters(anatomy)
    assert all(after[name] is parameter and parameter.grad is None for name, parameter in before.items())
    with pytest.raises(RuntimeError, match=r"size|shape"):
        lens_cross_entropy([h[..., :-1] for h in hidden], labels, anatomy)
    assert all(parameters(anatomy)[name] is parameter for name, parameter in before.items())


# --- precision ---


def relative_errors(tensors, exact) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(tensors, exact, strict=True)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("outer", ["mean", "log"])
def test_bfloat16_error_is_at_most_that_of_the_definition(seed, outer):
    torch.manual_seed(seed)
    size = {"width": 64, "batch": 8, "length": 24}
    anatomy = to(parts(width=64, vocabulary=211), torch.bfloat16)
    hidden, labels = streams(torch.bfloat16, **size), answers(211, 8, 24)
    outside = {"mean": lambda mean: mean, "log": lambda mean: -torch.log(mean + 1)}[outer]

    ours = gradients(lens_cross_entropy, hidden, labels, anatomy, outside, chunk_tokens=32)
    naive = gradients(naive_lens_cross_entropy, hidden, labels, anatomy, outside)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert [g.dtype for g in ours[2]] == [torch.bfloat16] * len(naive[2])
    hidden = [h.detach().double().requires_grad_() for h in hidden]
    exact = gradients(naive_lens_cross_entropy, hidden, labels, to(anatomy, torch.float64), outside)

    assert abs(ours[0] - exact[0]) <= 1.05 * abs(naive[0] - exact[0]) + 1e-5
    # the last product with the outer gradient rounds once more, unless that gradient is 1
    factor = 1.05 if outer == "mean" else 1.2
    ours_errors, naive_errors = relative_errors(ours[2], exact[2]), relative_errors(naive[2], exact[2])
    for a, b in zip(ours_errors, naive_errors, strict=True):
        assert a <= factor * b + 1e-6
    assert max(ours_errors) < 0.02


def test_parameter_gradients_are_summed_in_float32():
    """Many chunks: bfloat16 sums would lose what each adds."""
    anatomy, labels = to(parts(width=16, vocabulary=31), torch.bfloat16), answers(31, 16, 65)
    hidden = streams(torch.bfloat16, width=16, batch=16, length=65)
    fine = gradients(lens_cross_entropy, hidden, labels, anatomy, chunk_tokens=2)[2]
    naive = gradients(naive_lens_cross_entropy, hidden, labels, anatomy)[2]
    hidden = [h.detach().double().requires_grad_() for h in hidden]
    exact = gradients(naive_lens_cross_entropy, hidden, labels, to(anatomy, torch.float64))[2]
    for a, b in zip(relative_errors(fine[K:], exact[K:]), relative_errors(naive[K:], exact[K:]), strict=True):
        assert a <= 1.05 * b
        assert a < 0.005


def test_autocast():
    anatomy, hidden, labels = parts(), streams(torch.float32), answers()
    exact = gradients(naive_lens_cross_entropy, hidden, labels, anatomy)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, values, ours = gradients(lens_cross_entropy, hidden, labels, anatomy, chunk_tokens=5)
        naive_mean, _, naive = gradients(naive_lens_cross_entropy, hidden, labels, anatomy)
    assert mean.dtype == values.dtype == torch.float32
    torch.testing.assert_close(mean, naive_mean, rtol=1e-5, atol=1e-6)
    ours_errors = relative_errors(ours, [e.double() for e in exact])
    for a, b in zip(ours_errors, relative_errors(naive, [e.double() for e in exact]), strict=True):
        assert 0 < a <= 1.2 * b + 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    anatomy, labels = to(parts(), torch.float64), answers()
    blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(K)).double()
    start = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)

    def gradient(function, checkpointed):
        hidden, residuals = start, [start]
        for block in blocks:
            hidden = checkpoint(block, hidden, use_reentrant=reentrant) if checkpointed else block(hidden)
            residuals.append(hidden)
        blocks.zero_grad()
        function(residuals, labels, anatomy)[0].backward()
        return [block.weight.grad for block in blocks]

    for a, b in zip(gradient(lens_cross_entropy, True), gradient(naive_lens_cross_entropy, False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# --- memory ---


class LiveLogits(TorchDispatchMode):
    """Sums the bytes of tensors with a vocabulary axis that are alive together; keeps the peak."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.peak, self.rows = vocabulary, 0, 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == self.vocabulary:
                if tensor.shape == (D, self.vocabulary):  # the head's weight, transposed
                    continue
                self._watch(tensor)
        return out

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        if key and key not in self._live:
            self._live[key] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, key, None)
            self.peak = max(self.peak, sum(self._live.values()))


def peak(function, layers: int, chunk: int | None = None, vocabulary: int = 997) -> LiveLogits:
    anatomy, labels = parts(vocabulary=vocabulary), answers(vocabulary, 4, 32)
    hidden = streams(torch.float32, batch=4, length=32, count=layers)
    with LiveLogits(vocabulary) as seen:
        mean, _ = function(hidden, labels, anatomy, **({} if chunk is None else {"chunk_tokens": chunk}))
        mean.backward()
    return seen


def test_never_more_than_one_chunk_of_logits_is_alive():
    one_chunk = 8 * 997 * 4
    few, many = (peak(lens_cross_entropy, layers, chunk=8) for layers in (2, 9))
    assert few.rows == many.rows == 8
    assert many.peak == few.peak  # does not grow with the layers
    assert one_chunk <= many.peak <= 5 * one_chunk  # logits, log-softmax, gradients of the two
    naive = peak(naive_lens_cross_entropy, 9)
    assert naive.peak > 50 * one_chunk  # the measuring works


def test_nothing_of_vocabulary_size_is_saved_for_backward():
    anatomy, hidden, labels = parts(vocabulary=997), streams(torch.float32), answers(997)
    mean, _ = lens_cross_entropy(hidden, labels, anatomy, chunk_tokens=4)
    saved = mean.grad_fn.saved_tensors
    tokens = int((labels[:, 1:] != -100).sum())
    assert [tuple(t.shape) for t in saved] == [(K * tokens, D), (D,), (997, D)]


def test_default_chunk_is_16_mebibytes_or_a_quarter_of_the_heads_gradient():
    with torch.device("meta"):
        small, large = nn.Linear(512, 32_000, bias=False), nn.Linear(8192, 128_000, bias=False)
    assert _default_chunk(small) == CHUNK_BYTES // (4 * 32_000) == 131
    assert _default_chunk(large) == 8192 // 4
    assert _default_chunk(large.requires_grad_(False)) == CHUNK_BYTES // (4 * 128_000) == 32


# --- errors and choosing layers ---


def test_input_errors():
    anatomy, hidden = to(parts(), torch.float64), streams()
    with pytest.raises(DataError, match="No token is left"):
        lens_cross_entropy(hidden, torch.full((B, T), -100), anatomy)
    with pytest.raises(DataError, match="no hidden states"):
        lens_cross_entropy([], answers(), anatomy)
    for k in (0, 6):
        with pytest.raises(ConfigError, match=f"1 to 5 layers of this model, got {k}"):
            choose_layers(5, k)


def test_choose_layers_is_uniform_without_replacement():
    generator = torch.Generator().manual_seed(0)
    draws = [choose_layers(6, 2, generator) for _ in range(3000)]
    assert all(0 <= a < b < 6 for a, b in draws)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=6)
    assert (counts - 1000).abs().max() < 5 * (3000 * 1 / 3 * 2 / 3) ** 0.5
    assert len({tuple(draw) for draw in draws}) == 15
    assert choose_layers(4, 4) == [0, 1, 2, 3]
    again = torch.Generator().manual_seed(0)
    assert [choose_layers(6, 2, again) for _ in range(5)] == draws[:5]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_last_layer_is_the_models_own_loss(family):
    import transformers

    from repnoise.models.anatomy import anatomy
    from repnoise.models.capture import capture

    config = {
        "llama": lambda: transformers.LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        ),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2),
        "gemma2": lambda: transformers.Gemma2Config(
            vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0,
        ),
    }[family]()  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    ids, labels = torch.randint(61, (B, T)), answers(61)
    with capture(model, mlp=False) as seen:
        loss = model(input_ids=ids, labels=labels).loss
    wanted = list(model.parameters())
    mean, _ = lens_cross_entropy(seen.residual[-1:], labels, anatomy(model), chunk_tokens=3)
    ours = torch.autograd.grad(mean, wanted, retain_graph=True)
    torch.testing.assert_close(mean, loss, rtol=1e-6, atol=0, check_dtype=False)
    assert len(lens_cross_entropy(seen.residual, labels, anatomy(model))[1]) == 3
    exact = masked_cross_entropy(anatomy(model).logits(seen.residual[-1]), labels)
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=0)
    for a, b in zip(ours, torch.autograd.grad(exact, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)  # Gemma's norm is float32 in any model
