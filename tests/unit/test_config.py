"""Recipes as data: numbers, overrides, errors, sizes, round trips."""

from __future__ import annotations

from typing import Any

import pytest

from repnoise.errors import ConfigError
from repnoise.recipes.checking import check_recipe, dump
from repnoise.recipes.reading import parse_yaml, raw_recipe, recipe_names
from repnoise.study.resolve import resolve

FILES: dict[str, Any] = {"name": "files", "pairs": "p.jsonl", "retain": "r.jsonl"}


def recipe(**changes: Any) -> Any:
    found, errors = check_recipe({"study": "s", "model": "m", "data": FILES, **changes})
    assert errors == []
    return found


def errors_of(**changes: Any) -> list[str]:
    found, errors = check_recipe({"study": "s", "model": "m", "data": FILES, **changes})
    assert found is None
    return errors


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("1.5e-3", 1.5e-3),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2", -2),
        ("16", 16),
        ("null", None),
        ("[1e-4, 3]", [1e-4, 3]),
        ("1e-4x", "1e-4x"),
        ("v1.0", "v1.0"),
        ("true", True),
    ],
)
def test_numbers_are_numbers(text: str, value: Any) -> None:
    found = parse_yaml(text, "text")
    assert found == value
    assert type(found) is type(value)
    assert raw_recipe("sandbox", [f"defence.alpha={text}"])["defence"]["alpha"] == value


def test_overrides_reach_into_lists_and_make_what_is_missing() -> None:
    raw = raw_recipe("sandbox", ["attacks.0.steps=7", "defence.train.max_grad_norm=0", "data.seed=3"])
    assert raw["attacks"][0]["steps"] == 7
    assert raw["defence"]["train"]["max_grad_norm"] == 0
    assert raw["data"]["seed"] == 3


def test_every_shipped_recipe_is_right_and_survives_a_round_trip() -> None:
    seen = 0
    for name in recipe_names():
        found = resolve(name)
        again, errors = check_recipe(dump(found))
        assert errors == []
        assert again == found
        assert dump(found)["study"] == name
        seen += 1
    assert seen == 8


def test_cells_are_the_product_of_the_axes() -> None:
    found = recipe(attacks=[{"learning_rate": [1e-4, 1e-3], "steps": 5, "lora_rank": [None, 8], "seeds": [0, 1, 2]}])
    cells = list(found.attacks[0].cells(["a", "b"]))
    assert len(cells) == 2 * 2 * 2 * 3
    assert [cell["seed"] for cell in cells[:3]] == [0, 1, 2]
    assert {cell["harm"] for cell in cells} == {"a", "b"}
    only = recipe(attacks=[{"harm": "a"}])
    assert {cell["harm"] for cell in only.attacks[0].cells(["a", "b"])} == {"a"}


def test_sizes_are_written_out() -> None:
    assert recipe().data.sizes == {"defence": 0.5, "attack": 0.25, "test": 0.25}
    assert recipe().data.harmless_sizes == {"retain": 0.8, "test": 0.2}
    own = recipe(data={**FILES, "attack": "a.jsonl", "test": "t.jsonl", "harmless_test": "h.jsonl"}).data
    assert own.sizes == {"defence": 1.0}  # nothing of the defence's pairs is thrown away
    assert own.harmless_sizes == {"retain": 1.0}
    numbers = recipe(data={**FILES, "sizes": {"defence": 10, "attack": 5, "test": 0.5}}).data.sizes
    assert [type(size) for size in numbers.values()] == [int, int, float]


def test_sources_are_text_or_a_mapping() -> None:
    data = recipe(data={**FILES, "retain": {"source": "r.jsonl", "limit": 3, "fields": {"answer": "text"}}}).data
    assert data.pairs.source == "p.jsonl"
    assert data.retain.limit == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"name": "files"}},
            "data: name: files also needs pairs and retain, a path or hub:owner/name",
        ),
        ({"data": {"pairs": "p"}}, "data: name: sandbox brings its own data; drop pairs or set name: files"),
        ({"data": {**FILES, "sizes": {"defence": 1}}}, "data: sizes lacks attack, test; give every part"),
        (
            {"data": {**FILES, "test": "t", "sizes": {"defence": 1, "attack": 1, "test": 1}}},
            "data: sizes names test, which has a source of its own",
        ),
        ({"data": {**FILES, "sizes": {"defence": -1}}}, "data.sizes.defence: must be a share (0.5) or"),
        (
            {"data": {**FILES, "pairs": {"source": "x", "limt": 1}}},
            "data.pairs.limt: unknown key. Did you mean 'limit'?",
        ),
        ({"attacks": []}, "attacks: List should have at least 1 item"),
        ({"attacks": [{"seeds": []}]}, "attacks.0: seeds: an empty list leaves no attack"),
        (
            {"attacks": [{"steps": -1}]},
            "attacks.0.steps.0: Input should be greater than or equal to 0 (got -1)",
        ),
        ({"controls": ["random", "random"]}, "controls: random, random names one twice; give each once"),
        ({"model": "sandbox:aligned", "revision": "main"}, "revision: the sandbox comes with the package; drop it"),
        ({"attacks": [{"train": {"max_steps": 1}}]}, "attacks.0: train.max_steps: an axis of the attack sets it"),
        ({"controls": ["ignorant"]}, "an ignorant control exists for model: sandbox:... only"),
        ({"evaluations": ["sandbox"]}, "evaluations: sandbox asks about data.name: sandbox only"),
        ({"study": "../up"}, "study: "),
        ({"dtype": "float8"}, "dtype: Input should be 'float32', 'bfloat16' or 'auto' (got 'float8')"),
        ({"sede": 1}, "sede: unknown key. Did you mean 'seed'? Allowed: study, about, model"),
    ],
)
def test_errors_name_their_field(changes: dict[str, Any], message: str) -> None:
    (error,) = errors_of(**changes)
    assert message in error


def test_a_missing_field_is_named() -> None:
    _, errors = check_recipe({})
    assert errors == ["study: is required and not there", "model: is required and not there"]


def test_errors_of_plugins_and_of_the_structure_come_together() -> None:
    wrong = ["studdy=1", "defence.alpah=1", "attacks.0.steps=none", "attacks.0.rank=1"]
    with pytest.raises(ConfigError) as caught:
        resolve("sandbox", wrong)
    for part in ("has 4 errors", "studdy", "defence.alpah", "attacks.0.steps.0", "attacks.0.rank"):
        assert part in str(caught.value)


def test_an_unknown_plugin_is_named() -> None:
    with pytest.raises(ConfigError, match=r"defence: unknown defence 'repnose'. Did you mean 'repnoise'"):
        resolve("sandbox", ["defence.name=repnose"])
    with pytest.raises(ConfigError, match=r"attacks.0: unknown attack 'sfd'. Did you mean 'sft'"):
        resolve("sandbox", ["attacks.0.name=sfd"])
