"""Laws and hand-written definitions for `repnoise.losses`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repnoise.errors import ConfigError, DataError
from repnoise.losses import (
    IGNORE_INDEX,
    ascent_term,
    gaussian_kernel_mmd,
    kl_to_reference,
    masked_cross_entropy,
    noise_term,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def literal_mmd(x, y, mul=2.0, num=5):
    """The paper's statistic written down directly, with every difference vector in memory; n = m."""
    n = len(x)
    z = torch.cat([x, y])
    distance = (z[None] - z[:, None]).square().sum(2)
    bandwidth = distance.detach().sum() / ((2 * n) ** 2 - 2 * n) / mul ** (num // 2)
    kernel = sum(torch.exp(-distance / (bandwidth * mul**i)) for i in range(num))
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


# --- MMD ---


@settings(max_examples=30)
@given(
    n=st.integers(1, 7),
    d=st.integers(1, 40),
    shift=st.floats(-50, 50),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 99),
)
def test_mmd_equals_the_literal_definition_with_gradients(n, d, shift, scale, seed):
    x, y = randn(n, d, seed=seed) * scale + shift, randn(n, d, seed=seed + 1)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = gaussian_kernel_mmd(ours, y), literal_mmd(theirs, y)
    assert a.item() == pytest.approx(b.item(), abs=1e-10)
    a.backward()
    b.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


def test_mmd_laws():
    x, y = randn(6, 20) + 1, randn(9, 20, seed=1)
    assert gaussian_kernel_mmd(x, x).item() == pytest.approx(0, abs=1e-14)
    assert gaussian_kernel_mmd(x, x[torch.randperm(6)]).item() == pytest.approx(0, abs=1e-14)
    for estimator in ("biased", "unbiased"):
        there = gaussian_kernel_mmd(x, y, estimator=estimator)
        back = gaussian_kernel_mmd(y, x, estimator=estimator)
        moved = gaussian_kernel_mmd(x + 7, y + 7, estimator=estimator)
        scaled = gaussian_kernel_mmd(3 * x, 3 * y, estimator=estimator)
        for other in (back, moved, scaled):
            assert other.item() == pytest.approx(there.item(), abs=1e-12)
    far = gaussian_kernel_mmd(x + 100, y).item()
    assert gaussian_kernel_mmd(x, y).item() < far < 10


def test_unbiased_equals_the_hand_written_u_statistic():
    x, y = randn(4, 5), randn(6, 5, seed=1) + 0.5
    z = torch.cat([x, y])
    mean = sum(((a - b) ** 2).sum() for a in z for b in z) / (10 * 9)

    def k(a, b):
        return sum(math.exp(-((a - b) ** 2).sum() / (mean * w)) for w in (0.25, 0.5, 1, 2, 4))

    xx = sum(k(x[i], x[j]) for i in range(4) for j in range(4) if i != j) / 12
    yy = sum(k(y[i], y[j]) for i in range(6) for j in range(6) if i != j) / 30
    xy = sum(k(a, b) for a in x for b in y) / 24
    expected = xx + yy - 2 * xy
    assert gaussian_kernel_mmd(x, y, estimator="unbiased").item() == pytest.approx(expected, abs=1e-12)
    given_width = gaussian_kernel_mmd(x, y, estimator="unbiased", bandwidth=mean)
    assert given_width.item() == pytest.approx(expected, abs=1e-12)


def test_unbiased_is_centred_and_biased_is_not():
    generator = torch.Generator().manual_seed(3)
    draws = torch.randn(400, 2, 8, 16, generator=generator, dtype=torch.float64)
    unbiased = torch.stack([gaussian_kernel_mmd(x, y, estimator="unbiased") for x, y in draws])
    biased = torch.stack([gaussian_kernel_mmd(x, y) for x, y in draws])
    standard_error = unbiased.std() / 400**0.5
    assert unbiased.mean().abs() < 4 * standard_error
    assert standard_error < 0.01
    assert (biased >= 0).all()
    assert biased.mean() > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_huge_shared_offset_does_not_cancel(dtype):
    x, y = (randn(8, 300) * 4 + 4000).to(dtype), (randn(8, 300, seed=1) * 8 + 4000).to(dtype)
    exact = literal_mmd(x.double(), y.double()).item()
    ours = gaussian_kernel_mmd(x, y)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact, abs=2e-5)
    z = torch.cat([x, y]).float()
    uncentred = z.square().sum(1)[:, None] + z.square().sum(1)[None] - 2 * z @ z.T
    exact_distance = torch.cdist(z.double(), z.double()).square()
    assert (uncentred - exact_distance).abs().max() > 100  # what centring avoids


