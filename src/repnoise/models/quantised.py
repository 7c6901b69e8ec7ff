"""Frozen weights in 4 bits under LoRA (QLoRA, arXiv 2305.14314): the only file that knows bitsandbytes."""

from __future__ import annotations

from typing import cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from ..errors import MissingExtraError
from .families import FAMILIES


def require_bitsandbytes() -> None:
    """Raise `MissingExtraError` where bitsandbytes is not there, or is older than transformers accepts."""
    if not is_bitsandbytes_available():
        raise MissingExtraError(
            "Loading in 4 bits needs bitsandbytes, which is not installed or too old.\n"
            "Next step: pip install 'repnoise[quantized]'"
        )


def four_bits(config: PreTrainedConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation, computed in `dtype`; what the lens reads (head, final modules) stays as it is."""
    family = FAMILIES.get(config.model_type)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # None: transformers' own choice, the head; it does not know the projection before OPT's head
        llm_int8_skip_modules=None if family is None else [family.head, *family.final],
    )


def keep_layout(model: PreTrainedModel) -> None:
    """Forbid the layout that bitsandbytes 0.50 packs weights into at the first pass in evaluation mode on some CPUs.

    It has no gradients, stays packed when training goes on, and fails where widths are no multiples of 32.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether weights of this model, wrapped by peft or not, are packed."""
    return cast(bool, getattr(model, "is_quantized", False))
