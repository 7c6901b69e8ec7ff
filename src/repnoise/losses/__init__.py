"""The parts of the loss as pure functions: MMD, noise, ascent, cross-entropy, KL, and the released arithmetic."""

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