def test_half_precision_statistics_survive_autocast():
    x, y = randn(6, 500, dtype=torch.float32), randn(6, 500, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gaussian_kernel_mmd(x, y)
    assert torch.equal(inside, gaussian_kernel_mmd(x, y))
    assert gaussian_kernel_mmd(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_equal_rows_give_zero_and_a_finite_gradient():
    x = torch.ones(3, 4, requires_grad=True)
    value = gaussian_kernel_mmd(x, torch.ones(3, 4))
    value.backward()
    assert value.item() == 0
    assert torch.equal(x.grad, torch.zeros(3, 4))


def test_mmd_input_errors():
    with pytest.raises(DataError, match="at least 2"):
        gaussian_kernel_mmd(randn(1, 3), randn(4, 3), estimator="unbiased")
    with pytest.raises(ConfigError, match="'median'"):
        gaussian_kernel_mmd(randn(2, 3), randn(4, 3), estimator="median")


# --- noise term ---

B, T, D, LAYERS = 3, 7, 4, 2
# one contiguous answer per row, of different lengths, ending where padding starts
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]])


def layers(seed: int = 0) -> list[torch.Tensor]:
    return [randn(B, T, D, seed=seed + 10 * i) for i in range(LAYERS)]


def test_sequence_form_is_the_papers_flattening():
    activations, noise = layers(), layers(5)
    kept = MASK[..., None]
    expected = sum(
        literal_mmd((a * kept).flatten(1), (e * kept).flatten(1)) for a, e in zip(activations, noise, strict=True)
    )
    value = noise_term(activations, MASK, noise=noise)
    assert value.item() == pytest.approx(expected.item() / LAYERS, abs=1e-12)


def test_token_form_takes_each_selected_token_as_a_sample():
    activations, noise, chosen = layers(), layers(5), MASK.bool()
    expected = sum(literal_mmd(a[chosen], e[chosen]) for a, e in zip(activations, noise, strict=True))
    value = noise_term(activations, MASK.double(), form="token", noise=noise)
    assert value.item() == pytest.approx(expected.item() / LAYERS, abs=1e-12)


@pytest.mark.parametrize("form", ["sequence", "token"])
def test_masked_tokens_get_exactly_zero_gradient_even_if_nan(form):
    activations = layers()
    for activation in activations:
        activation[~MASK.bool()] = math.nan
        activation.requires_grad_()
    value = noise_term(activations, MASK, form=form, generator=torch.Generator().manual_seed(0))
    value.backward()
    assert value.isfinite()
    for activation in activations:
        assert (activation.grad[~MASK.bool()] == 0).all()
        assert (activation.grad[MASK.bool()] != 0).all()


