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
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
"""Fields of `transformers.LlamaConfig`; the weights are random, which changes neither time nor memory."""

CASES = ("plain", "naive", "exact", "sampled")
"""`cases.Plain`, `cases.Naive`, `RepNoise`, and `RepNoise` with `lens_layers`."""
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
        train: further `transformers.TrainingArguments`.
    """

    shape: str = "smollm2-135m"
    cases: tuple[str, ...] = CASES
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    steps: int = 5
    batch: int = 4
    length: int = 128
    answers: float = 0.75
    lens_layers: int = 4
    layers: int | None = None
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
        if self.layers is not None and self.layers < 1:
            raise ConfigError(f"layers must be 1 or more, got {self.layers}.")
        if not 0 < self.answers <= 1:
            raise ConfigError(f"answers is a share of the tokens, above 0 and at most 1; got {self.answers}.")

    @property
    def answer_tokens(self) -> int:
        """Answer tokens of one sequence that have a token before them."""
        return max(1, min(self.length - 1, round(self.answers * self.length)))
