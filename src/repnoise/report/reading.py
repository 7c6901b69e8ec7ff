"""A study folder as the report sees it: models, attacked cells and rows. Never reads samples.

An attack folder names its cell in the manifest: `arguments = {"attack": {"name", "learning_rate", "steps",
"lora_rank", "harm", ...}, "seed": int}`. Cells of different models belong together when their attack settings
and their seed are equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from repnoise.errors import RunError
from repnoise.intervals import mean_interval
from repnoise.store.run import Run

CONTROLS = ("ignorant", "random")
LOSS_HARM = "harmful_loss"

Row = Mapping[str, Any]


class Reading(NamedTuple):
    """One metric of one model: its value with interval, and the items behind it where the rows hold them."""

    value: float
    lo: float | None
    hi: float | None
    n: int
    items: np.ndarray | None = None  # (rows, items): one row per seed of the evaluation
    judge: str = ""
    exact: bool = False  # `value` is the mean of `items`; a loss per token is not the mean of its rows' losses

    def of_items(self) -> np.ndarray | None:
        """(items,): each item's mean over the rows; None where `value` is not their mean."""
        return self.items.mean(0) if self.items is not None and self.exact else None


def _by_metric(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["metric"], []).append(row)
    return found


@dataclass(frozen=True)
class Attacked:
    """One attack on one model with one seed, seen for one harm."""

    settings: dict[str, Any]  # the attack without its seed
    harm: str
    seed: int
    rows: Sequence[Row]
    folder: Path

    @cached_property
    def key(self) -> str:
        return json.dumps([self.harm, self.settings], sort_keys=True)

    @cached_property
    def by_metric(self) -> dict[str, list[Row]]:
        return _by_metric(self.rows)

    @property
    def steps(self) -> int | None:
        steps = self.settings.get("steps")
        return int(steps) if isinstance(steps, int | float) else None

    def final(self, metric: str, category: str | None = None, judge: str | None = None) -> Reading | None:
        return pick(self.by_metric.get(metric, ()), metric, steps=self.steps, category=category, judge=judge)


@dataclass
class Model:
    """The untouched model, a control or a defended one, with its rows before and its attacks."""

    role: str  # "undefended", "ignorant", "random" or "defended"
    name: str
    folder: Path
    manifest: dict[str, Any]
    rows: Sequence[Row]
    attacks: list[Attacked] = field(default_factory=list)

    @cached_property
    def by_metric(self) -> dict[str, list[Row]]:
        return _by_metric(self.rows)

    @cached_property
    def _attack_of(self) -> dict[tuple[str, int], Attacked]:
        return {(a.key, a.seed): a for a in self.attacks}

    def before(self, metric: str, category: str | None = None, judge: str | None = None) -> Reading | None:
        return pick(self.by_metric.get(metric, ()), metric, steps=0, category=category, judge=judge)

    def attack(self, key: str, seed: int) -> Attacked | None:
        return self._attack_of.get((key, seed))


@dataclass
class Study:
    path: Path
    base: Model | None = None
    controls: dict[str, Model] = field(default_factory=dict)
    defences: list[Model] = field(default_factory=list)  # in the order in which they were started
    manifests: list[dict[str, Any]] = field(default_factory=list)  # of everything that is done
    problems: list[str] = field(default_factory=list)  # folders that do not count, each with the reason
    labels: dict[str, str] | None = None  # attacks in words, made once

    @property
    def models(self) -> list[Model]:
        return [*([self.base] if self.base else []), *self.controls.values(), *self.defences]


