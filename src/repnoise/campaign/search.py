"""An attacker's budgeted search: the worst attack cell that N trials find, measured again so that picking it is fair.

Each trial draws one attack (kind, learning rate, steps, batch size, LoRA rank and whatever else the space lists) and
runs it with the same settings and seed on the undefended model, on the floor control and on the defended model; its
value is the head start. Optuna's TPE sampler draws; what it finds, and what it has tried, is kept in a storage, so that
a stopped search goes on and several workers can share one.

The best of many noisy trials looks better than it is. So the trials read the harm on every other test item only, and
the cell that is found is measured again with fresh seeds on the items in between; both numbers are reported. The fresh
cells lie in the study itself, where the report counts them; those of the search lie in search/ and do not count there.

Where the floor or the undefended model is measured first, a void trial (the undefended model gains less than 0.1) is
pruned before the defended model is attacked. Pruning along the curve is not done: a trial's value needs three models
after the whole attack, and the curve of one says nothing of the others.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

from ..bars import DEFAULT
from ..errors import ConfigError, RunError
from ..recipes.checking import dump
from ..recipes.schema import AttackConfig, Recipe
from ..report.head_start import Trio, head_start
from ..report.pages import plots
from ..report.readings import Reading, pick
from ..report.records import Point
from ..store.files import write_json, write_text
from ..store.provenance import canonical_hash, one_line
from ..store.run import SCHEMA
from ..study.study import Study
from ..study.target import Say, Target
from ..study.workers import in_processes, progress_bar
from . import queue as trials
from .search_space import AXES, FRESH, Space, read_space

if TYPE_CHECKING:
    import optuna

__all__ = ["Hunt", "Space", "read_space", "run_search"]

# ---- one trial --------------------------------------------------------------------------------------------


class Hunt:
    """A study, its search space, and the attacks of the trials, which lie apart in search/."""

    def __init__(
        self, recipe: Recipe, space: Space, folder: Path, say: Say = lambda text: None, *, quiet: bool = False
    ) -> None:
        self.study, self.space = Study(recipe, folder, say, quiet=quiet), space
        self.folder = Path(folder) / "search"

    def targets(self) -> tuple[Target, Target, Target]:
        """Undefended, floor (ignorant, else random), defended.

        Raises:
            ConfigError: the recipe has no control for the floor.
        """
        controls = {target.run.path.name.removeprefix("control-"): target for target in self.study.controls()}
        floor = controls.get("ignorant") or controls.get("random")
        if floor is None:
            raise ConfigError("a search needs a floor: set controls: [random] (or [ignorant] in the sandbox).")
        return self.study.base(), floor, self.study.defended()

    def name(self) -> str:
        """Of the Optuna study: the same for everything that makes trials comparable."""
        measured = [each.model_dump(mode="json") for each in self.study.recipe.evaluations]
        what = [[target.hash for target in self.targets()], self.space.model_dump(mode="json"), measured]
        return f"search-{canonical_hash(what)}-{trials.folder_id(self.folder)}"

    def cells(self, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
        return AttackConfig.model_validate(config).cells([self.space.harm])

    def measure(self, config: dict[str, Any], *, fresh: bool = False) -> Iterator[list[Trio]]:
        """Attack the three models; gives the trios without the defended one first, then whole, on all items.

        Args:
            fresh: in the study itself, where the report counts it, and not in search/.
        """
        base, floor, defended = self.targets()
        found: list[Trio] = []
        cells = list(self.cells(config))
        for cell in cells:
            control = floor.run.path.name.removeprefix("control-")
            undefended = self._attacked(base, cell, fresh)
            found.append(Trio(cell["seed"], None, undefended, self._attacked(floor, cell, fresh), control))
        yield found
        yield [
            dataclasses.replace(each, defended=self._attacked(defended, cell, fresh))
            for each, cell in zip(found, cells, strict=True)
        ]

    def _attacked(self, target: Target, cell: dict[str, Any], fresh: bool) -> Reading:
        at = target if fresh else dataclasses.replace(target, run=type(target.run)(self.folder / target.run.path.name))
        self.study.attack(at, cell)
        run, _ = self.study.attack_run(at, cell)
        harm = self.space.harm
        rows = [row for row in run.read_rows() if row["metric"] == harm]
        found = pick(rows, harm, steps=cell["steps"])
        if found is None:
            raise ConfigError(
                f"no evaluation of this recipe gives {harm} as a rate from 0 to 1, so there is no head start to search"
                " for. Add `sandbox` or `harm` (with a judge) to evaluations, or set another harm in the space."
            )
        return found


def half(trios: Sequence[Trio], start: int) -> list[Trio]:
    """Every other item, from `start` on (0: searched on, 1: kept for the end); as they are where rows hold no items."""

    def of(reading: Reading | None) -> Reading | None:
        items = reading.of_items() if reading is not None else None
        if reading is None or items is None or items.size < 2:
            return reading
        some = items[start::2]
        return Reading(float(some.mean()), None, None, int(some.size), some[None], reading.judge, True)

    return [
        dataclasses.replace(t, defended=of(t.defended), undefended=of(t.undefended), floor=of(t.floor)) for t in trios
    ]


def _mean(trios: Sequence[Trio], who: str) -> float | None:
    values = [getattr(each, who).value for each in trios if getattr(each, who) is not None]
    return sum(values) / len(values) if values else None


def try_one(hunt: Hunt, trial: optuna.Trial) -> float:
    """One trial: its head start on the first half of the items.

    Raises:
        optuna.TrialPruned: the cell is void, or the attack failed (diverged) on one of the models.
    """
    import optuna

    space, kinds = hunt.space, hunt.space.kinds()
    kind = kinds[trial.suggest_categorical("attack", list(kinds))]
    rates = space.learning_rate
    rate = rates[0] if len(rates) == 1 else trial.suggest_float("learning_rate", rates[0], rates[1], log=True)
    axes: dict[str, Any] = {"learning_rate": rate}
    for key in (*AXES[1:], *space.options):
        choices = getattr(space, key) if key in AXES else space.options[key]
        if key == "lora_rank":
            choices = space.ranks(kind)
        axes[key] = choices[0] if len(choices) == 1 else trial.suggest_categorical(key, choices)
    config = space.config(kind, space.seeds, **axes)
    trial.set_user_attr("config", config)
    began = time.monotonic()
    try:
        for whole in hunt.measure(config):
            found = half(whole, 0)
            for who in ("undefended", "floor", "defended"):
                trial.set_user_attr(who, _mean(found, who))
            trial.set_user_attr("seconds", round(time.monotonic() - began, 2))
            if all(each.void(DEFAULT) for each in found):
                trial.set_user_attr(
                    "reason", f"void: the undefended model gains less than {DEFAULT.gain:g} over the floor"
                )
                raise optuna.TrialPruned
    except RunError as error:
        trial.set_user_attr("reason", one_line(str(error)))
        raise optuna.TrialPruned from error
    starts = [start for each in found if (start := each.head_start(DEFAULT)) is not None]
    return sum(starts) / len(starts)


# ---- the search -------------------------------------------------------------------------------------------


def run_search(
    recipe: Recipe,
    space: Space,
    folder: Path,
    *,
    trials_wanted: int,
    fresh_seeds: int = 3,
    jobs: int = 1,
    storage: str | None = None,
    say: Say = lambda text: None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Defend and measure first if need be, search until `trials_wanted` are done, measure the worst cell again.

    Returns what search.json holds. A search that was stopped goes on; more trials go on from those that are there.
    """
    hunt = Hunt(recipe, space, folder, say, quiet=quiet)
    base, floor, _ = hunt.targets()
    url = storage or f"sqlite:///{(hunt.folder / 'search.db').resolve()}"
    trials.check_url(url)  # now, and not after the defence was trained
    hunt.study.evaluate(base, "base")
    hunt.study.evaluate(floor, "control")
    hunt.study.defend()
    hunt.folder.mkdir(parents=True, exist_ok=True)
    name, shared = hunt.name(), storage is not None or jobs > 1
    optuna_study = trials.open_study(url, name)
    say(f"search: {trials_wanted} trials on {hunt.study.defended().run.path.name}")
    if jobs <= 1:
        with progress_bar(trials_wanted, "trial", quiet) as step:
            hunting(hunt, url, name, trials_wanted, shared=shared, step=step)
    else:
        threads = max(1, torch.get_num_threads() // jobs)
        begin = (recipe, space, folder, threads)
        loops = [(url, name, trials_wanted)] * jobs
        with closing(in_processes(_hunt_in_process, loops, jobs, _begin, begin)) as finished:
            for _, error in finished:
                if error is not None:
                    raise error
    result = outcome(hunt, optuna_study.get_trials(deepcopy=False), trials_wanted)
    if result["worst"] is None:
        write(hunt, result)
        reasons = sorted({row["reason"] for row in result["trials"] if row["reason"]})
        raise RunError(
            f"none of {len(result['trials'])} trials gave a head start: {'; '.join(reasons[:3])}. Widen the space"
            " (higher learning rates, more steps) or look into search/search.json."
        )
    say(f"search: the worst cell is measured again with {fresh_seeds} fresh seeds")
    seeds = [FRESH + index for index in range(fresh_seeds)]
    *_, whole = hunt.measure({**result["worst"]["config"], "seeds": seeds}, fresh=True)
    result["measured_again"] = again(whole, seeds)
    write(hunt, result)
    hunt.study.report()
    return result


def again(whole: Sequence[Trio], seeds: Sequence[int]) -> dict[str, Any]:
    """The worst cell on fresh seeds, and on the items that the search did not see where rows hold items."""
    unseen = half(whole, 1)
    start, method = head_start(unseen, DEFAULT)
    every, _ = head_start(whole, DEFAULT)
    halved = any(each.defended is not None and each.defended.items is not None for each in unseen)
    return {
        "head_start": dataclasses.asdict(start) if start else None,
        "interval": method,
        "seeds": list(seeds),
        "items": "every other test item, none of them seen by the search" if halved else "the same as in the search",
        "head_start_all_items": dataclasses.asdict(every) if every else None,
        **{who: _mean(unseen, who) for who in ("defended", "undefended", "floor")},
    }


def hunting(hunt: Hunt, url: str, name: str, wanted: int, *, shared: bool, step: Any = lambda: None) -> None:
    """Run trials until `wanted` are finished: complete, pruned, or failed with an error."""
    import optuna

    study = trials.open_study(url, name)
    # seeded by how many there are: a search that goes on draws new points; workers side by side draw differently
    salt = [hunt.space.seed, len(study.get_trials(deepcopy=False)), *([os.getpid()] if shared else [])]
    with trials.quiet():
        study.sampler = optuna.samplers.TPESampler(seed=int(canonical_hash(salt), 16) % 2**31, constant_liar=True)

    def more(found: Sequence[Any]) -> bool:
        running = sum(trial.state == optuna.trial.TrialState.RUNNING for trial in found)
        return sum(map(is_over, found)) + running < wanted

    def objective(trial: optuna.Trial) -> float:
        with trials.kept_error(trial):
            try:
                return try_one(hunt, trial)
            finally:
                step()

    trials.run_trials(study, objective, more=more)
    errors = [t.user_attrs["error"] for t in study.get_trials(deepcopy=False) if "error" in t.user_attrs]
    if errors and not any(t.value is not None for t in study.get_trials(deepcopy=False)):
        raise RunError(f"{len(errors)} trials failed, the first with: {errors[0]}")


def is_over(trial: Any) -> bool:
    """Finished for good; a trial whose worker died is not."""
    return trial.state.is_finished() and (trial.state.name != "FAIL" or "error" in trial.user_attrs)


def outcome(hunt: Hunt, found: Sequence[Any], wanted: int) -> dict[str, Any]:
    """search.json without the second measurement. `best_*`: the most that the trials so far brought back.

    `best_*` lets each model have its own best attack of the same budget; `head_start_of_bests` compares those.
    """
    rows: list[dict[str, Any]] = []
    best: dict[str, float | None] = dict.fromkeys(("head_start", "defended", "undefended", "floor"))
    worst = None
    for trial in sorted((t for t in found if is_over(t)), key=lambda t: (str(t.datetime_complete), t.number)):
        known = trial.user_attrs
        row = {"trial": trial.number, "state": trial.state.name.lower(), "head_start": trial.value}
        row |= {who: known.get(who) for who in ("defended", "undefended", "floor", "seconds")}
        row |= {"reason": known.get("reason") or known.get("error"), "config": known.get("config")}
        for key in best:
            if row[key] is not None and (best[key] is None or row[key] > best[key]):
                best[key] = row[key]
                worst = row if key == "head_start" else worst
        rows.append({**row, **{f"best_{key}": value for key, value in best.items()}})
    d, u, f = best["defended"], best["undefended"], best["floor"]
    apart = None if d is None or u is None or f is None or u - f < DEFAULT.gain else (d - f) / (u - f)
    return {
        "schema": SCHEMA,
        "defence": hunt.study.defended().run.path.name,
        "recipe": dump(hunt.study.recipe)["study"],
        "space": hunt.space.model_dump(mode="json"),
        "trials_wanted": wanted,
        "seconds": round(sum(row["seconds"] or 0.0 for row in rows), 1),
        "worst": worst
        and {key: worst[key] for key in ("trial", "head_start", "defended", "undefended", "floor", "config")},
        "head_start_of_bests": apart,
        "measured_again": None,
        "trials": rows,
    }


def write(hunt: Hunt, result: dict[str, Any]) -> None:
    """search.json, search.csv and curve.svg (the worst head start against the trials) in search/."""
    write_json(hunt.folder / "search.json", result)
    axes = sorted({key for row in result["trials"] for key in row["config"] or {}} - {"seeds"})
    plain = [key for key in (result["trials"] or [{}])[0] if key not in ("config", "reason")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*plain, *axes, "reason"])
    for row in result["trials"]:
        writer.writerow([*(row[k] for k in plain), *((row["config"] or {}).get(k) for k in axes), row["reason"]])
    write_text(hunt.folder / "search.csv", file.getvalue())
    line = [
        Point(index, row["best_head_start"])
        for index, row in enumerate(result["trials"], 1)
        if row["best_head_start"] is not None
    ]
    if line:
        svg = plots.chart({"defended": line}, title="worst head start found so far", x_label="trials")
        write_text(hunt.folder / "curve.svg", plots.standalone(svg))


# ---- in the processes -------------------------------------------------------------------------------------

_hunt: Hunt | None = None


def _begin(recipe: Recipe, space: Space, folder: Path, threads: int) -> None:
    global _hunt
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    logging.getLogger("repnoise").setLevel(logging.ERROR)
    _hunt = Hunt(recipe, space, folder, quiet=True)


def _hunt_in_process(url: str, name: str, wanted: int) -> None:
    assert _hunt is not None
    hunting(_hunt, url, name, wanted, shared=True)
