"""Batched generation and held-out loss, with settings that no model's own configuration can change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled
from pydantic import Field
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data import Row, StreamCollator, Template, pad_id
from ..data.collate import RowDataset
from ..errors import ConfigError, DataError
from ..losses import IGNORE_INDEX
from ..models import context_size
from ..recipes.ranges import Count, Positive
from ..registry import Checked
from ..training import forward


@dataclass(frozen=True, kw_only=True)
class Decoding(Checked):
    """How answers are generated. Greedy by default, whatever the model's own generation settings say.

    Attributes:
        max_new_tokens: answers are cut here; 50 in the paper's harmfulness evaluation, 25 for continuations.
        do_sample, temperature, top_p: sampling with the seed of the evaluation.
        batch_size: prompts at a time.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # pydantic reads it; no field

    max_new_tokens: Count = 50
    do_sample: bool = False
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: Count = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ConfigError(
                "decoding: temperature and top_p do nothing without do_sample: true. Set it, or drop them."
            )

    def __str__(self) -> str:
        how = f"sampled, temperature {self.temperature:g}, top_p {self.top_p:g}" if self.do_sample else "greedy"
        return f"{how}, max_new_tokens {self.max_new_tokens}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the former mode of every module comes back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    template: Template,
    decoding: Decoding,
    *,
    seed: int = 0,
) -> list[str]:
    """Answers in the order of `prompts`, special tokens removed.

    Prompts are sorted by length and left-padded. `do_sample` is explicit: chat models ship generation settings
    that sample. Answers end where the context does. A progress bar shows where it takes more than some seconds.
    Raises `DataError` if the longest prompt leaves no room for an answer.
    """
    encoded = [template.encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    pad, device = pad_id(tokenizer), next(model.parameters()).device
    settings = GenerationConfig(
        max_new_tokens=min(decoding.max_new_tokens, _room(model, max(map(len, encoded), default=0))),
        do_sample=decoding.do_sample,
        **({"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.do_sample else {}),
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=_stops(model, tokenizer),
        bos_token_id=tokenizer.bos_token_id,
    )
    answers = [""] * len(prompts)
    own, model.generation_config = model.generation_config, settings
    try:
        with evaluating(model), _seeded(decoding, seed), progress(len(order), "answers") as bar:
            for start in range(0, len(order), decoding.batch_size):
                chosen = order[start : start + decoding.batch_size]
                longest = max(len(encoded[index]) for index in chosen)
                ids = torch.full((len(chosen), longest), pad, dtype=torch.int64)
                mask = torch.zeros_like(ids)
                for row, index in enumerate(chosen):
                    ids[row, longest - len(encoded[index]) :] = torch.tensor(encoded[index])
                    mask[row, longest - len(encoded[index]) :] = 1
                out = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
                )
                texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
                for index, text in zip(chosen, texts, strict=True):
                    answers[index] = text
                bar.update(len(chosen))
    finally:
        model.generation_config = own
    return answers


@contextmanager
def _seeded(decoding: Decoding, seed: int) -> Iterator[None]:
    """Sampling draws from `seed` and leaves the caller's random numbers as they were."""
    if not decoding.do_sample:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def progress(total: int, unit: str) -> Any:
    """A bar for people only (a terminal), and only after some seconds: quick evaluations stay silent."""
    off = are_progress_bars_disabled()  # --quiet, and attacks that run beside each other
    return tqdm(total=total, unit=unit, desc=unit, leave=False, delay=5, disable=off or None, dynamic_ncols=True)


def _room(model: Any, longest: int) -> int:
    """Tokens that can still be generated after the longest prompt; beyond its context a model writes nonsense."""
    context = context_size(model)
    room = context - longest
    if room < 1:
        raise DataError(
            f"the longest prompt has {longest} tokens and the model's context holds {context}: no room for an answer."
            " Drop the long prompts."
        )
    return room


def _stops(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer: the tokenizer's, and those of the model's own generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in [tokenizer.eos_token_id, *ids] if i is not None})


def answer_losses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: Template,
    *,
    max_length: int,
    batch_size: int = 16,
) -> list[tuple[float, int]]:
    """For each row (summed cross-entropy of the answer in nats, number of answer tokens), in the rows' order."""
    dataset = RowDataset(rows, tokenizer, "rows", template=template, max_length=max_length)
    order = sorted(range(len(rows)), key=lambda index: len(dataset[index]["rows"]["input_ids"]))
    collate, device = StreamCollator(pad_id(tokenizer)), next(model.parameters()).device
    losses: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    with evaluating(model), progress(len(order), "rows") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {k: v.to(device) for k, v in collate([dataset[index] for index in chosen])["rows"].items()}
            targets = batch["labels"][:, 1:]
            each = nn.functional.cross_entropy(
                forward(model, batch)[:, :-1].float().transpose(1, 2),
                targets,
                ignore_index=IGNORE_INDEX,
                reduction="none",
            ).sum(1)
            counts = (targets != IGNORE_INDEX).sum(1)
            for index, loss, count in zip(chosen, each.tolist(), counts.tolist(), strict=True):
                losses[index] = (loss, count)
            bar.update(len(chosen))
    return losses
