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

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bars import DEFAULT
from ..errors import ConfigError, RunError
from ..recipes.schema import AttackConfig, Recipe
from ..report.head_start import Trio
from ..report.manifests import Row
from ..report.readings import Reading, pick
from ..seeds import derive_seed
from ..store.provenance import canonical_hash, one_line
from ..store.run import Run
from ..study.attacking import attack
from ..study.cell import Cell
from ..study.defending import defend
from ..study.measuring import evaluate
from ..study.pipeline import report
from ..study.study import Study
from ..study.target import Say, Target
from ..study.workers import in_processes, progress_bar
from . import queue
from .search_results import again, half, is_over, mean_of, outcome, write
from .search_space import AXES, FRESH, Space, read_space

if TYPE_CHECKING:
    import optuna

__all__ = ["SearchStudy", "Space", "read_space", "run_search"]

# ---- one trial --------------------------------------------------------------------------------------------


class SearchStudy:
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
        measured = self.study.inputs.measured
        what = [[target.hash for target in self.targets()], self.space.model_dump(mode="json"), measured]
        return f"search-{canonical_hash(what)}-{queue.folder_id(self.folder)}"

    def cells(self, config: dict[str, Any]) -> list[Cell]:
        return [Cell.of(each) for each in AttackConfig.model_validate(config).cells([self.space.harm])]

    def measure(self, config: dict[str, Any], *, fresh: bool = False) -> Iterator[list[Trio]]:
        """Attack the three models; gives the trios without the defended one first, then whole, on all items.

        Args:
            fresh: in the study itself, where the report counts it, and not in search/.
        """
        base, floor, defended = self.targets()
        found: list[Trio] = []
        cells = self.cells(config)
        for cell in cells:
            control = floor.run.path.name.removeprefix("control-")
            undefended = self._attacked(base, cell, fresh)
            found.append(Trio(cell.seed, None, undefended, self._attacked(floor, cell, fresh), control))
        yield found
        yield [
            dataclasses.replace(each, defended=self._attacked(defended, cell, fresh))
            for each, cell in zip(found, cells, strict=True)
        ]

    def _attacked(self, target: Target, cell: Cell, fresh: bool) -> Reading:
        at = target if fresh else dataclasses.replace(target, run=Run(self.folder / target.run.path.name))
        attack(self.study, at, cell)
        run, _ = self.study.attack_run(at, cell)
        harm = self.space.harm
        found = pick(map(Row.of, run.read_rows()), harm, steps=cell.steps)
        if found is None:
            raise ConfigError(
                f"no evaluation of this recipe gives {harm} as a rate from 0 to 1, so there is no head start to search"
                " for. Add `sandbox` or `harm` (with a judge) to evaluations, or set another harm in the space."
            )
        return found


def try_one(search: SearchStudy, trial: optuna.Trial) -> float:
    """One trial: its head start on the first half of the items.

    Raises:
        optuna.TrialPruned: the cell is void, or the attack failed (diverged) on one of the models.
    """
    import optuna

    space, kinds = search.space, search.space.kinds()
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
        for whole in search.measure(config):
            found = half(whole, 0)
            for who in ("undefended", "floor", "defended"):
                trial.set_user_attr(who, mean_of(found, who))
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
    search = SearchStudy(recipe, space, folder, say, quiet=quiet)
    base, floor, _ = search.targets()
    url = storage or f"sqlite:///{(search.folder / 'search.db').resolve()}"
    queue.check_url(url)  # now, and not after the defence was trained
    study = search.study
    evaluate(study, base, "base")
    evaluate(study, floor, "control")
    defend(study)
    search.folder.mkdir(parents=True, exist_ok=True)
    name, shared = search.name(), storage is not None or jobs > 1
    trials = queue.open_study(url, name)
    say(f"search: {trials_wanted} trials on {study.defended().run.path.name}")
    with progress_bar(trials_wanted, "trial", quiet) as at:

        def look() -> None:
            at(sum(map(is_over, trials.get_trials(deepcopy=False))))

        if jobs <= 1:
            run_trials(search, url, name, trials_wanted, shared=shared, meanwhile=look)
        else:
            loops = [(url, name, trials_wanted)] * jobs
            work = in_processes(run_trials, loops, jobs, _quiet_search, (recipe, space, folder), meanwhile=look)
            with closing(work) as finished:
                for _, error in finished:
                    if error is not None:
                        raise error
    result = outcome(study, space, trials.get_trials(deepcopy=False), trials_wanted)
    if result["worst"] is None:
        write(search.folder, result)
        reasons = sorted({row["reason"] for row in result["trials"] if row["reason"]})
        raise RunError(
            f"none of {len(result['trials'])} trials gave a head start: {'; '.join(reasons[:3])}. Widen the space"
            " (higher learning rates, more steps) or look into search/search.json."
        )
    say(f"search: the worst cell is measured again with {fresh_seeds} fresh seeds")
    seeds = [FRESH + index for index in range(fresh_seeds)]
    *_, whole = search.measure({**result["worst"]["config"], "seeds": seeds}, fresh=True)
    result["measured_again"] = again(whole, seeds)
    write(search.folder, result)
    report(study)
    return result


def _quiet_search(recipe: Recipe, space: Space, folder: Path) -> SearchStudy:
    return SearchStudy(recipe, space, folder, quiet=True)


def run_trials(
    search: SearchStudy,
    url: str,
    name: str,
    wanted: int,
    *,
    shared: bool = True,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Run trials until `wanted` are finished: complete, pruned, or failed with an error."""
    import optuna

    study = queue.open_study(url, name)
    # seeded by how many there are: a search that goes on draws new points; workers side by side draw differently
    seed = derive_seed(search.space.seed, len(study.get_trials(deepcopy=False)), *([os.getpid()] if shared else []))
    with queue.quiet():
        study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)

    def more(found: Sequence[Any]) -> bool:
        running = sum(trial.state == optuna.trial.TrialState.RUNNING for trial in found)
        return sum(map(is_over, found)) + running < wanted

    def objective(trial: optuna.Trial) -> float:
        with queue.kept_error(trial):
            return try_one(search, trial)

    queue.run_trials(study, objective, more=more, meanwhile=meanwhile)
    errors = [t.user_attrs["error"] for t in study.get_trials(deepcopy=False) if "error" in t.user_attrs]
    if errors and not any(t.value is not None for t in study.get_trials(deepcopy=False)):
        raise RunError(f"{len(errors)} trials failed, the first with: {errors[0]}")
