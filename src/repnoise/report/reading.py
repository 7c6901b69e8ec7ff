"""A study folder as the report sees it: models, attacked cells and rows. Never reads samples.

An attack folder names its cell in the manifest: `arguments = {"attack": {"name", "harm", "learning_rate", "steps",
"lora_rank", ...}, "seed": int, "covers": [...]}`. Cells of different models belong together when their attack settings
and their seed are equal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from repnoise.errors import RunError
from repnoise.report.manifests import Manifest, Row, Settings
from repnoise.report.readings import Reading, pick
from repnoise.report.records import Role
from repnoise.store.run import Run

PLAN = "plan.json"
"""Every attack that the study is to make, {"cells": [settings with their seed]}; written before the first one."""
CONTROLS = ("ignorant", "random")
"""The first that a study has is its floor."""
BASE, DEFENDED = "undefended", "defended"


def _by_metric(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.metric, []).append(row)
    return found


@dataclass(frozen=True)
class Attacked:
    """One attack on one model with one seed.

    Attributes:
        metric: what shows its harm: the harm's own name where a judge told it, else the loss of its answers.
        covers: directions of attack that it goes in, as its class says.
    """

    settings: Settings
    metric: str
    seed: int
    rows: Sequence[Row]
    folder: Path
    covers: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.settings.key

    @property
    def harm(self) -> str:
        return self.settings.harm

    @property
    def bounded(self) -> bool:
        """Whether its harm is a rate in [0, 1] that a head start can be computed from."""
        return self.metric == self.harm

    @cached_property
    def by_metric(self) -> dict[str, list[Row]]:
        return _by_metric(self.rows)

    def final(self, metric: str, category: str | None = None, judge: str | None = None) -> Reading | None:
        steps = self.settings.steps
        return pick(self.by_metric.get(metric, ()), metric, steps=steps, category=category, judge=judge)


@dataclass(frozen=True)
class Failed:
    """An attack that was begun and gave nothing."""

    settings: Settings
    seed: int
    why: str


@dataclass
class Model:
    """The untouched model, a control or a defended one, with its rows before and its attacks."""

    role: str  # "undefended", "ignorant", "random" or "defended"
    name: str
    folder: Path
    manifest: Manifest
    rows: Sequence[Row]
    attacks: list[Attacked] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)

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
    manifests: list[Manifest] = field(default_factory=list)  # of everything that is done
    problems: list[str] = field(default_factory=list)  # folders that do not count, each with the reason
    planned: list[tuple[Settings, int]] = field(default_factory=list)  # settings and seed of every attack

    @property
    def models(self) -> list[Model]:
        return [*([self.base] if self.base else []), *self.controls.values(), *self.defences]

    @property
    def floor(self) -> Model | None:
        """The control that every head start of this study is measured from; never two kinds in one study."""
        return next((self.controls[name] for name in CONTROLS if name in self.controls), None)

    def roles(self, model: Model) -> dict[str, Role]:
        """What each harm is to this defence, as the data say; a harm of which they say nothing is a main one."""
        found: dict[str, Role] = {}
        for one in (self.base, model):
            found.update(one.manifest.data.harms if one else {})
        for attacked in (a for one in self.models for a in one.attacks):
            found.setdefault(attacked.harm, "main")
        return found


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
        name = manifest.name or folder.name
        kind = folder.name.removeprefix("control-")
        if folder.name == "base":
            role, name = BASE, "base"
        elif kind in CONTROLS and kind != folder.name:
            role, name = kind, folder.name
        elif manifest.stage in ("base", "control", "attack"):
            result.problems.append(f"{folder.name}: unknown stage {manifest.stage} here, ignored")
            continue
        else:
            role = DEFENDED
        model = Model(role, name, folder, manifest, _rows(folder) if rows else ())
        _read_attacks(model, result, with_rows=rows)
        if role == BASE:
            result.base = model
        elif role == DEFENDED:
            result.defences.append(model)
        else:
            result.controls[role] = model
    for model in list(result.defences):
        parent, base = model.manifest.parent, result.base and result.base.manifest.hash
        if parent and base and parent != base:
            where = model.folder.name
            result.problems.append(f"{where}: stale, base/ is another ({parent}, {base})")
            result.defences.remove(model)
    result.defences.sort(key=lambda m: (m.manifest.started, m.folder.name))
    names = [model.name for model in result.defences]
    for model in result.defences:
        if names.count(model.name) > 1:
            model.name = model.folder.name
    result.planned = _planned(study, result)
    return result


def _planned(study: Path, result: Study) -> list[tuple[Settings, int]]:
    """Every attack that the recipe or the sweep asks for, as it was written down before the first of them began."""
    path = study / PLAN
    if not path.exists():
        return []
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        return [(Settings.of(cell), int(cell["seed"])) for cell in plan["cells"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        result.problems.append(f"{PLAN}: cannot be read ({' '.join(str(error).split())}); run the study again")
        return []


def _rows(folder: Path) -> list[Row]:
    return [Row.of(row) for row in Run(folder).read_rows()]


def _manifest(folder: Path, study: Study, parent: Model | None = None) -> Manifest | None:
    """The manifest of a run that is done and belongs to its parent; else None and a line in `problems`."""
    where = folder.relative_to(study.path).as_posix()
    try:
        found = Run(folder).manifest()
    except RunError as error:
        study.problems.append(f"{where}: {str(error).replace(str(study.path), '.')}")
        return None
    if found is None:
        if (folder / "progress.json").exists():
            study.problems.append(f"{where}: unfinished (still running, or stopped); run it again")
        return None
    manifest = Manifest.of(found)
    if manifest.status != "done":
        why = f"{manifest.status}: {manifest.error}"
        study.problems.append(f"{where}: {why}")
        if parent is not None and manifest.attack is not None and manifest.seed is not None:
            parent.failed.append(Failed(manifest.attack, manifest.seed, why))
        return None
    ours, theirs = manifest.parent, parent.manifest.hash if parent else None
    if ours is not None and theirs is not None and ours != theirs:
        study.problems.append(f"{where}: stale, it attacked an earlier version of its model ({ours}, now {theirs})")
        return None
    study.manifests.append(manifest)
    return manifest


def _measured_by(harm: str, rows: Sequence[Row]) -> str:
    """The metric that shows this harm: its own name where it was judged, else the loss of its answers."""
    metrics = {row.metric for row in rows}
    return f"{harm}_loss" if harm not in metrics and f"{harm}_loss" in metrics else harm


def _read_attacks(model: Model, study: Study, *, with_rows: bool) -> None:
    found: dict[tuple[str, int], tuple[str, Attacked]] = {}
    root = model.folder / "attacks"
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ():
        manifest = _manifest(folder, study, model)
        if manifest is None:
            continue
        where = folder.relative_to(study.path).as_posix()
        settings, seed = manifest.attack, manifest.seed
        if settings is None or seed is None:
            study.problems.append(f"{where}: its manifest names no attack, harm and seed, ignored")
            continue
        rows = _rows(folder) if with_rows else []
        one = Attacked(settings, _measured_by(settings.harm, rows), seed, rows, folder, manifest.covers)
        finished = manifest.finished
        old = found.get((one.key, one.seed))
        if old is not None:
            study.problems.append(f"{where}: the same attack and seed twice; the latest counts")
        if old is None or old[0] <= finished:
            found[one.key, one.seed] = (finished, one)
    model.attacks = [one for _, one in found.values()]