def pick(
    rows: Iterable[Row],
    metric: str,
    *,
    steps: int | None = None,
    category: str | None = None,
    judge: str | None = None,
) -> Reading | None:
    """The final value of `metric` on the test split over all layers, or None where it was not measured.

    Final means: no `step`, else `step == steps`. Several rows (seeds of a sampling evaluation) are averaged.
    Where several evaluations share a metric name, "sandbox" counts, else the first by name.

    Args:
        judge: whose labels; "" for rows that name none; None for the headline judge, the first in row order.
    """
    final = _final(rows, metric, steps, category)
    if judge is not None:
        final = [row for row in final if _judge(row) == judge]
    if not final:
        return None
    first = _first_evaluation(final)
    final = [row for row in final if row["evaluation"] == first]
    name = _judge(final[0])
    final = [row for row in final if _judge(row) == name]
    items = _items(final)
    values = np.asarray([row["value"] for row in final], dtype=float)
    exact = items is not None and bool(np.allclose(items.mean(1), values, rtol=1e-4, atol=1e-4))
    if len(final) == 1:
        row = final[0]
        return Reading(float(row["value"]), row.get("lo"), row.get("hi"), int(row["n"]), items, name, exact)
    mean = mean_interval(values)
    return Reading(mean.value, mean.lo, mean.hi, sum(int(row["n"]) for row in final), items, name, exact)


def judges(rows: Iterable[Row], metric: str, *, steps: int | None = None) -> list[str]:
    """Everyone who judged the final `metric`, the headline judge first; [] where nobody is named."""
    final = _final(rows, metric, steps, None)
    first = _first_evaluation(final) if final else ""
    ordered = sorted(final, key=lambda row: row["evaluation"] != first)
    names = list(dict.fromkeys(_judge(row) for row in ordered))
    return names if any(names) else []


def _final(rows: Iterable[Row], metric: str, steps: int | None, category: str | None) -> list[Row]:
    found = [
        row
        for row in rows
        if row["metric"] == metric
        and row.get("split") in (None, "test")
        and row.get("layer") is None
        and row.get("category") == category
    ]
    final = [row for row in found if row.get("step") is None]
    return final or [row for row in found if steps is not None and row.get("step") == steps]


def _first_evaluation(rows: Sequence[Row]) -> str:
    return min((str(row["evaluation"]) for row in rows), key=lambda name: (name != "sandbox", name))


def _judge(row: Row) -> str:
    return str(row.get("judge") or "")


def _items(rows: Sequence[Row]) -> np.ndarray | None:
    """(rows, items), or None where a row has none or they differ in number."""
    lists = [row.get("items") for row in rows]
    if any(not each for each in lists) or len({len(each) for each in lists if each}) > 1:
        return None
    return np.asarray(lists, dtype=float)


def curve(attacked: Attacked, metric: str, start: Reading | None, judge: str | None = None) -> dict[int, float]:
    """`metric` by step along one attack, from the value before the attack at step 0 to the final one."""
    points = {} if start is None else {0: start.value}
    steps: dict[int, list[Row]] = {}
    for row in attacked.by_metric.get(metric, ()):
        if row.get("step") is not None:
            steps.setdefault(int(row["step"]), []).append(row)
    for step, rows in steps.items():
        value = pick(rows, metric, steps=step, judge=judge)
        if value is not None:
            points[step] = value.value
    final = attacked.final(metric, judge=judge)
    if final is not None and attacked.steps is not None:
        points[attacked.steps] = final.value
    return dict(sorted(points.items()))


def label(settings: Mapping[str, Any], vary: Iterable[str] = ()) -> str:
    """An attack in words: "sft, learning rate 0.001, 100 steps, full fine-tuning", then those in `vary`."""
    rank = settings.get("lora_rank")
    parts = [str(settings.get("name", "attack"))]
    if settings.get("learning_rate") is not None:
        parts.append(f"learning rate {settings['learning_rate']:g}")
    if settings.get("steps") is not None:
        parts.append(f"{settings['steps']} steps")
    parts.append(f"LoRA rank {rank}" if rank else "full fine-tuning")
    parts += [f"{key} {settings[key]}" for key in vary if settings.get(key) is not None]
    return ", ".join(parts)


def varying(studied: Iterable[Attacked]) -> list[str]:
    """Settings outside the usual label that differ between these attacks."""
    shown = {"name", "learning_rate", "steps", "lora_rank", "harm"}
    seen: dict[str, set[str]] = {}
    every = [a.settings for a in studied]
    for key in sorted({key for settings in every for key in settings} - shown):
        seen[key] = {json.dumps(settings.get(key), sort_keys=True) for settings in every}
    return [key for key, values in seen.items() if len(values) > 1]


