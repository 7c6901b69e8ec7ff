"""Perplexity on held-out harmless text: whether the model still speaks as it did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.parties import StudyData
from ..errors import ConfigError, DataError
from ..intervals import ratio_bootstrap
from ..models import context_size
from ..recipes.ranges import Count
from .base import EVALUATIONS, Evaluation, Measured
from .likelihood import Request, log_likelihoods, prefix_id, table


@EVALUATIONS.register("perplexity")
@dataclass(kw_only=True)
class Perplexity(Evaluation):
    """`text_loss`: nats per token over all documents, interval by bootstrap over documents; `text_perplexity`: its
    exponential; `document_loss`: nats per token of each document, mean over documents (with `items`).

    A document starts from the BOS (else EOS) token and is read in windows that fill the context; a later window sees
    one token of the one before it: `loglikelihood_rolling` of lm-evaluation-harness.

    Attributes:
        source: a file or hub:owner/name.
        column: the column with the text; other rows are an error.
        limit: the first so many documents.
        window: tokens in a window; null = the model's context.
        batch_size: windows at a time.
    """

    attacked = False

    source: str
    column: str = "text"
    limit: Count | None = None
    window: Count | None = None
    batch_size: Count = 8

    def measure(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, data: StudyData, *, seed: int, harm: str | None = None
    ) -> Measured:
        room = context_size(model)
        if self.window is not None and self.window > room:
            raise ConfigError(f"window is {self.window}; allowed: up to the model's context of {room} tokens.")
        requests, owners = [], []
        rows = table(self.source, (self.column,), self.limit)
        for number, row in enumerate(rows):
            text = row[self.column]
            ids = tokenizer.encode(text, add_special_tokens=False, verbose=False) if isinstance(text, str) else []
            if not ids:
                raise DataError(f"{self.source}, row {number + 1}: {self.column!r} holds no text. Leave the row out.")
            for request in windows([prefix_id(tokenizer), *ids], self.window or room):
                requests.append(request)
                owners.append(number)
        scores = log_likelihoods(model, tokenizer, requests, batch_size=self.batch_size, rows=owners)
        losses, counts = [0.0] * len(rows), [0] * len(rows)
        for number, request, score in zip(owners, requests, scores, strict=True):
            losses[number] -= score
            counts[number] += len(request.continuation)
        found = Measured()
        each = ratio_bootstrap(losses, counts)
        row = {"n": each.n, "seed": seed, "split": "test"}
        found.rows.append({"metric": "text_loss", "value": each.value, "lo": each.lo, "hi": each.hi, **row})
        limits = [None if x is None else math.exp(min(x, 50.0)) for x in (each.value, each.lo, each.hi)]
        found.rows.append({"metric": "text_perplexity", "value": limits[0], "lo": limits[1], "hi": limits[2], **row})
        ratios = [loss / count for loss, count in zip(losses, counts, strict=True)]
        found.add_score("document_loss", ratios, seed=seed, bounds=None)
        return found


def windows(ids: list[int], size: int) -> list[Request]:
    """Every token but the first is scored exactly once, in windows that read at most `size` tokens each.

    As in the harness, the last window reaches back to fill itself: its tokens see as much as there is.
    """
    first, out = ids[: size + 1], []
    out.append(Request(tuple(first[:1]), tuple(first[1:])))
    done = len(first)
    while done < len(ids):
        end = min(done + size, len(ids))
        start = max(end - size - 1, 0)
        out.append(Request(tuple(ids[start:done]), tuple(ids[done:end])))
        done = end
    return out
