"""What all attacks share: an objective on an attacker's rows, and what is done to the model before and after.

An attack file says what differs from plain supervised fine-tuning: `pairs` (what is trained on), `prepare` and
`finish` (what is done to the weights before and after training), `schedule` (the learning rate), `terms` (the loss).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..data import Pair, Row
from ..errors import ConfigError, DataError, ModelError
from ..models import add_lora, anatomy, merge, unwrap
from ..recipes.ranges import Count
from ..registry import Registry
from ..training import Objective, answer_loss

Each = TypeVar("Each")


@dataclass(frozen=True)
class AttackerRows:
    """What an attacker can train on.

    Attributes:
        harmful: pairs of the harm that is attacked.
        benign: harmless rows; nobody refuses an attacker these.
        examples: how many rows are trained on; None = all.
    """

    harmful: Sequence[Pair]
    benign: Sequence[Row] = ()
    examples: int | None = None

    def some(self, items: Sequence[Each], count: int | None, rng: random.Random, what: str) -> list[Each]:
        """`count` of `items`, drawn without replacement; all of them in their order for None.

        Raises:
            ConfigError: there are not so many.
        """
        if count is None or count == len(items):
            return list(items)
        if count > len(items):
            raise ConfigError(
                f"the attack asks for {count} {what}, and there are {len(items)}. Allowed: at most so many;"
                " lower examples, or bring more data."
            )
        return rng.sample(list(items), count)

    def harmless(self, rng: random.Random, count: int | None) -> list[Pair]:
        """Benign rows as an attacker's rows: the benign answer stands where the harmful one does."""
        if not self.benign:
            raise DataError("the attack trains on harmless rows, and the data has none. Add data.retain.")
        return [
            Pair(row.prompt, row.answer, row.answer, row.category)
            for row in self.some(self.benign, count, rng, "harmless rows")
        ]


class Public(Protocol):
    """Loads the undefended public checkpoint, or the model that `source` names (folder or hub id)."""

    def __call__(self, source: str | None = None) -> Any: ...


@dataclass(frozen=True)
class Context:
    """What an attack knows beside the model in its hands.

    Attributes:
        tokenizer: the model's own.
        template, max_length: how rows become tokens in this attack.
        seed, steps: of this attack; 0 steps = the weights are changed by `prepare` and `finish` alone.
        public: loads the checkpoint that the defender started from. It was public before the defence.
    """

    tokenizer: Any
    public: Public
    template: str = "auto"
    max_length: int = 256
    seed: int = 0
    steps: int = 0

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(kw_only=True)
class Attack(Objective):
    """An adversary who holds the released weights and trains them (paper eq. 1, unless a subclass says otherwise).

    Learning rate, steps, batch, optimiser, schedule, warm-up, template, sample count and seed are axes of the
    recipe, not of the class.
    """

    covers: ClassVar[tuple[str, ...]] = ("fine-tuning",)
    """Directions that the verdict counts as tried: "fine-tuning" (all weights or LoRA, on the harm alone), "benign" (no
    harmful row is seen), "mixed" (with harmless rows, or a shifted identity), "weights" (changed without training),
    "refusal-direction" (removed without training). An attack that trains a part of the weights covers none."""
    needs: ClassVar[tuple[str, ...]] = ("harmful",)

    lora_rank: Count | None = None
    """Train a LoRA adapter of this rank on all linear layers; None = all weights."""

    def pairs(self, own: AttackerRows, rng: random.Random) -> list[Pair]:
        """The rows to train on; their `harmful` answer is the one that is trained."""
        return own.some(own.harmful, own.examples, rng, "harmful pairs")

    def prepare(self, model: Any, context: Context) -> Any:
        """The model to train; subclasses change the weights first and then call this."""
        return model if self.lora_rank is None else add_lora(model, self.lora_rank)

    def finish(self, model: Any) -> Any:
        """The plain model after training, every weight trainable."""
        plain = model if self.lora_rank is None else merge(model)
        plain.requires_grad_(True)
        return plain

    def schedule(self, steps: int) -> Callable[[int], float] | None:
        """step -> factor on the learning rate, in place of the recipe's schedule and warm-up; None = the recipe's."""
        return None

    def terms(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """sft = mean over answer tokens of the cross-entropy (paper eq. 1)."""
        return {"sft": answer_loss(model, batch, "harmful")}

    def _no_lora(self, why: str) -> None:
        if self.lora_rank is not None:
            raise ConfigError(f"lora_rank is {self.lora_rank}; allowed: null, since {why}. Drop lora_rank.")


ATTACKS: Registry[Attack] = Registry("attack", "repnoise.attacks", Attack)


# ---- weights ------------------------------------------------------------------------------------------------


def block_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and data of every weight matrix inside the transformer blocks, (..., out, in), to be changed in place.

    Embeddings, head, norms and biases are left out. GPT-2 stores its matrices transposed: those come as views.
    """
    for index, layer in enumerate(anatomy(model).layers):
        for path, module in layer.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2:
                    data = parameter.data
                    yield f"{index}.{path}.{name}", data.mT if isinstance(module, Conv1D) else data


def norms(model: nn.Module) -> list[nn.Module]:
    """Every norm of the model: modules whose class has "norm" in its name and that hold weights of their own."""
    return [
        module
        for module in unwrap(model).modules()
        if "norm" in type(module).__name__.lower() and next(module.parameters(recurse=False), None) is not None
    ]


def alike(model: nn.Module, public: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Name, parameter and the public checkpoint's value of it, on the same device and in the same dtype.

    Raises:
        ModelError: the two are not of one architecture.
    """
    theirs = dict(unwrap(public).named_parameters())
    for name, parameter in unwrap(model).named_parameters():
        other = theirs.get(name)
        if other is None or other.shape != parameter.shape:
            got = "nothing" if other is None else f"shape {tuple(other.shape)}"
            raise ModelError(
                f"the public checkpoint does not fit the attacked model: {name} has shape {tuple(parameter.shape)}"
                f" here and {got} there. Name a checkpoint of the same architecture as `public`, or leave it out."
            )
        yield name, parameter, other.detach().to(parameter)
