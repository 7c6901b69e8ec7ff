"""What is measured: model shapes, cases, and the options that both sides of a measurement read. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 24000,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
"""Fields of `transformers.LlamaConfig`, as published; the weights are random, which changes neither time nor memory."""

DEFAULT_CASES = ("plain", "naive", "exact", "sampled")
CASES = (*DEFAULT_CASES, "joined")
"""`cases.Plain`, `cases.Naive`, `RepNoise`, `RepNoise` with `lens_layers`, and `cases.Joined`."""
WARMUP = 1
"""Steps before the timed ones."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BenchOptions:
    """Options of `repnoise bench`.

    Attributes:
        shape: a name in `SHAPES`, a model folder or a hub id (its config only; weights are random).
        cases: names in `CASES`. dtypes: of weights and activations.
        steps: timed steps, after `WARMUP` untimed ones.
        batch: pairs per step. length: tokens of each side. answers: share of them that is the answer.
        lens_layers: of the case "sampled". layers: blocks, instead of the shape's own number.
        lora_rank: train LoRA of this rank instead of the weights.
        four_bit: LoRA on a base in 4 bits, as bitsandbytes keeps it; in the memory model only.
        train: further `transformers.TrainingArguments`.
    """

    shape: str = "smollm2-135m"
    cases: tuple[str, ...] = DEFAULT_CASES
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    steps: int = 5
    batch: int = 4
    length: int = 128
    answers: float = 0.75
    lens_layers: int = 4
    layers: int | None = None
    lora_rank: int | None = None
    four_bit: bool = False
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, given, allowed in (("case", self.cases, CASES), ("dtype", self.dtypes, DTYPES)):
            wrong = [value for value in given if value not in allowed]
            if wrong or not given:
                raise ConfigError(f"{name} {', '.join(wrong) or '(none)'}: allowed are {', '.join(allowed)}.")
        least = {"steps": 1, "batch": 2, "length": 4, "lens_layers": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} must be {minimum} or more, got {getattr(self, name)}.")
        for name in ("layers", "lora_rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}.")
        if self.four_bit and self.lora_rank is None:
            raise ConfigError("four_bit keeps the base as it is and so trains LoRA; set lora_rank, 16 for example.")
        if not 0 < self.answers <= 1:
            raise ConfigError(f"answers is a share of the tokens, above 0 and at most 1; got {self.answers}.")

    @property
    def answer_tokens(self) -> int:
        """Answer tokens of one sequence that have a token before them."""
        return max(1, min(self.length - 1, round(self.answers * self.length)))
