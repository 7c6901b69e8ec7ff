"""Rows to readings, settings to keys and labels, manifests to records: worked out by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from repnoise.report.manifests import Data, Manifest, Row, Settings, varying
from repnoise.report.readings import Reading, categories, judges, pick, shared


def row(value: float = 0.5, **more: Any) -> Row:
    return Row(**{"evaluation": "e", "metric": "m", "n": 4, **more, "value": value})


def value(rows: list[Row], **how: Any) -> float | None:
    found = pick(rows, "m", **how)
    return None if found is None else found.value


# ---------------------------------------------------------------------------------- which row is the final one


def test_a_row_without_a_step_is_the_final_one() -> None:
    assert value([row(0.1, step=50), row(0.2), row(0.3, step=100)], steps=100) == 0.2


def test_without_one_the_last_step_of_the_attack_is() -> None:
    rows = [row(0.1, step=50), row(0.3, step=100)]
    assert value(rows, steps=100) == 0.3
    assert value(rows, steps=70) is None
    assert value(rows) is None


@pytest.mark.parametrize(
    "more",
    [{"metric": "other"}, {"split": "train"}, {"layer": 3}, {"category": "tides"}],
)
def test_rows_of_something_else_do_not_count(more: dict[str, Any]) -> None:
    assert value([row(0.9, **more)]) is None
    assert value([row(0.9, **more), row(0.1)]) == 0.1


def test_a_category_is_asked_for_by_name() -> None:
    rows = [row(0.1), row(0.7, category="tides"), row(0.9, category="lanterns")]
    assert (value(rows, category="tides"), value(rows)) == (0.7, 0.1)
    assert value(rows, category="none") is None


def test_nothing_measured_is_none_and_never_zero() -> None:
    assert pick([], "m") is None


# ---------------------------------------------------------------------------------- whose row it is


def test_the_first_evaluation_by_name_counts_where_several_share_a_metric() -> None:
    rows = [row(0.2, evaluation="b"), row(0.1, evaluation="a")]
    assert value(rows) == value(rows[::-1]) == 0.1


def test_an_evaluation_that_knows_the_truth_comes_first() -> None:
    rows = [row(0.1, evaluation="a", judge="rules"), row(0.2, evaluation="z", judge="ground-truth")]
    assert value(rows) == value(rows[::-1]) == 0.2


def test_the_headline_judge_is_the_first_in_row_order_of_its_evaluation() -> None:
    rows = [row(0.4, judge="strict"), row(0.2, judge="lenient")]
    assert (value(rows), value(rows[::-1])) == (0.4, 0.2)
    assert (value(rows, judge="lenient"), value(rows, judge="nobody")) == (0.2, None)


def test_rows_that_name_no_judge_are_asked_for_by_an_empty_name() -> None:
    assert value([row(0.3), row(0.8, judge="a")], judge="") == 0.3


def test_judges_are_told_headline_first_and_unnamed_ones_not_at_all() -> None:
    rows = [row(judge="z", evaluation="b"), row(judge="a", evaluation="a"), row(judge="c", evaluation="b")]
    assert judges(rows, "m") == ["a", "z", "c"]
    assert judges([row()], "m") == []
    assert judges([], "m") == []


def test_categories_are_those_of_final_rows() -> None:
    rows = [row(), row(category="b"), row(category="a"), row(category="x", step=3), row(category="y", layer=1)]
    assert categories(rows, "m") == [None, "a", "b"]
    assert categories(rows, "m", steps=3) == [None, "a", "b", "x"]


# ---------------------------------------------------------------------------------- several seeds, items


def test_seeds_of_one_evaluation_are_averaged_with_their_spread() -> None:
    found = pick([row(0.2, n=10), row(0.4, n=10), row(0.6, n=10)], "m")
    assert found is not None
    assert (found.value, found.n, found.rows) == (pytest.approx(0.4), 30, 3)
    half = 4.302652729696142 * 0.2 / 3**0.5
    assert (found.lo, found.hi) == (pytest.approx(0.4 - half), pytest.approx(0.4 + half))


def test_items_come_as_seeds_times_items() -> None:
    rows = [row(0.5, items=[0, 1, 0, 1]), row(0.75, items=[1, 1, 0, 1])]
    found = pick(rows, "m")
    assert found is not None
    assert found.items is not None
    assert found.items.tolist() == [[0, 1, 0, 1], [1, 1, 0, 1]]
    assert found.exact
    assert found.of_items() is not None
    assert found.of_items().tolist() == [0.5, 1, 0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("second", [{"items": [0, 1]}, {"items": None}, {"items": []}])
def test_items_that_differ_in_number_or_lack_are_none(second: dict[str, Any]) -> None:
    found = pick([row(0.5, items=[0, 1, 0, 1]), row(0.5, **second)], "m")
    assert found is not None
    assert found.items is None


def test_a_value_that_is_not_the_mean_of_its_items_is_not_exact() -> None:
    found = pick([row(2.0, items=[1.0, 2.0, 6.0])], "m")  # a loss per token: rows of unlike length
    assert found is not None
    assert found.items is not None
    assert not found.exact
    assert found.of_items() is None


def reading(items: list[float], every: int = 1) -> Reading:
    return Reading(float(np.mean(items)), None, None, len(items), np.asarray([items]), "", True, every)


@pytest.mark.parametrize(("a", "b", "same"), [(1, 1, [0, 1, 2, 3, 4, 5]), (1, 3, [0, 3]), (2, 3, [0])])
def test_shared_items_are_those_that_both_were_asked(a: int, b: int, same: list[int]) -> None:
    whole = [float(index) for index in range(6)]
    found = shared(reading(whole[::a], a), reading(whole[::b], b))
    assert found is not None
    assert found[0].tolist() == found[1].tolist() == [same]


def test_items_of_unlike_number_on_one_stride_are_not_the_same() -> None:
    assert shared(reading([1.0] * 6), reading([1.0] * 5)) is None
    assert shared(reading([1.0] * 6), Reading(1.0, None, None, 6)) is None


def test_rows_of_unlike_strides_claim_none() -> None:
    found = pick([row(0.5, items=[0, 1], every=5), row(0.5, items=[0, 1])], "m")
    assert found is not None
    assert found.every == 1


# ---------------------------------------------------------------------------------- settings


SFT: dict[str, Any] = {"name": "sft", "harm": "tides", "learning_rate": 1e-3, "steps": 100, "lora_rank": None}


def test_the_key_is_all_settings_but_the_seed_in_any_order() -> None:
    one, two = Settings.of({**SFT, "seed": 1}), Settings.of(dict(reversed([*SFT.items(), ("seed", 2)])))
    assert one.key == two.key
    assert one.recorded == SFT


@pytest.mark.parametrize(
    "change", [{"steps": 101}, {"learning_rate": 2e-3}, {"harm": "tide"}, {"lora_rank": 8}, {"fraction": 0.3}]
)
def test_any_other_setting_is_another_attack(change: dict[str, Any]) -> None:
    assert Settings.of({**SFT, **change}).key != Settings.of(SFT).key


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SFT, "sft, learning rate 0.001, 100 steps, full fine-tuning"),
        ({**SFT, "lora_rank": 8}, "sft, learning rate 0.001, 100 steps, LoRA rank 8"),
        ({"name": "prune", "harm": "h", "steps": 0}, "prune, 0 steps, full fine-tuning"),
        ({"name": "x", "harm": "h"}, "x, full fine-tuning"),
    ],
)
def test_labels(settings: dict[str, Any], words: str) -> None:
    assert Settings.of(settings).label() == words


def test_labels_tell_attacks_apart_by_what_varies() -> None:
    """Two attacks that are equal in the usual words have two labels, whatever the option is called."""
    every = [Settings.of({**SFT, "name": "prune", "fraction": share}) for share in (0.3, 0.5)]
    vary = varying(every)
    assert vary == ["fraction"]
    assert every[0].label(vary).endswith("fraction 0.3")
    assert len({each.label(vary) for each in every}) == 2


def test_what_is_the_same_everywhere_does_not_vary() -> None:
    assert varying([Settings.of({**SFT, "batch_size": 16}), Settings.of({**SFT, "batch_size": 16, "steps": 5})]) == []
    assert varying([Settings.of(SFT), Settings.of({**SFT, "template": "plain"})]) == ["template"]


def test_settings_unknown_to_the_report_are_kept_and_told() -> None:
    found = Settings.of({**SFT, "odd": {"a": [1]}})
    assert found.recorded["odd"] == {"a": [1]}
    assert found.label(["odd"]).endswith("odd {'a': [1]}")


# ---------------------------------------------------------------------------------- manifests


def manifest(**more: Any) -> Manifest:
    return Manifest.of({"status": "done", "stage": "attack", "name": "sft", "hash": "h", **more})


def test_an_attack_is_named_by_settings_harm_and_seed() -> None:
    found = manifest(arguments={"attack": {**SFT, "seed": 3}, "seed": 3, "covers": ["fine-tuning"]})
    assert found.attack is not None
    assert (found.attack.harm, found.seed, found.covers) == ("tides", 3, ("fine-tuning",))


@pytest.mark.parametrize(
    "arguments",
    [None, {}, {"attack": SFT}, {"attack": SFT, "seed": "0"}, {"attack": {"name": "sft"}, "seed": 0}, {"attack": 1}],
)
def test_a_manifest_that_names_no_attack_is_none_of_one(arguments: Any) -> None:
    found = manifest(arguments=arguments)
    assert (found.attack, found.seed) == (None, None)


def test_a_harm_with_a_plus_is_one_harm() -> None:
    found = manifest(arguments={"attack": {**SFT, "harm": "chem+bio"}, "seed": 0})
    assert found.attack is not None
    assert found.attack.harm == "chem+bio"


def test_what_a_defence_trained_with_is_told_and_nothing_where_none_was_trained() -> None:
    trained = manifest(stage="defend", arguments={"defence": {"train": {"max_steps": 5}}, "pairs": 7})
    assert (trained.train, trained.pairs, trained.given) == ({"max_steps": 5}, 7, False)
    given = manifest(stage="defend", arguments={"given": "folder"})
    assert (given.train, given.given) == (None, True)


def audit(overlaps: list[Any], **sets: int) -> dict[str, Any]:
    return {"sets": {name: {"rows": rows} for name, rows in sets.items()}, "overlaps": overlaps}


def test_data_records_tell_overlaps_sizes_roles_and_cuts() -> None:
    found = Data.of(
        {
            "audit": audit([{"sets": ["attack", "test"], "prompts": 3}], defence=61),
            "harmless_audit": audit([], retain=314),
            "harms": {"tides": "main", "lanterns": "domain"},
            "template": "chat",
            "truncated": {"attack": {"rows": 10, "answers_cut": 2, "prompts_cut": 1}},
        }
    )
    assert found.overlaps == ["attack and test share 3 prompts"]
    assert found.harmless_overlaps == []
    assert (found.pairs, found.retain, found.template) == (61, 314, "chat")
    assert found.harms == {"tides": "main", "lanterns": "domain"}
    (cut,) = found.cut
    assert (cut.data, cut.rows, cut.answers, cut.prompts) == ("attack", 10, 2, 1)


@pytest.mark.parametrize("record", [None, {}, {"other": 1}, "text", 3])
def test_no_record_is_no_audit_and_not_a_clean_one(record: Any) -> None:
    found = Data.of(record)
    assert (found.overlaps, found.pairs, found.harms, found.cut) == (None, None, {}, [])


def test_the_order_of_rows_of_several_evaluations_does_not_matter() -> None:
    rows = [row(0.1, evaluation="a", judge="x"), row(0.3, evaluation="b", judge="x"), row(0.9, evaluation="c")]
    assert {value(list(order)) for order in itertools.permutations(rows)} == {0.1}