@pytest.mark.parametrize("form", ["sequence", "token"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_padding_side_and_amount_change_nothing(form, estimator):
    activations = layers()
    answers = [[a[row][MASK[row].bool()] for row in range(B)] for a in activations]

    def padded(before, after):
        """Rows shifted each by its own amount, answers as before."""
        out, mask = [], torch.zeros(B, T + 9)
        for layer in answers:
            block = torch.full((B, T + 9, D), 33.0, dtype=torch.float64)
            for row, answer in enumerate(layer):
                start = before[row] if after is None else T + 9 - after[row] - len(answer)
                block[row, start : start + len(answer)] = answer
                mask[row, start : start + len(answer)] = 1
            out.append(block)
        return out, mask

    def value(*batch):
        generator = torch.Generator().manual_seed(4)
        return noise_term(*batch, form=form, estimator=estimator, generator=generator).item()

    plain = value(activations, MASK)
    assert value(*padded([2, 2, 2], None)) == pytest.approx(plain, abs=1e-12)
    assert value(*padded([0, 5, 1], None)) == pytest.approx(plain, abs=1e-12)
    assert value(*padded(None, [0, 0, 0])) == pytest.approx(plain, abs=1e-12)


def test_noise_follows_the_generator():
    def value(seed):
        return noise_term(layers(), MASK, generator=torch.Generator().manual_seed(seed))

    assert value(1) == value(1)
    assert value(1) != value(2)
    half = noise_term([a.bfloat16() for a in layers()], MASK, generator=torch.Generator().manual_seed(1))
    assert half.dtype == torch.float32


def test_max_tokens_bounds_the_samples():
    activations = [a.requires_grad_() for a in layers()]
    generator = torch.Generator().manual_seed(0)
    noise_term(activations, MASK, form="token", max_tokens=4, generator=generator).backward()
    used = [(a.grad != 0).any(-1) for a in activations]
    assert all(int(u.sum()) == 4 for u in used)
    assert torch.equal(used[0], used[1])
    assert not (used[0] & ~MASK.bool()).any()
    roomy = noise_term(layers(), MASK, form="token", max_tokens=99, noise=layers(5))
    assert roomy == noise_term(layers(), MASK, form="token", noise=layers(5))


def test_gaussian_activations_score_less_than_others():
    mask = torch.ones(8, 16)
    generator = torch.Generator().manual_seed(0)
    gaussian = noise_term([randn(8, 16, 32)], mask, form="token", estimator="unbiased", generator=generator)
    other = noise_term([randn(8, 16, 32) * 0.1], mask, form="token", estimator="unbiased", generator=generator)
    assert abs(gaussian) < 0.1 < 0.5 < other


def test_noise_input_errors():
    with pytest.raises(DataError, match="selects no token"):
        noise_term(layers(), torch.zeros(B, T))
    with pytest.raises(DataError, match="1 tensors for 2 layers"):
        noise_term(layers(), MASK, noise=layers()[:1])
    with pytest.raises(DataError, match="at least one layer"):
        noise_term([], MASK)
    for wrong in ({"form": "tokens"}, {"max_tokens": 3}):
        with pytest.raises(ConfigError, match="form must be"):
            noise_term(layers(), MASK, **wrong)


# --- cross-entropy, KL, ascent ---

VOCABULARY = 11
LABELS = torch.tensor([[-100, -100, 4, 0, 2], [-100, 7, 7, -100, -100]])


def test_cross_entropy_is_the_shifted_token_mean():
    logits = randn(2, 5, VOCABULARY)
    log_p = logits.log_softmax(-1)
    wanted = [
        (0, 1, 4),
        (0, 2, 0),
        (0, 3, 2),
        (1, 0, 7),
        (1, 1, 7),
    ]  # token id 0 and the first answer token count
    expected = -sum(log_p[place] for place in wanted).item() / 5
    assert masked_cross_entropy(logits, LABELS).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_only_positions_before_an_answer_token_get_gradient(loss):
    logits = randn(2, 5, VOCABULARY).requires_grad_()
    reference = randn(2, 5, VOCABULARY, seed=1).requires_grad_()
    if loss == "cross_entropy":
        masked_cross_entropy(logits, LABELS).backward()
    else:
        kl_to_reference(logits, reference, LABELS).backward()
    touched = (logits.grad != 0).any(-1)
    assert touched.tolist() == [[False, True, True, True, False], [True, True, False, False, False]]
    assert reference.grad is None


def test_padding_changes_neither_loss():
    logits, reference = randn(2, 5, VOCABULARY), randn(2, 5, VOCABULARY, seed=1)
    for side in ((0, 0, 3, 0), (0, 0, 0, 4)):  # left by 3, right by 4
        pad = torch.nn.functional.pad
        labels = pad(LABELS, side[2:], value=IGNORE_INDEX)
        wide, wide_reference = pad(logits, side, value=5.0), pad(reference, side, value=-5.0)
        plain = masked_cross_entropy(logits, LABELS).item()
        assert masked_cross_entropy(wide, labels).item() == pytest.approx(plain, abs=1e-14)
        kl = kl_to_reference(logits, reference, LABELS).item()
        assert kl_to_reference(wide, wide_reference, labels).item() == pytest.approx(kl, abs=1e-14)


def test_denominator_makes_accumulation_exact():
    logits, reference = randn(2, 5, VOCABULARY), randn(2, 5, VOCABULARY, seed=1)
    rows = [slice(0, 1), slice(1, 2)]
    parts = [masked_cross_entropy(logits[r], LABELS[r], denominator=torch.tensor(5)) for r in rows]
    assert sum(parts).item() == pytest.approx(masked_cross_entropy(logits, LABELS).item(), abs=1e-14)
    parts = [kl_to_reference(logits[r], reference[r], LABELS[r], denominator=5) for r in rows]
    assert sum(parts).item() == pytest.approx(kl_to_reference(logits, reference, LABELS).item(), abs=1e-14)


def test_kl_laws():
    logits, reference = randn(2, 5, VOCABULARY), randn(2, 5, VOCABULARY, seed=1)
    assert kl_to_reference(logits, logits + 3, LABELS).item() == pytest.approx(0, abs=1e-14)
    p, q = reference.softmax(-1), logits.softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1)
    expected = (by_hand[0, 1:4].sum() + by_hand[1, :2].sum()) / 5
    value = kl_to_reference(logits, reference, LABELS)
    assert value.item() == pytest.approx(expected.item(), abs=1e-14)
    assert value > 0


def test_bfloat16_logits_give_float32_losses():
    logits, reference = randn(2, 5, VOCABULARY).bfloat16(), randn(2, 5, VOCABULARY, seed=1).bfloat16()
    for value, exact in (
        (masked_cross_entropy(logits, LABELS), masked_cross_entropy(logits.double(), LABELS)),
        (
            kl_to_reference(logits, reference, LABELS),
            kl_to_reference(logits.double(), reference.double(), LABELS),
        ),
    ):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_no_answer_token_is_an_error_and_not_a_zero():
    labels = torch.full((2, 5), IGNORE_INDEX)
    labels[:, 0] = 3  # nothing predicts the first token
    with pytest.raises(DataError, match="No token is left"):
        masked_cross_entropy(randn(2, 5, VOCABULARY), labels)
    with pytest.raises(DataError, match="No token is left"):
        kl_to_reference(randn(2, 5, VOCABULARY), randn(2, 5, VOCABULARY), labels)


def test_ascent_term():
    mean = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert ascent_term(mean).item() == pytest.approx(-math.log(4))
    assert ascent_term(mean, offset=0.0).item() == pytest.approx(-math.log(3))
    ascent_term(mean).backward()
    assert mean.grad.item() == pytest.approx(-1 / 4)  # descending this loss raises the cross-entropy
