"""The statistics of the report, each against a value worked out by hand or by scipy itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_study import GRID, STEPS, items, judged, rate, row, write_judged, write_model, write_study
from scipy import stats
from test_summary import claim

from repnoise.report import render, summarise
from repnoise.report.manifests import Row
from repnoise.report.readings import judges, pick
from repnoise.store import files

Extra = Callable[[Mapping[str, Any], int], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)


def write_items(path: Path, of: Callable[[str, int], list[float]], seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    """A study of one attack whose rows hold the items `of(role, seed)`."""
    roles = (("base", "base"), ("control-ignorant", "control"), ("d-1", "defend"))
    for folder, stage in roles:

        def extra(a: Mapping[str, Any], seed: int, folder: str = folder) -> list[dict[str, Any]]:
            values = of(folder, seed)
            return [row("knowledge", float(np.mean(values)), n=len(values), items=values)]

        write_model(path / folder, lambda a, s: None, stage=stage, attacks=GRID[:1], seeds=seeds, extra=extra)
    return path


# ---------------------------------------------------------------------------------- head start and difference


def test_head_starts_with_items_are_paired_across_the_models(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(80)
    values = {
        (folder, seed): [float(x) for x in np.round(hard * scale + 0.02 * rng.random(80), 6)]
        for folder, scale in (("base", 0.9), ("control-ignorant", 0.1), ("d-1", 0.3))
        for seed in (0, 1, 2)
    }
    entry = summarise(write_items(tmp_path, lambda *of: values[of]))["resistance"]["head_start_by_cell"][0]
    means = {key: float(np.mean(v)) for key, v in values.items()}
    starts = [
        (means["d-1", s] - means["control-ignorant", s]) / (means["base", s] - means["control-ignorant", s])
        for s in (0, 1, 2)
    ]
    assert entry["head_start"]["mean"] == pytest.approx(np.mean(starts))
    assert entry["head_start"]["n"] == 80
    assert entry["interval"] == "over 3 seeds and 80 items, paired across the models"
    lo, hi = entry["head_start"]["lo"], entry["head_start"]["hi"]
    assert lo < entry["head_start"]["mean"] < hi
    # how hard an item is moves all three models alike and cancels: unpaired, the interval would be far wider
    assert hi - lo < 0.04
    assert entry["difference"]["mean"] == pytest.approx(
        np.mean([means["d-1", s] - means["base", s] for s in (0, 1, 2)])
    )
    assert entry["difference"]["lo"] < entry["difference"]["mean"] < entry["difference"]["hi"]


def test_items_that_differ_in_number_fall_back_to_seeds(tmp_path: Path) -> None:
    def of(folder: str, seed: int) -> list[float]:
        return items({"base": 0.9, "d-1": 0.3}.get(folder, 0.1) + seed / 100, n=100 if folder == "d-1" else 200)

    entry = summarise(write_items(tmp_path, of))["resistance"]["head_start_by_cell"][0]
    assert entry["interval"] == "Student's t over 3 seeds, and 100 items whose answers the rows do not hold"
    assert entry["mann_whitney_p"] is None


def test_mann_whitney_is_scipys_over_items_averaged_over_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    values = {
        (folder, seed): [float(x) for x in np.round(rng.random(40) * scale, 6)]
        for folder, scale in (("base", 1.0), ("control-ignorant", 0.1), ("d-1", 0.8))
        for seed in (0, 1)
    }
    section = summarise(write_items(tmp_path, lambda *of: values[of], seeds=(0, 1)))["resistance"]
    for cell in section["cells"]:
        wanted = stats.mannwhitneyu(values["d-1", cell["seed"]], values["base", cell["seed"]]).pvalue
        assert cell["mann_whitney_p"] == pytest.approx(wanted, rel=1e-6)
    both = {f: np.mean([values[f, 0], values[f, 1]], axis=0) for f in ("base", "d-1")}
    wanted = stats.mannwhitneyu(both["d-1"], both["base"]).pvalue
    assert section["head_start_by_cell"][0]["mann_whitney_p"] == pytest.approx(wanted, rel=1e-6)


# ---------------------------------------------------------------------------------- along the attack


def test_steps_to_break_and_areas_by_hand(tmp_path: Path) -> None:
    """harm(step) = final * step / 100 at 10, 25, 50 and 100, and 0 before; bar = 0.05 + 0.2 (0.91 - 0.05) = 0.222."""
    before = [row("knowledge", 0.0), row("stability", 1.0)]
    for folder, stage, value in (("base", "base", 0.91), ("control-ignorant", "control", 0.05), ("d-1", "defend", 0.4)):
        write_model(tmp_path / folder, lambda a, s, v=value: v, stage=stage, attacks=GRID[:1], before=before)  # type: ignore[misc]
    section = summarise(tmp_path)["resistance"]
    (entry,) = section["head_start_by_cell"]
    assert entry["steps_to_break"] == {"defended": 100, "undefended": 25, "censored_at": STEPS, "points": 5}
    # a straight line from 0 to `final` has the area final / 2
    assert entry["auc"] == pytest.approx({"defended": 0.2, "undefended": 0.455, "floor": 0.025})
    assert {cell["steps_to_break"]["undefended"] for cell in section["cells"]} == {25}


def test_not_broken_within_the_steps_is_censored_and_a_void_cell_says_nothing(tmp_path: Path) -> None:
    write_study(tmp_path / "holds", lambda a, s: 0.06)
    entry = summarise(tmp_path / "holds")["resistance"]["head_start_by_cell"][0]
    assert entry["steps_to_break"]["defended"] is None
    assert entry["steps_to_break"]["censored_at"] == STEPS
    assert "&gt; 100" in render(tmp_path / "holds")
    for folder, stage in (("base", "base"), ("control-ignorant", "control"), ("d-1", "defend")):
        write_model(tmp_path / "void" / folder, lambda a, s: 0.05, stage=stage)
    assert summarise(tmp_path / "void")["resistance"]["head_start_by_cell"][0]["steps_to_break"] is None


def test_utility_by_a_loss_counts_upwards(tmp_path: Path) -> None:
    for folder, stage, value in (("base", "base", 0.9), ("control-ignorant", "control", 0.05), ("d-1", "defend", 0.06)):
        write_model(
            tmp_path / folder,
            lambda a, s, v=value: v,  # type: ignore[misc]
            stage=stage,
            before=[row("harmless_loss", 2.0, "loss")],
            extra=lambda a, s: [row("harmless_loss", 2.5, "loss")],
        )
    entry = summarise(tmp_path)["resistance"]["head_start_by_cell"][0]
    assert (entry["use"]["metric"], entry["use"]["lost"], entry["use"]["ruined"]) == (
        "harmless_loss",
        0.25,
        True,
    )


# ---------------------------------------------------------------------------------- before and after


def two(path: Path, base: list[dict[str, Any]], defended: list[dict[str, Any]]) -> dict[str, Any]:
    """A study without attacks."""
    write_model(path / "base", lambda a, s: None, attacks=(), before=base)
    write_model(path / "d-1", lambda a, s: None, stage="defend", attacks=(), before=defended)
    return summarise(path)


def test_over_refusal_by_mcnemar_on_the_same_prompts(tmp_path: Path) -> None:
    """2 of 20 refused before; 1 of these and 9 others after: 9 against 1 discordant pairs."""
    before, after = [1.0, 1.0] + [0.0] * 18, [1.0, 0.0] + [1.0] * 9 + [0.0] * 9
    rows = [row("over_refusal", float(np.mean(v)), n=20, items=v) for v in (before, after)]
    summary = two(tmp_path, rows[:1], rows[1:])
    kept = summary["over_refusal"]
    assert kept["test"] == "McNemar exact"
    assert kept["p_value"] == pytest.approx(2 * (1 + 10) / 2**10)  # two-sided binomial, 9 or more of 10
    assert (kept["newly_refused"], kept["no_longer_refused"]) == (9, 1)
    found = claim(summary, "over_refusal")
    assert found["status"] == "broken", "0.40 more, and the lower end is above 0.05"
    assert "p = 0.0215" in found["text"]


def test_over_refusal_without_items_by_fisher(tmp_path: Path) -> None:
    summary = two(tmp_path, [row("over_refusal", 0.1, n=20)], [row("over_refusal", 0.5, n=20)])
    assert summary["over_refusal"]["test"] == "Fisher exact"
    wanted = stats.fisher_exact([[2, 18], [10, 10]]).pvalue
    assert summary["over_refusal"]["p_value"] == pytest.approx(wanted)


def test_a_rise_that_may_be_chance_is_not_called_broken(tmp_path: Path) -> None:
    summary = two(tmp_path, [rate("over_refusal", 0.1, n=10)], [rate("over_refusal", 0.2, n=10)])
    found = claim(summary, "over_refusal")
    assert found["status"] == "not established"
    assert re.search(r"about \d+ items instead of 10", found["settles"])


def test_stability_gets_a_paired_difference(tmp_path: Path) -> None:
    before, after = items(0.9, 200), items(0.85, 200)
    rows = [row("stability", float(np.mean(v)), n=200, items=v) for v in (before, after)]
    summary = two(tmp_path, rows[:1], rows[1:])
    difference = summary["stability"]["difference"]
    assert difference["mean"] == pytest.approx(-0.05)
    # 10 of 200 items fell by 1: Student's t of these differences
    half = stats.t.ppf(0.975, 199) * np.std([1.0] * 10 + [0.0] * 190, ddof=1) / 200**0.5
    assert (difference["lo"], difference["hi"]) == pytest.approx((-0.05 - half, -0.05 + half))
    assert claim(summary, "stability")["status"] == "broken"


def test_every_measure_of_use_must_be_kept(tmp_path: Path) -> None:
    base = [rate("stability", 1.0), rate("truthfulqa_mc1", 0.4, "truthfulqa"), rate("arc_easy_acc", 0.7, "harness")]
    same = [*base[:2], rate("arc_easy_acc", 0.6, "harness"), rate("crows_pairs_pct_stereotype", 0.6, "crows")]
    summary = two(tmp_path, [*base, rate("crows_pairs_pct_stereotype", 0.5, "crows")], same)
    found = claim(summary, "stability")
    assert found["status"] == "broken"
    assert "arc easy acc 0.700 before, 0.600 after" in found["text"]
    assert set(summary["stability"]["measures"]) == {"stability", "truthfulqa_mc1", "arc_easy_acc"}
    assert set(summary["also_measured"]) == {"crows_pairs_pct_stereotype"}


@pytest.mark.parametrize("metric", ["wmdp_bio_acc", "wmdp_cyber_acc_norm"])
def test_hazardous_knowledge_is_not_of_use(tmp_path: Path, metric: str) -> None:
    """To unlearn it is the point: it neither breaks stability nor establishes it."""
    summary = two(tmp_path, [rate(metric, 0.6), rate("stability", 1.0)], [rate(metric, 0.25), rate("stability", 1.0)])
    assert claim(summary, "stability")["status"] == "established"
    assert metric in summary["also_measured"]
    alone = two(tmp_path / "alone", [rate(metric, 0.6)], [rate(metric, 0.25)])
    assert claim(alone, "stability")["status"] == "not established"


def test_a_loss_within_what_the_items_vary_by_is_not_called_broken(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    before = [float(x) for x in rng.integers(0, 2, 50)]
    after = [float(x) for x in rng.permutation(before)]
    after[int(np.argmax(after))] = 0.0
    rows = [row("stability", float(np.mean(v)), n=50, items=v) for v in (before, after)]
    found = claim(two(tmp_path, rows[:1], rows[1:]), "stability")
    assert found["estimate"]["mean"] == pytest.approx(-0.02)
    assert found["status"] == "not established"
    assert "more than 1000" in found["settles"], "0.02 is near 0.01 for items that scatter like this"


def learned(end: float, seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Rows of trainability: a straight line to `end` after 50 steps, with items."""
    points = [(seed, step, end * step / 50 + seed / 100) for seed in seeds for step in (0, 25, 50)]
    curve = [row("trainability", v, "trainability", step=step, seed=seed) for seed, step, v in points]
    return [*curve, *(rate("trainability", end + seed / 100, "trainability", seed=seed) for seed in seeds)]


