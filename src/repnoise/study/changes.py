"""What has changed since a result of the same role was made, in words: why it is not taken again."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..store.run import Run
from .cell import Cell
from .study import Study
from .target import Target

SHOWN = 4
_DIGEST = re.compile(r"(\w+:)*[0-9a-f]{16,64}")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Every setting that is not the same in both: "defence.offset 1.0 -> 0.0"."""
    old, new = dict(_flat(before)), dict(_flat(now))
    keys = [key for key in [*new, *(key for key in old if key not in new)] if old.get(key, old) != new.get(key, new)]
    return [_in_words(key, old, new) for key in keys]


def _flat(depends: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(depends, Mapping) and (depends or not at):
        for key, value in depends.items():
            yield from _flat(value, f"{at}.{key}" if at else str(key))
    else:
        yield at, depends


def _in_words(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    values = [each[key] for each in (old, new) if key in each]
    if len(values) < 2:
        return f"{key} {'is new' if key in new else 'is gone'}"
    if all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in values):
        return f"{key} has other contents"
    return f"{key} {values[0]} -> {values[1]}"


def summed_up(changed: Iterable[str]) -> str:
    found = list(changed)
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return ", ".join([*found[:SHOWN], *more])


# ---- who had the same role --------------------------------------------------------------------------------


def since_last(run: Run, now: Mapping[str, Any]) -> list[str]:
    """What changed since the run in the same folder; nothing where there is none, or nothing changed."""
    before = _depends(run)
    return [] if before is None else differences(before, now)


def since_alike(target: Target, name: str) -> tuple[list[str], str]:
    """What sets the defended model apart from the nearest one of the same defence in the study, and its folder."""
    others = []
    for folder in sorted(target.run.path.parent.glob(f"{name}-*")):
        before = _depends(Run(folder)) if folder != target.run.path else None
        if before is not None:
            others.append((differences(before, target.depends), folder.name))
    return min(others, key=lambda each: len(each[0]), default=([], ""))


def since_attacked(
    study: Study, target: Target, cell: Cell, known: Mapping[str, dict[str, Any]] | None = None
) -> list[str]:
    """What changed since the same cell was run on the same model; `known`: of `attacked_before`."""
    known = attacked_before(target) if known is None else known
    before = known.get(_key(cell.recorded(), cell.seed, target.hash))
    return [] if before is None else differences(before, study.attack_depends(target, cell))


def tell_of_attacks(study: Study, todo: Iterable[tuple[Target, Cell]]) -> None:
    """Say once why attacks that were run before are run again."""
    known: dict[Path, dict[str, dict[str, Any]]] = {}
    why: Counter[str] = Counter()
    for target, cell in todo:
        path = target.run.path
        if path not in known:
            known[path] = attacked_before(target)
        if found := since_attacked(study, target, cell, known[path]):
            why[summed_up(found)] += 1
    for words, count in why.items():
        study.say(f"attacks: {count} that were run before are not reused: {words}")


def attacked_before(target: Target) -> dict[str, dict[str, Any]]:
    """What the attacks on a model depend on, by cell, seed and its hash; of several the latest."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    folder = target.run.path / "attacks"
    for path in folder.iterdir() if folder.is_dir() else ():
        run = Run(path)
        depends, manifest = _depends(run), _manifest(run)
        if depends is None:
            continue
        arguments, finished = manifest.get("arguments") or {}, str(manifest.get("finished"))
        key = _key(arguments.get("attack"), arguments.get("seed"), manifest.get("parent"))
        if key not in found or found[key][0] < finished:
            found[key] = finished, depends
    return {key: depends for key, (_, depends) in found.items()}


def _key(*what: Any) -> str:
    return json.dumps(what, sort_keys=True)


def _depends(run: Run) -> dict[str, Any] | None:
    found = _manifest(run).get("depends")
    return found if isinstance(found, dict) else None


def _manifest(run: Run) -> dict[str, Any]:
    try:
        return run.manifest() or {}
    except RunError:
        return {}
