"""Log-likelihood of texts under a model, batched: what multiple choice and perplexity have in common.

The definitions are those of lm-evaluation-harness (`lm_eval.api.model.TemplateLM.loglikelihood` and
`loglikelihood_rolling`, version 0.4.13), so that the numbers equal its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from ..data import pad_id
from ..data.readers import read_records
from ..errors import DataError, ModelError
from ..models import context_size, last_logits
from .generation import evaluating, progress

SHARED_FROM = 16
"""A context of fewer tokens is not worth a pass of its own."""


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids: `context` is given, `continuation` is scored. Both hold at least one token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def table(source: str, columns: Sequence[str], limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` rows of a file or hub data set; each has these columns.

    Raises:
        DataError: no file, no rows, a row without a column. Names rows and columns, quotes no text.
    """
    rows: list[dict[str, Any]] = []
    for where, record in read_records(source):
        if limit is not None and len(rows) == limit:
            break
        if not isinstance(record, dict):
            what = record if isinstance(record, ValueError) else f"expected an object, got {type(record).__name__}"
            raise DataError(f"{source}, {where}: {what}. Mend the row or leave it out.")
        missing = [column for column in columns if record.get(column) is None]
        if missing:
            raise DataError(
                f"{source}, {where}: no column {', '.join(missing)}; it has"
                f" {', '.join(map(str, record)) or 'none'}. Needed: {', '.join(columns)}."
                " Give another file, or rename its columns."
            )
        rows.append(record)
    if not rows:
        raise DataError(f"{source}: no rows. Give a file with the columns {', '.join(columns)}.")
    return rows