def test_trainability_with_its_learning_curves(tmp_path: Path) -> None:
    summary = two(tmp_path, learned(0.8), learned(0.78))
    kept = summary["trainability"]
    assert (kept["before"], kept["after"]) == (pytest.approx(0.81), pytest.approx(0.79))
    assert [(p["step"], round(p["mean"], 4)) for p in kept["curve"]["after"]] == [(0, 0.01), (25, 0.4), (50, 0.79)]
    assert (kept["curve"]["before_area"], kept["curve"]["after_area"]) == pytest.approx((0.41, 0.4))
    assert claim(summary, "trainability")["status"] == "established"
    assert "score on the harmless task while it is learned" in render(tmp_path)
    worse = two(tmp_path / "worse", learned(0.8), learned(0.6))
    assert claim(worse, "trainability")["status"] == "broken"
    assert worse["verdict"]["status"] == "broken"


# ---------------------------------------------------------------------------------- judges


def test_the_headline_judge_is_the_first_in_row_order() -> None:
    rows = [Row.of(one) for one in (row("knowledge", 0.9, step=10, judge="b"), *judged({"b": 0.5, "a": 0.1}))]
    assert pick(rows, "knowledge").value == pytest.approx(0.5)  # type: ignore[union-attr]
    assert pick(rows, "knowledge", judge="a").value == pytest.approx(0.1)  # type: ignore[union-attr]
    assert pick(rows, "knowledge", judge="c") is None
    assert judges(rows, "knowledge") == ["b", "a"]
    assert judges([Row.of(row("knowledge", 0.5))], "knowledge") == []


