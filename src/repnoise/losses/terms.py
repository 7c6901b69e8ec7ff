"""Cross-entropy of answer tokens, KL to a reference model, and the ascent term; which labels are trained."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DataError

IGNORE_INDEX = -100  # the label that Hugging Face collators give to positions that are not trained


def precise(x: Tensor) -> Tensor:
    """`x` in the dtype for statistics: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


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
