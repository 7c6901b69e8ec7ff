"""Schema, checks, data sets of streams, collator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repnoise.data import (
    Pair,
    PairDataset,
    Row,
    RowDataset,
    StreamCollator,
    fingerprint,
    load_pairs,
    load_rows,
    pad_id,
    side,
)
from repnoise.errors import ConfigError, DataError

WORDS = ["<pad>", "<eos>", "<unk>", "Question", ":", "Answer", "."] + [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_pairs(n: int = 5) -> list[Pair]:
    """Pair i: prompt `wi`, a harmful answer of i + 1 words, a harmless one of 2 words."""
    return [Pair(f"w{i}", " ".join(["w50"] * (i + 1)), f"w{i} w51") for i in range(n)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- loading and checking


def test_pairs_come_in_order_with_category_and_limit(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "harmful": f"h{i}", "harmless": f"s{i}", "category": "c"} for i in range(4)]
    path = write(tmp_path / "a.jsonl", rows)
    assert load_pairs(path) == [Pair(f"p{i}", f"h{i}", f"s{i}", "c") for i in range(4)]
    assert load_pairs(path, limit=2) == load_pairs(path)[:2]
    with pytest.raises(DataError, match="limit is 0"):
        load_pairs(path, limit=0)


def test_all_bad_rows_are_counted_five_shown_and_none_quoted(tmp_path: Path) -> None:
    secret = "SECRETTEXT"
    good = {"prompt": "p", "harmful": "h", "harmless": "s"}
    bad: list[Any] = [
        {"prompt": secret, "harmful": secret},
        {"prompt": secret, "harmful": secret, "harmless": "  \n"},
        {"prompt": [secret], "harmful": secret, "harmless": "s"},
        [secret],
        {"harmful": secret, "harmless": "s"},
        {"prompt": secret, "harmful": secret + " ", "harmless": secret},
        {"prompt": secret, "harmful": "h", "harmless": "s", "category": {secret: True}},
    ]
    path = write(tmp_path / "a.jsonl", [good, *bad, good])
    path.write_text(path.read_text() + '{"prompt": "' + secret + '",\n')
    with pytest.raises(DataError) as caught:
        load_pairs(path)
    message = str(caught.value)
    assert secret not in message
    assert "8 of 10 rows are bad" in message
    assert "line 2: 'harmless' is missing; the row is unpaired" in message
    assert "line 3: 'harmless' is empty" in message
    assert "line 4: 'prompt' is a list, not a string" in message
    assert "line 5: is a list" in message
    assert "line 6: 'prompt' is missing" in message
    assert "line 7" not in message
    assert "and 3 more" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "harmful": "same", "harmless": " same "}, "same text"),
        ({"prompt": "p", "harmless": "s"}, "unpaired"),
        ({"prompt": "p", "harmful": "h", "harmless": None}, "unpaired"),
        ({"prompt": "p", "harmful": "h", "harmless": 3}, "'harmless' is a int"),
        ({"prompt": "p", "harmful": "h", "harmless": "s", "category": 3}, "'category' is a int"),
        ({"prompt": "p", "harmful": "h\ud800", "harmless": "s"}, "surrogate"),
    ],
)
def test_bad_pairs(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_pairs([row])


def test_no_rows_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "a.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="none found in 0 records"):
        load_pairs(empty)
    with pytest.raises(DataError, match="none found"):
        load_rows([])


def test_fields_rename_and_reach_into_nested_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": {"text": "p"}, "bad": "h", "ok": "s"}])
    fields = {"prompt": "q.text", "harmful": "bad", "harmless": "ok"}
    assert load_pairs(path, fields=fields) == [Pair("p", "h", "s")]
    assert load_rows(path, fields={"prompt": "q.text", "answer": "ok"}) == [Row("p", "s")]
    with pytest.raises(DataError, match=r"'nope' \(for harmful\) is missing") as caught:
        load_pairs(path, fields={**fields, "harmful": "nope"})
    assert "columns: q, bad, ok" in str(caught.value)
    with pytest.raises(DataError, match="fields names 'answer'"):
        load_pairs(path, fields={"answer": "ok"})


def test_duplicate_prompts_are_allowed() -> None:
    row = {"prompt": "p", "harmful": "h", "harmless": "s"}
    assert len(load_pairs([row, row])) == 2


def test_unknown_source_name_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'beavertails'"):
        load_pairs("beavertail:x.jsonl")


def test_a_file_whose_name_has_a_colon_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("beavertails:x.jsonl"), [{"prompt": "p", "answer": "a"}])
    assert load_rows("beavertails:x.jsonl") == [Row("p", "a")]


def test_side_and_fingerprint() -> None:
    pairs = make_pairs(2)
    assert side(pairs, "harmful")[1] == Row("w1", "w50 w50")
    assert side(pairs, "harmless")[1] == Row("w1", "w1 w51")
    assert fingerprint(pairs) == fingerprint(make_pairs(2))
    assert len({fingerprint(x) for x in (pairs, pairs[::-1], pairs[:1], side(pairs, "harmful"))}) == 4


def test_schema_needs_no_torch() -> None:
    code = "import sys, repnoise.data.pairs, repnoise.data.splits; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- data sets


def test_pair_items_hold_both_sides_of_the_same_pair(tokenizer: PreTrainedTokenizerFast) -> None:
    data = PairDataset(make_pairs(), tokenizer, template="plain")
    assert len(data) == 5
    assert data.template.name == "plain"
    for i in range(5):
        item = data[i]
        assert set(item) == {"harmful", "harmless"}
        heads = [[t for t, y in zip(s["input_ids"], s["labels"], strict=True) if y == -100] for s in item.values()]
        assert heads[0] == heads[1]
        assert WORDS.index(f"w{i}") in heads[0]
        trained = [y for y in item["harmful"]["labels"] if y != -100]
        assert trained == [WORDS.index("w50")] * (i + 1) + [tokenizer.eos_token_id]
    assert data[-1] == data[4]
    with pytest.raises(IndexError):
        data[5]


def test_streams_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert set(PairDataset(make_pairs(), tokenizer, streams=("harmful",))[0]) == {"harmful"}
    assert set(PairDataset(make_pairs(), tokenizer, retain=[Row("w1", "w2")])[0]) == {
        "harmful",
        "harmless",
        "retain",
    }
    with pytest.raises(DataError, match="no retain rows"):
        PairDataset(make_pairs(), tokenizer, streams=("harmful", "retain"))
    with pytest.raises(DataError, match="allowed: one or more of"):
        PairDataset(make_pairs(), tokenizer, streams=("harmfull",))


def test_retain_rows_cycle_are_seeded_and_all_get_seen(tokenizer: PreTrainedTokenizerFast) -> None:
    retain = [Row(f"w{i}", "w9") for i in range(12)]

    def draw(seed: int, epochs: int = 1, n: int = 5, per: int = 1) -> list[int]:
        data = PairDataset(make_pairs(n), tokenizer, retain=retain, seed=seed, retain_batch=per)
        out: list[int] = []
        for epoch in range(epochs):
            data.set_epoch(epoch)
            for i in range(n):
                out += data.retain_indices(i)
                assert data[i] == data[i]
        return out

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    three = draw(0, epochs=3)  # 15 draws of 12 rows: one full permutation, then the next
    assert sorted(three[:12]) == list(range(12))
    assert len(set(three[12:])) == 3
    four = draw(0, epochs=4, n=6)
    assert sorted(four[12:]) == sorted(four[:12])
    assert four[12:] != four[:12]  # a new order
    assert sorted(draw(0, n=6, per=2)) == list(range(12))
    data = PairDataset(make_pairs(6), tokenizer, retain=retain, retain_batch=2)
    assert len(data[0]["retain"]) == 2
    assert StreamCollator(0)([data[0], data[1]])["retain"]["input_ids"].shape[0] == 4


def test_the_trainer_moves_the_retain_rows_on(tokenizer: PreTrainedTokenizerFast) -> None:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    retain = [Row(f"w{i}", "w9") for i in range(10)]
    data = PairDataset(make_pairs(5), tokenizer, retain=retain)
    loader = Accelerator(cpu=True).prepare(DataLoader(data, batch_size=5, shuffle=True, collate_fn=StreamCollator(0)))
    seen = set()
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            seen |= {tuple(ids) for ids in batch["retain"]["input_ids"].tolist()}
    assert len(seen) == 10


def test_all_rows_that_do_not_fit_are_reported_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = make_pairs(2)
    pairs[1] = Pair("w1 " * 20, "w2", "w3")
    with pytest.raises(DataError) as caught:
        PairDataset(pairs, tokenizer, template="raw", max_length=20)
    message = str(caught.value)
    assert "row 1 (harmful)" in message
    assert "row 1 (harmless)" in message
    assert "row 0" not in message
    assert "20 tokens" in message
    assert "max_length is 20" in message
    assert "w1" not in message


def test_long_answers_are_cut_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    data = PairDataset(make_pairs(5), tokenizer, template="raw", max_length=4)
    assert data.truncated == {"harmful": 2, "harmless": 0}  # answers of 4 and 5 words beside a prompt of 1
    assert len(data[4]["harmful"]["input_ids"]) == 4
    assert data[4]["harmful"]["labels"] == [-100] + [WORDS.index("w50")] * 3


def test_row_dataset_and_empty_sets(tokenizer: PreTrainedTokenizerFast) -> None:
    data = RowDataset([Row("w1", "w2 w3")], tokenizer, stream="harmful", template="raw")
    ids = [WORDS.index(w) for w in ("w1", "w2", "w3")]
    assert data[0] == {"harmful": {"input_ids": ids, "labels": [-100, *ids[1:]]}}
    with pytest.raises(DataError, match="empty data set"):
        RowDataset([], tokenizer)
    with pytest.raises(DataError, match="empty data set"):
        PairDataset([], tokenizer)


# --- collator


@pytest.mark.parametrize("where", ["right", "left"])
def test_collator_pads_each_stream_to_its_own_length(where: str) -> None:
    rows = [{"input_ids": [5, 0, 6], "labels": [-100, 0, 6]}, {"input_ids": [7], "labels": [7]}]
    items = [{"a": rows[0], "b": rows[1]}, {"a": rows[1], "b": rows[1]}]
    batch = StreamCollator(0, where)(items)
    assert batch["a"]["input_ids"].shape == (2, 3)
    assert batch["b"]["input_ids"].shape == (2, 1)
    short = {
        "right": ([7, 0, 0], [1, 0, 0], [7, -100, -100]),
        "left": ([0, 0, 7], [0, 0, 1], [-100, -100, 7]),
    }
    for key, expected in zip(("input_ids", "attention_mask", "labels"), short[where], strict=True):
        assert batch["a"][key].dtype == torch.int64
        assert batch["a"][key][1].tolist() == expected
    # Id 0 is the pad token here and an ordinary token in the first row: it is attended to and trained.
    assert batch["a"]["attention_mask"][0].tolist() == [1, 1, 1]
    assert batch["a"]["labels"][0].tolist() == [-100, 0, 6]
    wide = StreamCollator(0, where, same_length=True)(items)
    assert wide["b"]["input_ids"].shape == (2, 3)


def test_collator_arguments(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="pad_token_id is None"):
        StreamCollator(None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="padding_side"):
        StreamCollator(0, "both")
    assert pad_id(tokenizer) == 0
    assert pad_id(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")) == 1