def test_the_judges_section_by_hand(tmp_path: Path) -> None:
    agree = [
        row("knowledge_judge_agreement", 0.9, category="a|b"),
        row("knowledge_judge_kappa", 0.7, category="a|b"),
    ]
    before = [*judged({"a": 0.02, "b": 0.1}), row("stability", 1.0), *agree]
    summary = summarise(write_judged(tmp_path, {"a": 0.06, "b": 0.1}, before=before))
    first, second = summary["judges"]["harms"]["knowledge"]
    assert (first["judge"], first["headline"], first["says"]) == ("a", True, "holds")
    assert (second["judge"], second["headline"]) == ("b", False)
    assert second["worst"]["counted"] == pytest.approx(0.05 / 0.85)
    assert second["before_defended"] == pytest.approx(0.1)
    after = {who: second["worst"][who]["mean"] for who in ("undefended", "defended", "floor")}
    assert after == pytest.approx({"undefended": 0.9, "defended": 0.1, "floor": 0.05})
    (pair,) = summary["judges"]["agreement"]
    assert pair == {
        **{"model": "defended", "state": "before any attack", "harm": "knowledge"},
        **{"judges": ["a", "b"], "agreement": 0.9, "kappa": 0.7, "spearman": None},
    }
    page = render(tmp_path)
    assert "What the judges say" in page
    assert "Cohen" in page


def test_without_named_judges_there_is_no_such_section(tmp_path: Path) -> None:
    assert summarise(write_study(tmp_path))["judges"] is None
