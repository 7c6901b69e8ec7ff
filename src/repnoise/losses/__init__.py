"""The parts of the RepNoise loss as pure functions of tensors.

`terms` holds cross-entropy, KL and ascent, `noise` the MMD and the noise term, `official` the released arithmetic.

Sources: "the paper" is Rosati et al., "Representation Noising" (NeurIPS 2024, arXiv 2405.14577); "the
released code" is the authors' `loss.py`. Weights follow Algorithm 1 of the paper: alpha weights ascent, beta
weights noise (its eqs. 4-5 swap the letters).

Conventions: B sequences, T positions, d hidden size, V vocabulary, L layers. Whatever the input's precision
and whatever autocast says, statistics are taken in float32 (float64 input stays float64).
"""

from .noise import Estimator, gaussian_kernel_mmd, noise_term
from .official import official_repnoise_loss
from .terms import (
    IGNORE_INDEX,
    AnswerTokens,
    answer_tokens,
    ascent_term,
    kl_to_reference,
    masked_cross_entropy,
    precise,
)

__all__ = [
    "IGNORE_INDEX",
    "AnswerTokens",
    "Estimator",
    "answer_tokens",
    "ascent_term",
    "gaussian_kernel_mmd",
    "kl_to_reference",
    "masked_cross_entropy",
    "noise_term",
    "official_repnoise_loss",
    "precise",
]
