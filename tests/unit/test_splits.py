"""Disjointness, splits, withheld categories."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repnoise.data import Pair, Row, audit, normalise, require_disjoint, split, withhold
from repnoise.errors import DataError


def rows(*prompts: str) -> list[Row]:
    return [Row(prompt, "answer") for prompt in prompts]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("How do I?", "  how DO i", True),
        ("a-b_c", "a b c", True),
        ("Straße", "STRASSE", True),
        ("ﬁre", "fire", True),
        ("What is 1?", "What is 2?", False),
        ("???", "!!!", False),
        ("火", "水", False),
    ],
)
def test_normal_form(a: str, b: str, same: bool) -> None:
    assert (normalise(a) == normalise(b)) is same


def test_audit_counts_rows_and_prompts() -> None:
    pairs = [Pair("Alpha?", "h", "s"), Pair("beta", "h", "s")]
    record = audit(defence=pairs, attack=rows("alpha", "ALPHA!", "gamma"), test=["delta"])
    assert record["sets"]["attack"] == {"rows": 3, "distinct": 2}
    assert record["overlaps"] == [{"sets": ["defence", "attack"], "prompts": 1, "rows": {"defence": 1, "attack": 2}}]
    assert record["disjoint"] is False
    json.dumps(record)  # goes into the manifest


def test_overlap_raises_without_texts_unless_allowed() -> None:
    sets = {"defence": rows("secret one", "b"), "attack": rows("c"), "test": rows("Secret one!", "d", "e")}
    with pytest.raises(DataError) as caught:
        require_disjoint(**sets)
    message = str(caught.value)
    assert "defence and test share 1 prompts (1 of 2 rows of defence, 1 of 3 rows of test)" in message
    assert "attack" not in message
    assert "allow_overlap: true" in message
    assert "ecret" not in message
    record = require_disjoint(**sets, allow_overlap=True)
    assert record["allow_overlap"] is True
    assert record["disjoint"] is False
    assert "ecret" not in json.dumps(record)
    clean = require_disjoint(defence=["a"], attack=["b"])
    assert clean["disjoint"] is True
    assert clean["overlaps"] == []


def test_split_is_seeded_and_ignores_the_order_of_the_items() -> None:
    items = rows(*(f"p{i}" for i in range(50)))
    sizes = {"defence": 0.5, "attack": 0.3, "test": 0.2}
    parts = split(items, sizes, seed=1)
    assert {name: len(part) for name, part in parts.items()} == {"defence": 25, "attack": 15, "test": 10}
    assert split(items[::-1], sizes, seed=1) == parts
    assert split(items, sizes, seed=2) != parts
    require_disjoint(**parts)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 15), min_size=12, max_size=60),
    st.integers(0, 5),
    st.sampled_from([(0.5, 0.5), (0.6, 0.2), (4, 0.5), (3, 3)]),
)
def test_law_equal_prompts_stay_together_and_nothing_is_invented(
    numbers: list[int], seed: int, sizes: tuple[float, float]
) -> None:
    items = [Row(f"Prompt {n}" + "!" * (i % 2), f"answer {i}") for i, n in enumerate(numbers)]
    try:
        parts = split(items, {"a": sizes[0], "b": sizes[1]}, seed=seed)
    except DataError:  # groups too large for what was asked
        return
    answers = [row.answer for part in parts.values() for row in part]
    assert len(answers) == len(set(answers))
    assert audit(**parts)["disjoint"]
    if sizes == (0.5, 0.5):
        assert len(answers) == len(items)
    for name, size in zip("ab", sizes, strict=True):
        if isinstance(size, int):
            assert len(parts[name]) == size


def test_split_by_category() -> None:
    pairs = [Pair(f"p{i}", "h", "s", f"c{i % 4}") for i in range(40)]
    parts = split(pairs, {"a": 0.5, "b": 0.5}, by="category")
    assert len(parts["a"]) == len(parts["b"]) == 20
    assert not {p.category for p in parts["a"]} & {p.category for p in parts["b"]}
    by_function = split(pairs, {"a": 0.5, "b": 0.5}, by=lambda pair: pair.category or "")
    assert by_function == parts
    with pytest.raises(DataError, match="cannot split by 'category'"):
        split(rows("a", "b"), {"a": 1, "b": 1}, by="category")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"a": 0.7, "b": 0.5}, "at most 1.0"),
        ({"a": 0}, "sizes are"),
        ({"a": -3}, "sizes are"),
        ({}, "sizes are"),
        ({"a": 8, "b": 8}, "ask for 16 of 10"),
        ({"a": 0.99, "b": 0.01}, "part 'b' gets 0"),
    ],
)
def test_sizes_that_cannot_be_met(sizes: dict[str, float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        split(rows(*(f"p{i}" for i in range(10))), sizes)


def test_a_number_is_exact_or_an_error() -> None:
    with pytest.raises(DataError, match="part 'a' gets 0 of 3 items: there are 10 items in 2 groups"):
        split(rows(*["x"] * 5, *["y"] * 5), {"a": 3})
    with pytest.raises(DataError, match="part 'a' gets 2 of 3 items"):
        split(rows(*"xxyyzz"), {"a": 3})


def test_withhold() -> None:
    pairs = [Pair("p1", "h", "s", "drugs"), Pair("p2", "h", "s", "theft"), Pair("p3", "h", "s")]
    kept, held = withhold(pairs, ["drugs"])
    assert [p.prompt for p in kept] == ["p2", "p3"]
    assert [p.prompt for p in held] == ["p1"]
    twice = Pair("P1!", "h", "s", "theft")  # the same prompt: the defence would have seen it
    assert withhold([*pairs, twice], ["drugs"]) == (kept, held)
    with pytest.raises(DataError, match=r"'drug'.*Did you mean 'drugs'.*Categories there: drugs, theft"):
        withhold(pairs, ["drug"])
    with pytest.raises(DataError, match="leaves no pairs"):
        withhold(pairs[:2], ["drugs", "theft"])
    with pytest.raises(DataError, match="the source gives no category"):
        withhold(pairs[2:], ["drugs"])
