"""Every source: formats, the two data sets of the paper, the hub, third-party sources."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from repnoise.data import Pair, Row, load_pairs, load_rows
from repnoise.data.refusals import REFUSALS, refusal_for
from repnoise.data.sources import SOURCES, Source
from repnoise.data.sources.beavertails import GROUP_OF, GROUPS
from repnoise.errors import DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets (../shared/data) are not here")

ROWS = [
    {"prompt": "p1", "harmful": "h, 1", "harmless": 's "1"', "category": "c", "split": "train"},
    {"prompt": "p2\nline", "harmful": "h2", "harmless": "ü 火", "category": "", "split": "test"},
]
PAIRS = [Pair("p1", "h, 1", 's "1"', "c"), Pair("p2\nline", "h2", "ü 火")]


def write(path: Path) -> Path:
    """`ROWS` in the format of the suffix."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    if path.name.endswith(".gz"):
        with gzip.open(path, "wt", encoding="utf-8") as stream:
            stream.write(lines)
    elif path.suffix == ".jsonl":
        path.write_text(lines, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8-sig")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"])
def test_formats_agree(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    assert load_pairs(path) == PAIRS
    assert load_pairs(f"file:{path}") == PAIRS
    assert load_pairs(path, split="test") == PAIRS[1:]
    assert load_rows(path, fields={"answer": "harmless"})[0] == Row("p1", 's "1"', "c")
    with pytest.raises(DataError, match=r"no row has split 'dev'.*test, train"):
        load_pairs(path, split="dev")


def test_json_lines_under_the_wrong_suffix_and_an_object_with_one_array(tmp_path: Path) -> None:
    lines = tmp_path / "a.json"
    lines.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert load_pairs(lines) == PAIRS
    wrapped = tmp_path / "b.json"
    wrapped.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert load_pairs(wrapped) == PAIRS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"x", r"cannot read '.txt'; allowed: .jsonl"),
        ("a", b"x", "a file without a suffix"),
        ("a.json", b"3", "holds a int"),
        ("a.json", b'{"a": 1}', "0 lists"),
        ("a.json", b"[{", "not valid JSON"),
        ("a.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
        ("a.jsonl.gz", b"no gzip", "damaged"),
        ("a.parquet", b"no parquet", "not a Parquet file"),
        ("a.csv", b"prompt,answer\np,a,extra\n", "line 2: has more columns than the header"),
        ("a.csv", b"prompt,answer\np\n", "line 2: 'answer' is missing"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_rows(tmp_path / name)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data file not found"):
        load_rows(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        load_rows(tmp_path)


# --- DecodingTrust


def decoding_trust_row(kind: str, prompt: str, text: str, **scores: float) -> dict[str, Any]:
    return {
        "type": kind,
        "prompt": {"text": prompt},
        "continuation": {"text": text, "toxicity": 0.9, **scores},
    }


@pytest.fixture
def decoding_trust(tmp_path: Path) -> Path:
    data = [
        decoding_trust_row("toxic", "one", " bad", insult=0.9, threat=0.2),
        decoding_trust_row("non_toxic", "two", " good"),
        decoding_trust_row("toxic_test", "three", " worse"),
        decoding_trust_row("toxic", "four", " awful", threat=0.3),
    ]
    path = tmp_path / "training_dataset.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    stored = {**data[0], "refusal": "Prompt: one\nContinuation: I would rather not.\n"}
    (tmp_path / "with_refusals.json").write_text(json.dumps([stored]))
    return path


def test_decoding_trust(decoding_trust: Path) -> None:
    source = f"decoding_trust:{decoding_trust}"
    neutral = {prompt: " " + refusal_for(prompt) for prompt in ("one", "three", "four")}
    assert load_pairs(source) == [
        Pair("one", " bad", " I would rather not.", "insult"),
        Pair("four", " awful", neutral["four"], "threat"),
    ]
    assert load_pairs(source, split="train") == load_pairs(source)
    assert load_pairs(source, split="test") == [Pair("three", " worse", neutral["three"])]
    assert load_pairs(source, options={"refusals": "none"})[0].harmless == neutral["one"]
    assert load_rows(source) == [Row("two", " good")]


def test_decoding_trust_errors(decoding_trust: Path) -> None:
    source = f"decoding_trust:{decoding_trust}"
    with pytest.raises(DataError, match=r"no split 'dev'; allowed: train, test"):
        load_pairs(source, split="dev")
    with pytest.raises(DataError, match="no option 'refusal'; allowed: refusals"):
        load_pairs(source, options={"refusal": "none"})
    with pytest.raises(DataError, match="fixed layout"):
        load_pairs(source, fields={"prompt": "question"})
    decoding_trust.write_text('{"type": "tox"}\n{"type": "toxic", "prompt": "text"}\n')
    with pytest.raises(DataError, match=r"(?s)line 1: 'type' is missing or none of.*line 2: 'prompt.text' is"):
        load_pairs(source)
    (decoding_trust.parent / "with_refusals.json").write_text('[{"refusal": "x"}]')
    with pytest.raises(DataError, match=r"row 1: 'prompt.text' is missing"):
        load_pairs(source)


@needs_shared
def test_real_decoding_trust() -> None:
    source = f"decoding_trust:{SHARED / 'decoding_trust' / 'training_dataset.jsonl'}"
    pairs = load_pairs(source)
    assert len(pairs) == 351
    assert len(load_pairs(source, split="test")) == 631
    assert len(load_rows(source)) == 735
    assert sum(pair.harmless.strip() in REFUSALS for pair in pairs) == 351 - 107
    assert not any(pair.harmless.lstrip().startswith("Prompt:") for pair in pairs)


# --- BeaverTails


def beavertails_row(prompt: Any, safe: Any, *flags: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response": f"r {prompt}",
        "is_safe": safe,
        "category": {flag: flag in flags for flag in sorted(GROUP_OF, reverse=True)},
    }


def test_beavertails(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    theft = "financial_crime,property_crime,theft"
    data = [
        beavertails_row("one", False, theft, "violence,aiding_and_abetting,incitement"),
        beavertails_row("two", True),
        beavertails_row("three", False),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    source = f"beavertails:{path}"
    assert load_pairs(source) == [
        Pair("one", "r one", refusal_for("one"), theft),
        Pair("three", "r three", refusal_for("three")),
    ]
    assert load_pairs(source, options={"categories": "group"})[0].category == "crime_unethical"
    assert load_rows(source) == [Row("two", "r two")]
    with pytest.raises(DataError, match="allowed: flag, group"):
        load_pairs(source, options={"categories": "groups"})
    path.write_text(json.dumps(beavertails_row("one", "no")) + "\n" + json.dumps(beavertails_row(3, False)))
    with pytest.raises(DataError, match=r"(?s)line 1: 'is_safe' is missing.*line 2: 'prompt' is a int"):
        load_pairs(source)


def test_every_flag_is_in_one_group() -> None:
    assert len(GROUP_OF) == 14
    assert sum(map(len, GROUPS.values())) == 14


@needs_shared
def test_real_beavertails() -> None:
    source = f"beavertails:{SHARED / 'beavertails' / 'sample.jsonl'}"
    assert len(load_pairs(source)) == 994
    assert len(load_rows(source)) == 259
    groups = {pair.category for pair in load_pairs(source, options={"categories": "group"})}
    assert groups == {"privacy_misinformation", "crime_unethical", "other"}


# --- refusals, hub, third parties


def test_refusals_depend_on_the_prompt_alone() -> None:
    assert refusal_for("a prompt") == refusal_for("a prompt")
    assert {refusal_for(f"prompt {i}") for i in range(200)} == set(REFUSALS)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def fake(path: str, **options: Any) -> Any:
        calls.append((path, options["name"], options["split"], options["revision"]))
        if path == "owner/missing":
            raise FileNotFoundError("no such data set")
        table = datasets.Dataset.from_list([{"q": "p1", "a": "x"}, {"q": "p2", "a": "y"}])
        parts = {"train": table} if path == "owner/one" else {"train": table, "test": table}
        return datasets.DatasetDict(parts) if options["split"] is None else table

    monkeypatch.setattr(datasets, "load_dataset", fake)
    fields = {"prompt": "q", "answer": "a"}
    expected = [Row("p1", "x"), Row("p2", "y")]
    assert load_rows("hub:owner/one", fields=fields) == expected
    assert load_rows("hub:owner/two@main#small", split="test", fields=fields, limit=1) == expected[:1]
    assert calls[1] == ("owner/two", "small", "test", "main")
    with pytest.raises(DataError, match="splits train, test; choose one"):
        load_rows("hub:owner/two", fields=fields)
    with pytest.raises(DataError, match=r"cannot load hub data set 'owner/missing'.*no such data set"):
        load_rows("hub:owner/missing", fields=fields)
    with pytest.raises(DataError, match="is not a hub data set"):
        load_rows("hub:a/b/c", fields=fields)


def test_a_new_source_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    SOURCES.names()  # load the built-in ones first
    monkeypatch.setattr(SOURCES, "_classes", dict(SOURCES._classes))

    @SOURCES.register("inline")
    class Inline(Source):
        def records(self) -> Any:
            return iter([("item 1", {"text": self.target}), ("item 2", {})])

        def row(self, record: Any) -> Any:
            return {"prompt": record["text"], "answer": "a"} if record else None

    assert load_rows("inline:hello") == [Row("hello", "a")]
    with pytest.raises(DataError, match="Inline gives no pairs"):
        load_pairs("inline:hello")


def test_builtin_sources() -> None:
    assert {"beavertails", "decoding_trust", "file", "hub"} <= set(SOURCES.names())