def encode(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Request:
    """Tokens of a context and its continuation, split as the harness splits them.

    The whole text is tokenised at once and cut after the context's own number of tokens; spaces that end the context
    go to the continuation. An empty context is the BOS token, else the EOS token.

    Raises:
        DataError: the continuation has no token of its own.
        ModelError: an empty context, and the tokenizer has neither token.
    """
    if context:
        bare = context.rstrip()
        first = _ids(tokenizer, bare)
        whole = _ids(tokenizer, context + continuation)
        request = Request(first, whole[len(first) :])
    else:
        prefix, ids = prefix_id(tokenizer), _ids(tokenizer, continuation, add_special_tokens=False)
        # A text that brings the prefix token itself gets no second one.
        request = Request(ids[:1], ids[1:]) if ids[:1] == (prefix,) else Request((prefix,), ids)
    if not request.context or not request.continuation:
        raise DataError(
            f"a text of {len(continuation)} characters has no token of its own after a context of"
            f" {len(context)} characters. Leave out rows with empty answers."
        )
    return request


def prefix_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a text without a context: BOS, else EOS."""
    for candidate in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    raise ModelError(
        "the tokenizer has neither a BOS nor an EOS token, so the first token of a text cannot be scored."
        " Set one of them in tokenizer_config.json."
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> tuple[int, ...]:
    # verbose=False: over-long texts get one clear error here and not the tokenizer's warning
    return tuple(tokenizer.encode(text, verbose=False, **options))


def log_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    share: bool = True,
) -> list[float]:
    """Summed log-probability (nats) of each request's continuation, in the order of `requests`.

    A context that several requests share is read once and its keys and values are reused, and so is what all these
    contexts begin with; the rest is padded on the right and sorted by length. Logits below float32 are raised to it
    (the harness takes the logarithm in the model's own dtype, so in bfloat16 the two differ).

    Args:
        rows: the data row of each request, for the message about prompts that are too long.
        share: False reads every request whole.

    Raises:
        DataError: a request is longer than the model's context; nothing is cut.
    """
    check_lengths(model, requests, rows)
    scores = [0.0] * len(requests)
    with evaluating(model), progress(len(requests), "texts") as bar:
        for chosen, found in _scored(model, requests, pad_id(tokenizer), batch_size, share):
            for index, score in zip(chosen, found, strict=True):
                scores[index] = score
            bar.update(len(chosen))
    return scores


def check_lengths(model: Any, requests: Sequence[Request], rows: Sequence[int] | None = None) -> None:
    """Raise `DataError` if any request does not fit; its last token is predicted and never read."""
    room = context_size(model)
    lengths = [len(request.context) + len(request.continuation) - 1 for request in requests]
    numbers = list(rows) if rows is not None else list(range(len(requests)))
    long = sorted({row for row, length in zip(numbers, lengths, strict=True) if length > room})
    if long:
        raise DataError(
            f"{len(long)} of {len(set(numbers))} rows do not fit into the model's context of {room} tokens (the longest"
            f" has {max(lengths)}; the first is row {long[0] + 1}). Nothing is cut: leave these rows out."
        )


def _scored(
    model: Any, requests: Sequence[Request], pad: int, batch_size: int, share: bool
) -> Iterator[tuple[list[int], list[float]]]:
    """(indices of requests, their scores), batch by batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.context, []).append(index)
    many = {
        # The context's last token predicts the first scored one, so it is read with each continuation.
        context[:-1]: sorted(members, key=lambda index: len(requests[index].continuation))
        for context, members in groups.items()
        if share and len(members) > 1 and len(context) > SHARED_FROM
    }
    start = _read(model, _common(list(many))) if many else None  # what all prompts begin with
    if many and not isinstance(start, DynamicCache):
        many, start = {}, None  # a recurrent state or none at all: nothing that can be kept and copied
    alone = [index for context, members in groups.items() if context[:-1] not in many for index in members]
    for prefix, members in many.items():
        cache = _read(model, prefix, copy.deepcopy(start))
        for first in range(0, len(members), batch_size):
            chosen = members[first : first + batch_size]
            yield chosen, _score(model, [requests[index] for index in chosen], pad, copy.deepcopy(cache))
    alone.sort(key=lambda index: -len(requests[index].context) - len(requests[index].continuation))
    for first in range(0, len(alone), batch_size):
        chosen = alone[first : first + batch_size]
        yield chosen, _score(model, [requests[index] for index in chosen], pad, None)


def _common(prefixes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all begin with, at least one token short of the shortest: there is always something left to read."""
    first, last = min(prefixes), max(prefixes)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: min(same, min(map(len, prefixes)) - 1)]


def _read(model: Any, ids: tuple[int, ...], cache: Any = None) -> Any:
    """Keys and values of `ids`, a beginning of which may stand in `cache` already."""
    done = cache.get_seq_length() if cache is not None else 0
    if len(ids) == done:
        return DynamicCache(config=model.config) if cache is None else cache
    new = torch.tensor([ids[done:]], device=next(model.parameters()).device)
    mask = new.new_ones(1, len(ids))
    output = model(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, **last_logits(model))
    return output.past_key_values


def _score(model: Any, requests: Sequence[Request], pad: int, cache: Any) -> list[float]:
    """Scores of requests of one batch; with a `cache` of their common context, it is used up."""
    device = next(model.parameters()).device
    prefix = 0 if cache is None else len(requests[0].context) - 1
    texts = [[*request.context, *request.continuation][prefix:-1] for request in requests]
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts], device=device)
    # Pads come last, where no scored position sees them. As in the harness they are not masked: a masked query sees
    # nothing at all under a short sliding window, and becomes NaN.
    mask = ids.new_ones(len(texts), prefix + longest)
    if cache is not None:
        cache.batch_repeat_interleave(len(requests))
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None).logits
    scores = []
    for row, (request, text) in enumerate(zip(requests, texts, strict=True)):
        own = logits[row, len(text) - len(request.continuation) : len(text)]
        own = own if own.dtype == torch.float64 else own.float()
        wanted = torch.tensor(request.continuation, device=device).unsqueeze(1)
        scores.append(own.log_softmax(-1).gather(1, wanted).double().sum().item())
    return scores
