"""Batched greedy generation and held-out loss, with settings that no model's own configuration can change."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data import Row, StreamCollator, Template, pad_id
from ..data.collate import RowDataset
from ..errors import DataError
from ..losses import IGNORE_INDEX
from ..training import forward


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
    *,
    max_new_tokens: int,
    batch_size: int = 256,
) -> list[str]:
    """Greedy answers in the order of `prompts`, special tokens removed.

    Prompts are sorted by length and left-padded. `do_sample=False` is explicit: chat models ship generation settings
    that sample. Answers end where the context does. Raises `DataError` if the longest prompt leaves no room for one.
    """
    encoded = [template.encode_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    pad, device = pad_id(tokenizer), next(model.parameters()).device
    settings = GenerationConfig(
        max_new_tokens=min(max_new_tokens, _room(model, max(map(len, encoded), default=0))),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=_stops(model, tokenizer),
        bos_token_id=tokenizer.bos_token_id,
    )
    answers = [""] * len(prompts)
    own, model.generation_config = model.generation_config, settings
    try:
        with evaluating(model):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
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
    finally:
        model.generation_config = own
    return answers


def _room(model: Any, longest: int) -> int:
    """Tokens that can still be generated after the longest prompt; beyond its context a model writes nonsense."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = sys.maxsize if context is None else context - longest
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
    with evaluating(model):
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
    return losses
