"""Tokenised data sets of streams, and the collator that pads each stream.

An item is `{stream: {"input_ids", "labels"}}`. A pair's two sides lie in one item, so no shuffling can part
them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ..errors import DataError
from ..losses import IGNORE_INDEX
from ..seeds import derive_seed
from .pairs import Pair, Row
from .problems import Problems
from .templates import Template, get_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = dict[str, list[int]]
STREAMS = ("harmful", "harmless", "retain")


class _Encoder:
    """Tokenises rows of one data set; collects all errors, counts the answers it had to cut."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | Template,
        max_length: int,
    ) -> None:
        if max_length < 2:
            raise DataError(f"max_length is {max_length}; allowed: 2 or more (one prompt and one answer token).")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = get_template(template).resolve(tokenizer)
        self.problems = Problems("tokenising", "Raise max_length, change the template or drop the rows.")
        self.truncated: dict[str, int] = {}

    def stream(self, name: str, rows: Iterable[tuple[str, str]]) -> list[Encoded]:
        """Encode `(prompt, answer)` of one stream; rows are counted from 0 in messages."""
        out: list[Encoded] = []
        self.truncated[name] = 0
        for index, (prompt, answer) in enumerate(rows):
            try:
                first, then = self.template.parts(self.tokenizer, prompt, answer, self.max_length)
            except DataError as error:
                self.problems.add(f"row {index} ({name})", str(error))
                continue
            room = self.max_length - len(first)
            self.truncated[name] += len(then) > room
            then = then[:room]
            out.append({"input_ids": first + then, "labels": [IGNORE_INDEX] * len(first) + then})
        return out


class PairDataset(Dataset[dict[str, Any]]):
    """Pairs, and retain rows drawn beside them, tokenised once.

    Args:
        pairs: what to train on.
        tokenizer: the model's own.
        template: name of a template, text with `{prompt}`, or `Template`.
        max_length: longest sequence; longer answers are cut and counted in `truncated`, longer prompts are an
            error.
        retain: rows of the stream "retain".
        retain_batch: retain rows beside each pair (default 1); with more, the item's "retain" is a list.
        streams: which streams an item holds; by default harmful and harmless, and retain if there are rows.
        seed: order in which retain rows are drawn.

    Attributes:
        truncated: stream -> number of answers cut.
        template: the `Template` in force ("auto" resolved).
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | Template = "auto",
        max_length: int = 256,
        retain: Sequence[Row] | None = None,
        retain_batch: int | None = None,
        streams: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if streams is None:
            streams = STREAMS if retain else STREAMS[:2]
        unknown = [name for name in streams if name not in STREAMS]
        if unknown or not streams:
            raise DataError(f"streams are {list(streams)}; allowed: one or more of {', '.join(STREAMS)}.")
        if not pairs:
            raise DataError("no pairs: an empty data set cannot be trained on.")
        if "retain" in streams and not retain:
            raise DataError("the stream 'retain' is asked for, but there are no retain rows; give some as `retain`.")
        if retain_batch is not None and retain_batch < 1:
            raise DataError(f"retain_batch is {retain_batch}; allowed: 1 or more.")
        encoder = _Encoder(tokenizer, template, max_length)
        self.template, self.truncated = encoder.template, encoder.truncated
        self.seed, self.epoch, self.per_item = seed, 0, retain_batch or 1
        self.length = len(pairs)
        self.encoded: dict[str, list[Encoded]] = {}
        for name in streams:
            rows = (
                [(row.prompt, row.answer) for row in retain or ()]
                if name == "retain"
                else [(pair.prompt, getattr(pair, name)) for pair in pairs]
            )
            self.encoded[name] = encoder.stream(name, rows)
        encoder.problems.raise_if_any()

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Go on in the retain rows where epoch `epoch` starts, so that more rows than pairs are all seen.

        `transformers.Trainer` calls this through accelerate's data loader.
        """
        self.epoch = int(epoch)

    def retain_indices(self, index: int) -> list[int]:
        """Retain rows beside pair `index`: a seeded permutation, a new one each time it is used up."""
        count = len(self.encoded["retain"])
        start = (self.epoch * self.length + index) * self.per_item
        return [
            _permutation(self.seed, position // count, count)[position % count]
            for position in range(start, start + self.per_item)
        ]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(self.length)[index]  # negative indices, IndexError
        item: dict[str, Any] = {}
        for name, rows in self.encoded.items():
            if name == "retain":
                drawn = [rows[i] for i in self.retain_indices(index)]
                item[name] = drawn[0] if self.per_item == 1 else drawn
            else:
                item[name] = rows[index]
        return item


class RowDataset(Dataset[dict[str, Any]]):
    """Rows as one stream: plain supervised fine-tuning, by an attacker (stream "harmful") or a user
    ("harmless").

    Arguments and attributes as for `PairDataset`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        stream: str = "harmless",
        *,
        template: str | Template = "auto",
        max_length: int = 256,
    ) -> None:
        if not rows:
            raise DataError("no rows: an empty data set cannot be trained on.")
        encoder = _Encoder(tokenizer, template, max_length)
        self.template, self.truncated, self.stream = encoder.template, encoder.truncated, stream
        self.encoded = encoder.stream(stream, ((row.prompt, row.answer) for row in rows))
        encoder.problems.raise_if_any()

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {self.stream: self.encoded[index]}


class StreamCollator:
    """Items -> `{stream: {"input_ids", "attention_mask", "labels"}}`, int64 tensors (B, T), labels -100 at
    pads.

    Each stream is padded to its own longest sequence. What is padding stands in `attention_mask` alone: the
    pad token's id may occur as an ordinary token (it often is the end-of-sequence token).

    Args:
        pad_token_id: any id of the vocabulary.
        padding_side: "right" or "left".
        same_length: pad all streams to one length, for losses that compare them position by position.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right", *, same_length: bool = False) -> None:
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise DataError(
                f"pad_token_id is {pad_token_id!r}; give a token id (`pad_id(tokenizer)` chooses one when the"
                " tokenizer has no pad token)."
            )
        if padding_side not in ("right", "left"):
            raise DataError(f"padding_side is {padding_side!r}; allowed: right, left.")
        self.pad_token_id, self.padding_side, self.same_length = pad_token_id, padding_side, same_length

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
        streams: dict[str, list[Encoded]] = {}
        for item in items:
            for name, value in item.items():
                streams.setdefault(name, []).extend(value if isinstance(value, list) else [value])
        longest = {name: max(len(row["input_ids"]) for row in rows) for name, rows in streams.items()}
        if self.same_length:
            longest = dict.fromkeys(longest, max(longest.values()))
        return {name: self._pad(rows, longest[name]) for name, rows in streams.items()}

    def _pad(self, rows: Sequence[Encoded], length: int) -> dict[str, torch.Tensor]:
        shape = (len(rows), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.int64),
        }
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            span = slice(0, n) if self.padding_side == "right" else slice(length - n, length)
            batch["input_ids"][i, span] = torch.tensor(row["input_ids"])
            batch["attention_mask"][i, span] = 1
            batch["labels"][i, span] = torch.tensor(row["labels"])
        return batch


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token's id, else the end-of-sequence token's, else 0; any will do, since attention marks the
    pads.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


@lru_cache(maxsize=8)
def _permutation(seed: int, cycle: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(derive_seed("retain", seed, cycle)).shuffle(order)
    return tuple(order)
