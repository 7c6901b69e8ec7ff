"""The parts of the RepNoise loss as pure functions of tensors.

Sources: "the paper" is Rosati et al., "Representation Noising" (NeurIPS 2024, arXiv 2405.14577); "the
released code" is the authors' `loss.py`. Weights follow Algorithm 1 of the paper: alpha weights ascent, beta
weights noise (its eqs. 4-5 swap the letters).

Conventions: B sequences, T positions, d hidden size, V vocabulary, L layers. Whatever the input's precision
and whatever autocast says, statistics are taken in float32 (float64 input stays float64).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ConfigError, DataError, ModelError

IGNORE_INDEX = -100  # the label that Hugging Face collators give to positions that are not trained

Estimator = Literal["biased", "unbiased"]


def precise(x: Tensor) -> Tensor:
    """`x` in the dtype for statistics: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


# --- cross-entropy and KL ---


class AnswerTokens(NamedTuple):
    """The trained tokens of a batch: where each is predicted from, and what it is."""

    source: Tensor  # (N,) int64, index into the flattened (B * T) positions: the one *before* the token
    target: Tensor  # (N,) int64, the token itself

    def select(self, states: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...): the rows that predict an answer token; the others get no gradient."""
        return states.flatten(0, 1).index_select(0, self.source.to(states.device))


def answer_tokens(labels: Tensor) -> AnswerTokens:
    """The tokens t >= 1 with `labels[b, t] != -100`, each predicted from t - 1 (as in transformers).

    Token id 0 is a token like any other (the released code drops it), and the first token in which a pair
    differs is trained (the released code never trains it).

    Args:
        labels: (B, T) int64.
    """
    keep = labels[:, 1:] != IGNORE_INDEX
    row, column = keep.nonzero(as_tuple=True)
    if row.numel() == 0:
        raise DataError(
            f"No token is left to train in a batch of shape {tuple(labels.shape)}: after the first column "
            f"every label is {IGNORE_INDEX}. Check that answers are not empty or truncated away."
        )
    return AnswerTokens(row * labels.shape[1] + column, labels[row, column + 1])


def masked_cross_entropy(logits: Tensor, labels: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """mean over answer tokens of -log softmax(logits)[token]   (paper eqs. 3-4)

    Args:
        logits: (B, T, V), any float dtype; only the N rows that are needed are converted.
        labels: (B, T) int64, unshifted, -100 = not trained.
        denominator: the sum is divided by it instead of by N. With the answer tokens of a whole accumulated
            batch, the sum over micro-batches is exactly the loss of the big batch.

    Returns:
        () float32 (float64 for float64).
    """
    tokens = answer_tokens(labels)
    total = nn.functional.cross_entropy(
        precise(tokens.select(logits)), tokens.target.to(logits.device), reduction="sum"
    )
    return total / (tokens.target.numel() if denominator is None else denominator)


def kl_to_reference(
    logits: Tensor, reference_logits: Tensor, labels: Tensor, *, denominator: Tensor | float | None = None
) -> Tensor:
    """mean over answer tokens of KL(reference || model) = sum_v p_ref(v) (log p_ref(v) - log p(v))

    Not in the paper: an alternative stability term that keeps the whole distribution of a frozen original
    model, and so cannot overfit a small retain set in the way that cross-entropy does.

    Args:
        logits: (B, T, V) of the model that is trained.
        reference_logits: (B, T, V) of the frozen model; gets no gradient.
        labels: (B, T) int64; says which positions count, as in `masked_cross_entropy`. The tokens themselves
            are not used.
        denominator: as in `masked_cross_entropy`.

    Returns:
        () float32 (float64 for float64), >= 0 up to rounding.
    """
    tokens = answer_tokens(labels)
    model = precise(tokens.select(logits)).log_softmax(-1)
    reference = precise(tokens.select(reference_logits.detach())).log_softmax(-1)
    total = nn.functional.kl_div(model, reference, reduction="sum", log_target=True)
    return total / (tokens.target.numel() if denominator is None else denominator)


def ascent_term(mean_cross_entropy: Tensor, *, offset: float = 1.0) -> Tensor:
    """-log(mean_cross_entropy + offset), to be weighted by alpha   (paper Algorithm 1, line 12)

    Args:
        mean_cross_entropy: () mean over layers of the harmful cross-entropy through the lens, see
            `lens.lens_cross_entropy`.
        offset: 1 damps the gradient while the loss is small and keeps the log >= 0, as the released code
            does; 0 is Algorithm 1 to the letter.

    Where we differ: each residual stream 0..L counts once and is normed once. The released code norms the
    last one twice, adds the final logits on top, and divides L + 2 terms by L + 1 (`official_repnoise_loss`).
    """
    return -torch.log(mean_cross_entropy + offset)


# --- noise ---


def gaussian_kernel_mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel_mul: float = 2.0,
    kernel_num: int = 5,
    estimator: Estimator = "biased",
    bandwidth: Tensor | float | None = None,
) -> Tensor:
    """MMD^2(x, y) = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(a, b) = sum_i exp(-|a - b|^2 / w_i)

    with w_i = bandwidth * kernel_mul^(i - kernel_num // 2) for i = 0..kernel_num - 1, by default
    {1/4, 1/2, 1, 2, 4} * bandwidth, and bandwidth = mean of |a - b|^2 over all ordered pairs of distinct rows
    of the joint sample (x, y), detached (paper section 3 and appendix B.1; the released code's `MMD_loss`).

    Args:
        x: (n, D). y: (m, D).
        estimator: "biased" is the V-statistic of the released code: the diagonals k(x_i, x_i) are included,
            the result is >= 0, and two samples of one distribution score above 0. "unbiased" leaves the
            diagonals out (U-statistic): 0 in expectation for equal distributions, so it can be negative; it
            needs n, m >= 2.
        bandwidth: fixed instead of estimated.

    Returns:
        () float32 (float64 for float64); 0 where all rows are equal (the released code: NaN).

    Where we differ: distances come from Gram matrices, so nothing of shape (n + m, n + m, D) exists. Their
    cancellation is kept harmless by centring: the detached joint mean is subtracted first, which changes
    neither values nor gradients, and afterwards the mean distance is 2 |row|^2 on average, so the error of
    distance / bandwidth is of the order of (n + m) machine epsilons even if all rows share a huge offset (as
    transformer activations do).
    """
    n, m = len(x), len(y)
    if estimator not in ("biased", "unbiased"):
        raise ConfigError(f'estimator must be "biased" or "unbiased", got {estimator!r}.')
    if estimator == "unbiased" and min(n, m) < 2:
        raise DataError(
            f"The unbiased MMD needs at least 2 samples on each side, got {n} and {m}. "
            'Use larger batches, form="token", or estimator="biased".'
        )
    with torch.autocast(x.device.type, enabled=False):
        x, y = precise(x), precise(y)
        centre = (x.detach().sum(0) + y.detach().sum(0)) / (n + m)
        x, y = x - centre, y - centre
        xx, yy, xy = _squared_distances(x), _squared_distances(y), _squared_distances(x, y)
        if bandwidth is None:
            distances = xx.detach().sum() + yy.detach().sum() + 2 * xy.detach().sum()
            bandwidth = (distances / ((n + m) * (n + m - 1))).clamp_min(1e-30)
        widths = [bandwidth * kernel_mul ** (i - kernel_num // 2) for i in range(kernel_num)]
        kxx, kyy, kxy = (torch.stack([torch.exp(-d / w) for w in widths]).sum(0) for d in (xx, yy, xy))
        if estimator == "biased":
            return kxx.mean() + kyy.mean() - 2 * kxy.mean()
        within_x = (kxx.sum() - kxx.trace()) / (n * (n - 1))
        within_y = (kyy.sum() - kyy.trace()) / (m * (m - 1))
        return within_x + within_y - 2 * kxy.mean()


def _squared_distances(a: Tensor, b: Tensor | None = None) -> Tensor:
    """(n, D), (m, D) -> (n, m) of |a_i - b_j|^2 >= 0; without b: a against itself, diagonal exactly 0."""
    other = a if b is None else b
    squared = a.square().sum(1)[:, None] + other.square().sum(1)[None, :] - 2 * a @ other.T
    squared = squared.clamp_min(0)
    return squared if b is not None else squared - squared.diag().diag()


def noise_term(
    activations: Sequence[Tensor],
    mask: Tensor,
    *,
    form: Literal["sequence", "token"] = "sequence",
    estimator: Estimator = "biased",
    noise: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """mean over layers of MMD^2(selected activations, N(0, I)), to be weighted by beta (Algorithm 1, line 12)

    Args:
        activations: L tensors (B, T, d): the MLP outputs before the residual add, on the harmful batch.
        mask: (B, T) bool, or numbers of which 0 means no: the tokens to noise. Others get exactly zero
            gradient.
        form: "sequence" (paper): one sample = the selected tokens of one sequence, flattened, against noise
            at the same places; B samples. "token": one sample = one selected token (d); N samples, so d
            dimensions are seen through far more of them.
        noise: L tensors (B, T, d) that replace the Gaussian draws (for tests and for replaying).
        generator: drawn from on its own device; None = the device's default generator.
        max_tokens: form "token" only: a random subset of at most so many tokens, the same in every layer,
            which bounds the (2N, 2N) kernel matrices.

    Returns:
        () float32 (float64 for float64). The noise is drawn in that dtype, anew for each layer.

    Where we differ: the selected tokens are moved to the front of each sequence and positions beyond the
    longest one are dropped. The paper's layout gives each token its absolute position, so that padding on the
    other side would change the distances between sequences. Nothing changes where all masks start at the same
    position; noise and activations are zero in the same places.
    """
    if noise is not None and len(noise) != len(activations):
        raise DataError(f"Noise has {len(noise)} tensors for {len(activations)} layers; give one per layer.")
    mask = mask.bool()
    if not mask.any():
        raise DataError(
            f"The noise mask of shape {tuple(mask.shape)} selects no token: the harmful answers are empty, "
            "truncated away or equal to the harmless ones. Check the pairs, or raise max_length."
        )
    if form == "token":
        source, filled = _token_samples(mask, max_tokens, generator)
    elif form == "sequence" and max_tokens is None:
        source, filled = _sequence_samples(mask)
    else:
        raise ConfigError(
            f'form must be "sequence" (without max_tokens) or "token", got {form!r}, max_tokens={max_tokens}.'
        )

    total: Tensor | None = None
    for layer, activation in enumerate(activations):
        x = precise(_take(activation, source, filled))
        if noise is None:
            device = generator.device if generator is not None else x.device
            drawn = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
            y = drawn.masked_fill(~filled.to(x.device)[..., None], 0)
        else:
            y = _take(noise[layer].to(x), source, filled)
        mmd = gaussian_kernel_mmd(x.flatten(1), y.flatten(1), estimator=estimator)
        total = mmd if total is None else total + mmd.to(total.device)
    if total is None:
        raise DataError("The noise term got no activations; give the MLP outputs of at least one layer.")
    return total / len(activations)


def _sequence_samples(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sample b = the selected tokens of sequence b in order, filled up: (B, S) flat indices, (B, S) bool."""
    B, T = mask.shape
    order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return order + T * torch.arange(B, device=mask.device)[:, None], mask.gather(1, order)


def _token_samples(mask: Tensor, max_tokens: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Each sample = one selected token: (N, 1) flat indices and (N, 1) bool."""
    source = mask.flatten().nonzero()
    if max_tokens is not None and len(source) > max_tokens:
        device = generator.device if generator is not None else source.device
        chosen = torch.randperm(len(source), generator=generator, device=device)[:max_tokens]
        source = source[chosen.sort().values.to(source.device)]
    return source, torch.ones_like(source, dtype=torch.bool)


def _take(states: Tensor, source: Tensor, filled: Tensor) -> Tensor:
    """(B, T, d) -> (samples, S, d), zero and without gradient where not filled, even if NaN stands there."""
    taken = states.flatten(0, 1).index_select(0, source.flatten().to(states.device))
    return taken.view(*source.shape, -1).masked_fill(~filled.to(states.device)[..., None], 0)


# --- the released arithmetic ---


def official_repnoise_loss(
    model: nn.Module,
    harmful: Mapping[str, Tensor],
    harmless: Mapping[str, Tensor],
    *,
    alpha: float,
    beta: float,
    noise: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """loss = stability + beta * noise - alpha * log(ascent), as the released code computes it

        mask      = harmful ids != harmless ids                                      (B, T)
        stability = CE(harmless logits)
        noise     = mean over layers of biased MMD^2(h_l * mask, N(0, I) * mask), each flattened to (B, T * d)
        ascent    = (CE(harmful logits) + sum over j = 0..L of CE(head(norm(hidden_j)))) / (L + 1) + 1

    Kept quirk for quirk, so that published results can be reproduced; for anything else use the corrected
    parts above:

    1. the + 1 stands outside of the division, and L + 2 terms are divided by L + 1;
    2. hidden_L is already normed and is normed again, and the final logits count once more;
    3. logits are multiplied by the mask at t, labels are masked at t + 1: the first token in which a pair
       differs is scored on all-zero logits, a constant log V without gradient;
    4. masked labels become 0 and then 0 is ignored: a genuine token id 0 is ignored too;
    5. the mask compares positions: padding counts as answer where only one of the two is padded, tokens that
       are equal by chance do not count, and the attention mask is used in the forward passes only;
    6. one mask serves the noise, the harmful and the harmless cross-entropy, which are means over the whole
       batch.

    Where we differ: hooks are gone when this returns or raises (the released code adds hooks at every call
    and removes none), and MMD statistics are float32 for half-precision models.

    Args:
        model: a Llama-style causal LM (`model.base_model.layers[i].mlp`, `.base_model.norm`, `.lm_head`).
        harmful, harmless: `input_ids` and `attention_mask`, (B, T) int64, row by row the two sides of a pair,
            padded on the right.
        noise: L tensors (B, T, d) that replace the Gaussian draws.

    Returns:
        () each: `loss`, `stability`, `noise` (mean over layers), `ascent` (the argument of the log).
    """
    layers, norm, head = _llama_parts(model)
    ids = harmful["input_ids"]
    if ids.shape != harmless["input_ids"].shape:
        raise DataError(
            "The official loss compares a pair position by position, got input_ids of shape "
            f"{tuple(ids.shape)} and {tuple(harmless['input_ids'].shape)}; pad both to one length."
        )
    if noise is not None and len(noise) != len(layers):
        raise DataError(f"Noise has {len(noise)} tensors for {len(layers)} layers; give one per layer.")
    mask = ids != harmless["input_ids"]

    with _record(layers, norm) as (hidden, mlps):
        harmful_logits = model(input_ids=ids, attention_mask=harmful["attention_mask"], use_cache=False).logits
    harmless_logits = model(
        input_ids=harmless["input_ids"], attention_mask=harmless["attention_mask"], use_cache=False
    ).logits

    stability = _official_cross_entropy(harmless_logits, harmless["input_ids"], mask)
    lens = [_official_cross_entropy(head(norm(h)), ids, mask) for h in hidden]
    ascent = (_official_cross_entropy(harmful_logits, ids, mask) + sum(lens)) / len(lens) + 1
    draws = noise if noise is not None else [torch.randn_like(h) for h in mlps]
    noise_mean = sum(
        (_official_mmd(h, draw, mask) for h, draw in zip(mlps, draws, strict=True)),
        torch.zeros_like(ascent),
    ) / len(layers)
    loss = stability + beta * noise_mean - alpha * torch.log(ascent)
    return {"loss": loss, "stability": stability, "noise": noise_mean, "ascent": ascent}


def _official_cross_entropy(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Token mean of the cross-entropy of *masked logits*, without labels that are masked or token id 0."""
    logits = logits * mask[..., None].float()  # float32 on purpose: half-precision logits are promoted
    labels = (ids * mask).masked_fill((ids * mask) == 0, IGNORE_INDEX)
    if not (labels[:, 1:] != IGNORE_INDEX).any():
        raise DataError(
            f"No token is left to train in a batch of shape {tuple(ids.shape)}: harmful and harmless ids "
            "are equal. Check that the answers of each pair differ and are not truncated away."
        )
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def _official_mmd(activation: Tensor, draw: Tensor, mask: Tensor) -> Tensor:
    kept = mask[..., None].to(activation.dtype)
    return gaussian_kernel_mmd((activation * kept).flatten(1), (draw.to(activation) * kept).flatten(1))


def _llama_parts(model: nn.Module) -> tuple[Sequence[nn.Module], nn.Module, nn.Module]:
    try:
        base: Any = model.base_model
        [layer.mlp for layer in base.layers]
        return base.layers, base.norm, model.lm_head  # type: ignore[return-value]
    except AttributeError as error:
        raise ModelError(
            "The official variant needs a Llama-style causal LM without adapters (base_model.layers[i].mlp, "
            f'base_model.norm, lm_head), got {type(model).__name__}: {error}. Use variant="corrected".'
        ) from error


@contextmanager
def _record(layers: Sequence[nn.Module], norm: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Watch one forward pass: the L + 1 tensors that transformers calls hidden_states, and the MLP outputs.

    `output_hidden_states=True` would give the former too, but makes transformers 5 leave hooks of its own on
    the model.
    """
    hidden: list[Tensor] = []
    mlps: list[Tensor] = []

    def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    handles = []
    try:
        for layer in layers:
            mlp: Any = layer.mlp
            handles.append(layer.register_forward_pre_hook(keep_input, with_kwargs=True))
            handles.append(mlp.register_forward_hook(lambda _, __, output: mlps.append(output)))
        handles.append(norm.register_forward_hook(lambda _, __, output: hidden.append(output)))
        yield hidden, mlps
    finally:
        for handle in handles:
            handle.remove()