def load(study: Path, *, rows: bool = True) -> Study:
    """Read a study folder; what is failed, unfinished or stale goes to `problems` with its reason.

    Without `rows` only manifests are read, which is all that some readers need.
    """
    study = Path(study)
    if not study.is_dir():
        raise RunError(f"There is no study folder {study}. Give the folder that holds base/ and the defences.")
    result = Study(study)
    for folder in sorted(path for path in study.iterdir() if path.is_dir()):
        manifest = _manifest(folder, result)
        if manifest is None:
            continue
        name = str(manifest.get("name") or folder.name)
        kind = folder.name.removeprefix("control-")
        if folder.name == "base":
            role, name = "undefended", "base"
        elif kind in CONTROLS and kind != folder.name:
            role, name = kind, folder.name
        elif manifest.get("stage") in ("base", "control", "attack"):
            result.problems.append(f"{folder.name}: unknown stage {manifest.get('stage')} here, ignored")
            continue
        else:
            role = "defended"
        model = Model(role, name, folder, manifest, Run(folder).read_rows() if rows else ())
        model.attacks = _attacks(model, result, with_rows=rows)
        if role == "undefended":
            result.base = model
        elif role == "defended":
            result.defences.append(model)
        else:
            result.controls[role] = model
    for model in list(result.defences):
        parent, base = model.manifest.get("parent"), result.base and result.base.manifest.get("hash")
        if parent and base and parent != base:
            where = model.folder.name
            result.problems.append(f"{where}: stale, base/ is another ({parent}, {base})")
            result.defences.remove(model)
    result.defences.sort(key=lambda m: (str(m.manifest.get("started")), m.folder.name))
    names = [model.name for model in result.defences]
    for model in result.defences:
        if names.count(model.name) > 1:
            model.name = model.folder.name
    return result


def _manifest(folder: Path, study: Study, parent: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The manifest of a run that is done and belongs to its parent; else None and a line in `problems`."""
    where = folder.relative_to(study.path).as_posix()
    try:
        manifest = Run(folder).manifest()
    except RunError as error:
        study.problems.append(f"{where}: {str(error).replace(str(study.path), '.')}")
        return None
    if manifest is None:
        if (folder / "progress.json").exists():
            study.problems.append(f"{where}: unfinished (still running, or stopped); run it again")
        return None
    if manifest.get("status") != "done":
        study.problems.append(f"{where}: {manifest.get('status')}: {manifest.get('error')}")
        return None
    ours, theirs = manifest.get("parent"), (parent or {}).get("hash")
    if ours is not None and theirs is not None and ours != theirs:
        study.problems.append(f"{where}: stale, it attacked an earlier version of its model ({ours}, now {theirs})")
        return None
    study.manifests.append(manifest)
    return manifest


def _measured_by(harm: str, rows: Sequence[Row]) -> str:
    """The metric that shows this harm: its own name, else its loss ("harmful" without a judge)."""
    metrics = {row["metric"] for row in rows}
    return f"{harm}_loss" if harm not in metrics and f"{harm}_loss" in metrics else harm


def _attacks(model: Model, study: Study, *, with_rows: bool) -> list[Attacked]:
    found: dict[tuple[str, int], tuple[str, Attacked]] = {}
    root = model.folder / "attacks"
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ():
        manifest = _manifest(folder, study, model.manifest)
        if manifest is None:
            continue
        where = folder.relative_to(study.path).as_posix()
        arguments = manifest.get("arguments") or {}
        attack = arguments.get("attack")
        if not isinstance(attack, dict) or not isinstance(arguments.get("seed"), int):
            study.problems.append(f"{where}: its manifest names no attack and seed, ignored")
            continue
        settings = {key: value for key, value in attack.items() if key != "seed"}
        harms = settings.get("harm") or LOSS_HARM
        rows = Run(folder).read_rows() if with_rows else []
        for harm in harms.split("+") if isinstance(harms, str) else harms:
            one = Attacked(settings, _measured_by(harm, rows), arguments["seed"], rows, folder)
            finished = str(manifest.get("finished"))
            old = found.get((one.key, one.seed))
            if old is not None:
                study.problems.append(f"{where}: the same attack and seed twice; the latest counts")
            if old is None or old[0] <= finished:
                found[one.key, one.seed] = (finished, one)
    return [one for _, one in found.values()]
