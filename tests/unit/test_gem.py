"""The text-to-data sources: columns of every release, the paper's prompts, bad records."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from repnoise.data import Row, load_pairs, load_rows, normalise
from repnoise.data.sources import SOURCES
from repnoise.errors import DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets (../shared/data) are not here")

DESCRIPTION = "Description: {}\nMeaning Representation:"
TRIPLES = [["Blob", "KIND", "café"], ["Blob", "AREA", "north"]]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_builtin() -> None:
    assert {"e2e", "viggo", "dart", "cacapo", "weather"} <= set(SOURCES.names())


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("e2e", {"mr": "name[Blob]", "ref": " Blob is open. "}, Row(DESCRIPTION.format("Blob is open."), "name[Blob]")),
        (
            "e2e",
            {"gem_id": "1", "meaning_representation": "name[Blob]", "target": "Blob.", "references": ["Blob."]},
            Row(DESCRIPTION.format("Blob."), "name[Blob]"),
        ),
        (
            "viggo",
            {
                "gem_id": "1",
                "meaning_representation": "inform(name[Blob])",
                "target": "Blob!",
                "references": "['Blob!']",
            },
            Row(DESCRIPTION.format("Blob!"), "inform(name[Blob])"),
        ),
        (
            "dart",
            {"tripleset": TRIPLES, "target": "Blob is a café."},
            Row(DESCRIPTION.format("Blob is a café."), str(TRIPLES)),
        ),
        (
            "dart",
            {"tripleset": str(TRIPLES), "target": "Blob is a café."},
            Row(DESCRIPTION.format("Blob is a café."), str(TRIPLES)),
        ),
        ("cacapo", {"input": "place[Blob]", "output": "In Blob."}, Row(DESCRIPTION.format("In Blob."), "place[Blob]")),
        (
            "weather",
            {"user_query": "Rain?", "tree_str_mr": "[__DG_YES__ ]", "response": "[__DG_YES__ yes ]"},
            Row("User Query: Rain?\nTree String:", "[__DG_YES__ ]"),
        ),
    ],
)
def test_the_papers_prompt_and_answer(tmp_path: Path, name: str, record: dict[str, Any], expected: Row) -> None:
    path = write_lines(tmp_path / "a.jsonl", [record])
    assert load_rows(f"{name}:{path}") == [expected]


def test_references(tmp_path: Path) -> None:
    rows = [{"mr": "a", "ref": "one"}, {"mr": "a", "ref": "two"}, {"mr": "b", "ref": "three"}]
    source = f"e2e:{write_csv(tmp_path / 'a.csv', rows)}"
    assert [row.answer for row in load_rows(source)] == ["a", "a", "b"]
    first = load_rows(source, options={"references": "first"})
    assert first == [Row(DESCRIPTION.format("one"), "a"), Row(DESCRIPTION.format("three"), "b")]
    assert load_rows(source, options={"references": "first"}) == first, "nothing is remembered from call to call"
    with pytest.raises(DataError, match="references is 'best'; allowed: all, first"):
        load_rows(source, options={"references": "best"})


def test_weather_tsv_has_no_header_and_no_quoting(tmp_path: Path) -> None:
    path = tmp_path / "val.tsv"
    path.write_text('1\tRain "today"?\t[__DG_YES__ ]\tyes\r\n2\tSun?\t[__DG_NO__ ]\tno "\n', encoding="utf-8")
    source = f"weather:{path}"
    assert load_rows(source) == [
        Row('User Query: Rain "today"?\nTree String:', "[__DG_YES__ ]"),
        Row("User Query: Sun?\nTree String:", "[__DG_NO__ ]"),
    ]
    with pytest.raises(DataError, match="is one split; leave `split` out"):
        load_rows(source, split="test")
    path.write_text("1\tRain?\t[__DG_YES__ ]\tyes\n2\tSun?\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"1 of 2 row is bad\.\n  line 2: has 2 columns, not 4"):
        load_rows(source)
    path.write_text("id\tuser_query\ttree_str_mr\tresponse\n", encoding="utf-8")
    with pytest.raises(DataError, match="has a header"):
        load_rows(source)
    path.write_bytes(b"1\t\xff\tx\ty\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load_rows(source)
    with pytest.raises(DataError, match="cannot read"):
        load_rows(f"weather:{tmp_path / 'none.tsv'}")


def test_bad_records_are_counted_and_not_quoted(tmp_path: Path) -> None:
    rows = [{"mr": "a", "ref": "secret"}, {"mr": "a"}, {"mr": 3, "ref": "secret"}, {"mr": " ", "ref": "secret"}]
    source = f"e2e:{write_lines(tmp_path / 'a.jsonl', rows)}"
    wanted = r"(?s)3 of 4 rows are bad.*line 2: 'ref' or 'target' is missing.*'mr' is a int.*'mr' is empty"
    with pytest.raises(DataError, match=wanted) as error:
        load_rows(source)
    assert "secret" not in str(error.value)
    with pytest.raises(DataError, match="'tripleset' is missing or no list"):
        load_rows(f"dart:{write_lines(tmp_path / 'b.jsonl', [{'target': 'x', 'tripleset': []}])}")
    with pytest.raises(DataError, match="gives no pairs"):
        load_pairs(source)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def fake(path: str, **options: Any) -> Any:
        calls.append((path, options["split"], options["revision"]))
        return datasets.Dataset.from_list([{"tripleset": TRIPLES, "target": "Blob is a café."}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    (row,) = load_rows("dart:hub:GEM/dart@refs/convert/parquet", split="test")
    assert row.answer == str(TRIPLES)
    assert calls == [("GEM/dart", "test", "refs/convert/parquet")]


@needs_shared
def test_real_e2e() -> None:
    train = load_rows(f"e2e:{SHARED / 'e2e_nlg' / 'devset.csv'}")
    test = load_rows(f"e2e:{SHARED / 'e2e_nlg' / 'testset_w_refs.csv'}")
    assert (len(train), len(test)) == (4672, 4693)
    assert not {normalise(row.prompt) for row in train} & {normalise(row.prompt) for row in test}
    first = load_rows(f"e2e:{SHARED / 'e2e_nlg' / 'testset_w_refs.csv'}", options={"references": "first"})
    assert len(first) == len({row.answer for row in test}) == 630


@needs_shared
def test_real_weather() -> None:
    rows = load_rows(f"weather:{SHARED / 'conversational_weather' / 'test.tsv'}")
    assert len(rows) == 3121
    assert all(row.answer.startswith("[__D") for row in rows)
