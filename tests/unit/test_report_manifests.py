"""Manifests, rows and attacks as records: what the report takes from files, and what it survives."""

from __future__ import annotations

from typing import Any

import pytest

from repnoise.report.manifests import Data, Manifest, Row, Settings, varying
from repnoise.report.records import Cut


def settings(**more: Any) -> Settings:
    return Settings.of({"name": "sft", "harm": "knowledge", "learning_rate": 1e-3, "steps": 100, **more})


def manifest(**more: Any) -> Manifest:
    return Manifest.of({"stage": "attack", "status": "done", **more})


def test_a_row_takes_the_keys_that_it_knows_and_ignores_the_others():
    found = Row.of({"evaluation": "e", "metric": "m", "value": 0.5, "n": 4, "every": 3, "colour": "red", "seed": 7})
    assert found == Row("e", "m", 0.5, 4, every=3)


def test_a_row_without_a_number_is_refused():
    with pytest.raises(TypeError, match="value"):
        Row.of({"evaluation": "e", "metric": "m", "n": 4})


def test_attacks_that_differ_in_their_seed_only_are_one_attack():
    a, b = settings(seed=0), settings(seed=1)
    assert a.key == b.key
    assert "seed" not in a.recorded


def test_the_order_of_the_settings_does_not_matter():
    a = Settings.of({"name": "sft", "harm": "h", "steps": 1})
    b = Settings.of({"steps": 1, "harm": "h", "name": "sft"})
    assert a.key == b.key


@pytest.mark.parametrize("changed", [{"harm": "other"}, {"steps": 101}, {"lora_rank": 8}, {"unknown": [1, 2]}])
def test_any_other_setting_makes_another_attack(changed: dict[str, Any]):
    assert settings().key != settings(**changed).key


def test_settings_that_the_report_does_not_know_are_kept():
    found = settings(strength=0.3, recorded="yes")
    assert found.recorded["strength"] == 0.3
    assert found.recorded["recorded"] == "yes"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "sft, learning rate 0.001, 100 steps, full fine-tuning"),
        ({"lora_rank": 8}, "sft, learning rate 0.001, 100 steps, LoRA rank 8"),
        ({"lora_rank": 0}, "sft, learning rate 0.001, 100 steps, full fine-tuning"),
        ({"steps": None}, "sft, learning rate 0.001, full fine-tuning"),
        ({"learning_rate": None}, "sft, 100 steps, full fine-tuning"),
        ({"learning_rate": 3e-5}, "sft, learning rate 3e-05, 100 steps, full fine-tuning"),
        ({"learning_rate": 0.0}, "sft, learning rate 0, 100 steps, full fine-tuning"),
    ],
)
def test_an_attack_in_words(more: dict[str, Any], words: str):
    assert settings(**more).label() == words


def test_what_varies_is_told_and_what_is_absent_is_not():
    assert settings(batch_size=4).label(["batch_size", "template"]).endswith("full fine-tuning, batch_size 4")


def test_varying_names_what_the_label_leaves_out():
    found = varying([settings(batch_size=4, z=1), settings(batch_size=8, z=1), settings(learning_rate=1.0, harm="b")])
    assert found == ["batch_size", "z"]


def test_nothing_varies_in_one_attack_or_in_none():
    assert varying([]) == []
    assert varying([settings(batch_size=4)]) == []


def test_lists_and_mappings_can_vary():
    assert varying([settings(layers=[1, 2]), settings(layers=[1, 3])]) == ["layers"]
    assert varying([settings(layers={"a": 1, "b": 2}), settings(layers={"b": 2, "a": 1})]) == []


@pytest.mark.parametrize("record", [None, [], "text", 3])
def test_data_of_anything_else_are_empty(record: Any):
    assert Data.of(record) == Data()


def test_no_overlap_is_not_the_same_as_no_audit():
    assert Data.of({"audit": {"overlaps": []}}).overlaps == []
    assert Data.of({}).overlaps is None
    assert Data.of({"harmless_audit": {}}).harmless_overlaps == []


def test_overlaps_in_words():
    audit = {"overlaps": [{"sets": ["defence", "test"], "prompts": 3}]}
    assert Data.of({"audit": audit}).overlaps == ["defence and test share 3 prompts"]


def test_sizes_and_cuts():
    found = Data.of(
        {
            "audit": {"sets": {"defence": {"rows": 12}}},
            "harmless_audit": {"sets": {"retain": {"rows": "7"}}},
            "truncated": {"defence": {"rows": 12, "answers_cut": 2, "prompts_cut": 1}},
            "template": "chat",
            "harms": {"a+b <c>": "withheld"},
        }
    )
    assert (found.pairs, found.retain, found.template) == (12, 7, "chat")
    assert found.cut == [Cut("defence", 12, 2, 1)]
    assert found.harms == {"a+b <c>": "withheld"}


@pytest.mark.parametrize("sets", [None, {}, {"defence": 3}, {"defence": {}}])
def test_a_size_that_is_not_recorded_is_none(sets: Any):
    assert Data.of({"audit": {"sets": sets}}).pairs is None


def test_an_attack_is_read_from_the_arguments():
    found = manifest(arguments={"attack": {"name": "sft", "harm": "h"}, "seed": 3, "covers": ["mixed"]})
    assert found.attack is not None
    assert (found.attack.name, found.attack.harm, found.seed, found.covers) == ("sft", "h", 3, ("mixed",))


@pytest.mark.parametrize(
    "arguments",
    [
        None,
        {},
        {"attack": "sft", "seed": 0},
        {"attack": {"name": "sft"}, "seed": 0},
        {"attack": {"harm": "h"}, "seed": 0},
        {"attack": {"name": None, "harm": "h"}, "seed": 0},
        {"attack": {"name": "sft", "harm": 3}, "seed": 0},
        {"attack": {"name": "sft", "harm": "h"}},
        {"attack": {"name": "sft", "harm": "h"}, "seed": "0"},
    ],
)
def test_an_attack_without_name_harm_or_seed_is_none(arguments: Any):
    found = manifest(arguments=arguments)
    assert found.attack is None
    assert found.seed is None


def test_an_empty_manifest_is_read():
    found = Manifest.of({})
    assert (found.stage, found.status, found.seconds, found.train, found.given) == ("None", None, 0.0, None, False)
    assert found.versions == {}


def test_a_defence_that_trains_nothing_has_no_arguments_and_one_that_does_has_some():
    assert manifest(arguments={"defence": {}}).train == {}
    assert manifest(arguments={"defence": {"train": {"learning_rate": 1}}}).train == {"learning_rate": 1}
    assert manifest(arguments={"defence": "x"}).train is None
