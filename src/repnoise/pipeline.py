"""The stages: defend, attack, evaluate, report. Each goes from run folder to run folder and skips what is done."""

from __future__ import annotations

import dataclasses
import difflib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from . import sandbox
from .attacks import ATTACKS, Attack
from .config import Recipe, check_recipe, dump, raw_recipe
from .data import load_pairs, load_rows, split
from .data.study import StudyData
from .defences import DEFENCES
from .errors import ConfigError, DataError, RepNoiseError
from .evaluations import EVALUATIONS, Evaluation
from .models import check_fits, load_model, load_tokenizer, model_fingerprint, random_model, save_model
from .registry import Registry
from .report import write_report
from .runs import Run, canonical_hash, disk_guard
from .training import Objective, ObjectiveTrainer, train

Say = Callable[[str], None]

TRAIN_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": None,
}
# A defence can be resumed; an attack is short and is done again.
DEFENCE_DEFAULTS = {**TRAIN_DEFAULTS, "save_strategy": "steps", "save_steps": 100, "save_total_limit": 1}
ATTACK_DEFAULTS = {**TRAIN_DEFAULTS, "save_strategy": "no"}


# ---- from recipe to objects, all errors at once -------------------------------------------------------------------


def resolve(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe and check all of it, plug-ins and their options included.

    Raises:
        ConfigError: with every error, one line each.
    """
    raw = raw_recipe(name, overrides)
    recipe, errors = check_recipe(raw)
    if recipe is not None:
        errors = list(_plugin_errors(recipe))
    if errors or recipe is None:
        lines = "\n  ".join(errors)
        raise ConfigError(
            f"the recipe {name} has {len(errors)} error{'s' if len(errors) != 1 else ''}:\n  {lines}\n"
            "Mend them and run again; `repnoise recipes show sandbox` prints one that is right."
        )
    return recipe


def _plugin_errors(recipe: Recipe) -> Iterator[str]:
    yield from _option_errors(DEFENCES, recipe.defence.name, recipe.defence.options, "defence")
    yield from _train_errors(recipe.defence.train, "defence.train")
    for index, attack in enumerate(recipe.attacks):
        where = f"attacks.{index}"
        options = {**attack.options, "lora_rank": attack.lora_rank[0]}
        yield from _option_errors(ATTACKS, attack.name, options, where)
        yield from _train_errors(attack.train, f"{where}.train")
    for index, name in enumerate(recipe.evaluations):
        if name not in EVALUATIONS.names():
            yield f"evaluations.{index}: unknown evaluation {name!r}. Available: {', '.join(EVALUATIONS.names())}"


def _option_errors(registry: Registry[Any], name: str, options: dict[str, Any], where: str) -> Iterator[str]:
    try:
        _build(registry, name, options)
    except ValidationError as error:
        known = [field.name for field in dataclasses.fields(registry.get(name))]
        for each in error.errors():
            key = ".".join(map(str, each["loc"]))
            if each["type"] == "unexpected_keyword_argument":
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                yield f"{where}.{key}: unknown key.{hint} Allowed: {', '.join(known)}, train"
            else:
                yield f"{where}.{key}: {each['msg']} (got {each['input']!r})"
    except ConfigError as error:
        yield f"{where}: {error}"


def _build(registry: Registry[Any], name: str, options: dict[str, Any]) -> Any:
    return TypeAdapter(registry.get(name)).validate_python(options)


def _train_errors(values: dict[str, Any], where: str) -> Iterator[str]:
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} - {"output_dir"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            yield f"{where}.{key}: not a field of transformers.TrainingArguments.{hint}"


def training_arguments(values: dict[str, Any], folder: Path, where: str) -> TrainingArguments:
    """`transformers.TrainingArguments`, on the CPU where there is no GPU."""
    given = {"use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": torch.cuda.is_available(), **values}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        return TrainingArguments(output_dir=str(folder), **given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def load_data(recipe: Recipe) -> StudyData:
    """All data of the study; refuses overlapping prompts."""
    config = recipe.data
    if config.name == "sandbox":
        from .sandbox.data import study_data

        return study_data()
    assert config.pairs is not None and config.retain is not None  # the recipe model has checked it
    pairs = load_pairs(config.pairs, fields=config.fields)
    sizes = dict(config.sizes)
    own = {"attack": config.attack, "test": config.test}
    parts = split(pairs, {name: size for name, size in sizes.items() if not own.get(name)}, seed=config.seed)
    for name, source in own.items():
        if source is not None:
            parts[name] = load_pairs(source, fields=config.fields)
    rows = load_rows(config.retain)
    if config.harmless_test is None:
        harmless = split(rows, dict(config.harmless_sizes), seed=config.seed)
    else:
        harmless = {"retain": rows, "test": load_rows(config.harmless_test)}
    empty = [name for name in ("defence", "attack", "test") if not parts.get(name)]
    if empty:
        raise DataError(f"no pairs for {', '.join(empty)}. Set data.sizes, or name sources for attack and test.")
    return StudyData(
        defence=parts["defence"],
        retain=harmless["retain"],
        attacks={"harmful": parts["attack"]},
        test=parts["test"],
        harmless_test=harmless["test"],
        template=config.template,
        max_length=config.max_length,
        allow_overlap=config.allow_overlap,
    )


# ---- a study -----------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """A model that is attacked and evaluated: the untouched one, a control, or the defended one."""

    run: Run
    source: str | Path
    hash: str
    random: bool = False


class Study:
    """A recipe, its folder, and what both need in memory."""

    def __init__(self, recipe: Recipe, folder: Path, say: Say = lambda text: None, *, quiet: bool = False) -> None:
        self.recipe, self.folder, self.say, self.quiet = recipe, Path(folder), say, quiet

    @cached_property
    def data(self) -> StudyData:
        return load_data(self.recipe)

    @cached_property
    def source(self) -> str | Path:
        name = self.recipe.model
        return sandbox.weights(name.removeprefix(sandbox.PREFIX)) if name.startswith(sandbox.PREFIX) else name

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.source)

    @cached_property
    def evaluations(self) -> dict[str, Evaluation]:
        return {name: EVALUATIONS.get(name)() for name in self.recipe.evaluations}

    @cached_property
    def _common(self) -> dict[str, Any]:
        """What every result depends on."""
        return {
            "model": model_fingerprint(self.source) if Path(self.source).exists() else str(self.source),
            "dtype": self.recipe.dtype,
            "data": self.data.record["fingerprints"],
            "template": self.data.template,
            "max_length": self.data.max_length,
            "evaluations": self.recipe.evaluations,
            "seed": self.recipe.seed,
        }

    def load(self, target: Target) -> Any:
        """The target's weights, checked against the tokenizer."""
        if target.random:
            model = random_model(target.source, seed=self.recipe.seed)
        else:
            model = load_model(target.source, dtype=self.recipe.dtype)
        check_fits(model, self.tokenizer)
        return model.to("cuda") if torch.cuda.is_available() else model

    # -- targets

    def base(self) -> Target:
        return Target(Run(self.folder / "base"), self.source, canonical_hash({**self._common, "target": "base"}))

    def controls(self) -> list[Target]:
        targets = []
        for kind in self.recipe.controls:
            source = sandbox.weights("ignorant") if kind == "ignorant" else self.source
            targets.append(
                Target(
                    Run(self.folder / f"control-{kind}"),
                    source,
                    canonical_hash({**self._common, "target": kind}),
                    random=kind == "random",
                )
            )
        return targets

    def defended(self) -> Target:
        defence = self.recipe.defence.model_dump(mode="json")
        digest = canonical_hash({**self._common, "defence": defence})
        run = Run(self.folder / f"{self.recipe.defence.name}-{digest}")
        return Target(run, run.path / "model", digest)

    def targets(self) -> list[Target]:
        return [self.base(), *self.controls(), self.defended()]

    # -- stages

    def defend(self) -> Target:
        """Train the defence; a finished one is kept, an interrupted one goes on from its checkpoint."""
        target, recipe = self.defended(), self.recipe
        if target.run.is_done(target.hash):
            self.say(f"defence {recipe.defence.name}: done before, kept")
            return target
        with target.run.start(
            stage="defend",
            name=recipe.defence.name,
            hash=target.hash,
            parent=self.base().hash,
            seeds=[recipe.seed],
            arguments={"defence": recipe.defence.model_dump(mode="json")},
            data=self.data.record,
            recipe=dump(recipe),
        ):
            self.say(f"defence {recipe.defence.name}: training")
            objective: Objective = _build(DEFENCES, recipe.defence.name, recipe.defence.options)
            set_seed(recipe.seed)
            model = self.load(self.base())
            if recipe.defence.dtype is not None:
                model = model.to(getattr(torch, recipe.defence.dtype))
            values = {"seed": recipe.seed, **DEFENCE_DEFAULTS, **recipe.defence.train}
            checkpoints = target.run.path / "checkpoints"
            trainer = self._trainer(
                model, objective, values, checkpoints, target.run, self.data.defence, "defence.train", self.data.retain
            )
            with disk_guard(target.run.path):
                train(trainer)
                save_model(trainer.model, self.tokenizer, target.run.path / "model")
            self._measure(target.run, trainer.model)
            shutil.rmtree(checkpoints, ignore_errors=True)
            target.run.finish(model={"fingerprint": model_fingerprint(target.run.path / "model")})
        return target

    def evaluate(self, target: Target, stage: str) -> None:
        """Measure an untouched model or a control before any attack."""
        if target.run.is_done(target.hash):
            return
        with target.run.start(
            stage=stage,
            name=target.run.path.name,
            hash=target.hash,
            seeds=[self.recipe.seed],
            data=self.data.record,
            recipe=dump(self.recipe),
        ):
            self.say(f"evaluating {target.run.path.name}")
            self._measure(target.run, self.load(target))
            target.run.finish()

    def cells(self) -> list[dict[str, Any]]:
        """Settings of every attack of the recipe, `seed` among them."""
        harms = list(self.data.attacks)
        for index, attack in enumerate(self.recipe.attacks):
            unknown = [harm for harm in attack.harm or [] if harm not in harms]
            if unknown:
                raise ConfigError(
                    f"attacks.{index}.harm: {', '.join(unknown)} is not in this data. Available: {', '.join(harms)}."
                )
        default = [harm for harm in harms if harm != "withheld"]
        return [cell for attack in self.recipe.attacks for cell in attack.cells(default)]

    def attack_run(self, target: Target, cell: dict[str, Any]) -> tuple[Run, str]:
        digest = canonical_hash({"parent": target.hash, "cell": cell, "curve": self.recipe.curve})
        return Run(target.run.path / "attacks" / f"{cell['name']}-{digest}"), digest

    def attack(self, target: Target, cell: dict[str, Any]) -> None:
        """Attack one model in one way, measure it, and let the weights go (unless the recipe keeps them)."""
        run, digest = self.attack_run(target, cell)
        if run.is_done(digest):
            return
        settings = {key: value for key, value in cell.items() if key not in ("seed", "train")}
        seed, harm = cell["seed"], cell["harm"]
        options = {k: v for k, v in settings.items() if k not in ("name", "harm", "learning_rate", "steps", "batch_size")}
        with run.start(
            stage="attack",
            name=cell["name"],
            hash=digest,
            parent=target.hash,
            seeds=[seed],
            arguments={"attack": settings, "seed": seed},
            recipe=dump(self.recipe),
        ):
            attack: Attack = _build(ATTACKS, cell["name"], options)
            set_seed(seed)
            model = attack.prepare(self.load(target))
            values = {
                **ATTACK_DEFAULTS,
                "disable_tqdm": True,
                "learning_rate": cell["learning_rate"],
                "max_steps": cell["steps"],
                "per_device_train_batch_size": cell["batch_size"],
                "seed": seed,
                **cell["train"],
            }
            curve = _Curve(self, harm, seed)
            trainer = self._trainer(
                model, attack, values, run.path / "checkpoints", run, self.data.attacks[harm], "attacks.train"
            )
            trainer.add_callback(curve)
            train(trainer, resumable=False)
            model = attack.finish(trainer.model)
            self._measure(run, model, harm=harm, seed=seed, along=curve.rows)
            if self.recipe.keep_attacked_weights:
                save_model(model, self.tokenizer, run.path / "model")
            run.finish()

    def report(self) -> Path:
        return write_report(self.folder)

    # -- inside

    def _trainer(
        self,
        model: Any,
        objective: Objective,
        values: dict[str, Any],
        checkpoints: Path,
        run: Run,
        pairs: list[Any],
        where: str,
        retain: list[Any] | None = None,
    ) -> ObjectiveTrainer:
        if self.quiet:
            values = {**values, "disable_tqdm": True}
        return ObjectiveTrainer(
            model=model,
            objective=objective,
            args=training_arguments(values, checkpoints, where),
            train_dataset=pairs,
            processing_class=self.tokenizer,
            retain_dataset=retain,
            template=self.data.template,
            max_length=self.data.max_length,
            log_file=run.path / "train.jsonl",
        )

    def _measure(
        self,
        run: Run,
        model: Any,
        *,
        harm: str | None = None,
        seed: int | None = None,
        along: dict[str, list[dict[str, Any]]] | None = None,
    ) -> None:
        seed = self.recipe.seed if seed is None else seed
        for name, evaluation in self.evaluations.items():
            found = evaluation.measure(model, self.tokenizer, self.data, seed=seed, harm=harm)
            run.write_rows(name, [*(along or {}).get(name, []), *found.rows])
            if found.samples:
                run.write_samples(name, found.samples)


class _Curve(TrainerCallback):
    """Measures harm on the way, without touching the training's random numbers."""

    def __init__(self, study: Study, harm: str, seed: int) -> None:
        self.study, self.harm, self.seed = study, harm, seed
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if 0 in self.study.recipe.curve:
            self._point(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.study.recipe.curve and state.global_step < state.max_steps:
            self._point(model, state.global_step)

    def _point(self, model: Any, step: int) -> None:
        with torch.random.fork_rng():
            for name, evaluation in self.study.evaluations.items():
                found = evaluation.along(
                    model, self.study.tokenizer, self.study.data, seed=self.seed, harm=self.harm
                )
                self.rows.setdefault(name, []).extend({**row, "step": step} for row in found.rows)


# ---- the whole loop ------------------------------------------------------------------------------------------------


def run(recipe: Recipe, folder: Path, *, jobs: int = 1, say: Say = lambda text: None, quiet: bool = False) -> Path:
    """defend -> attack everything in the same way -> evaluate -> report. Returns the report's path.

    Args:
        jobs: attacks that run at a time, each in a process of its own with its share of the cores.
    """
    study = Study(recipe, folder, say, quiet=quiet)
    study.evaluate(study.base(), "base")
    for control in study.controls():
        study.evaluate(control, "control")
    study.defend()
    attack_all(study, jobs=jobs)
    return study.report()


def attack_all(study: Study, *, jobs: int = 1) -> None:
    """Attack every target in every way of the recipe that is not done yet."""
    todo = []
    for target in study.targets():
        for cell in study.cells():
            attacked, digest = study.attack_run(target, cell)
            if not attacked.is_done(digest):
                todo.append((target, cell))
    if not todo:
        study.say("attacks: all done before, kept")
        return
    with _bar(len(todo), "attacks", study.quiet) as step:
        if jobs <= 1:
            for target, cell in todo:
                study.attack(target, cell)
                step()
            return
        threads = max(1, torch.get_num_threads() // jobs)
        pool = ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=_worker, initargs=(study.recipe, study.folder, threads)
        )
        try:
            waiting = [pool.submit(_attack_in_worker, target, cell) for target, cell in todo]
            for finished in as_completed(waiting):
                finished.result()
                step()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()


_study: Study | None = None


def _worker(recipe: Recipe, folder: Path, threads: int) -> None:
    global _study
    torch.set_num_threads(threads)
    _study = Study(recipe, folder, quiet=True)


def _attack_in_worker(target: Target, cell: dict[str, Any]) -> None:
    assert _study is not None
    try:
        _study.attack(target, cell)
    except RepNoiseError as error:
        raise type(error)(f"attack {cell} on {target.run.path.name}: {error}") from None


@contextmanager
def _bar(total: int, what: str, quiet: bool) -> Iterator[Callable[[], None]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="attack", disable=quiet, dynamic_ncols=True) as bar:
        yield lambda: bar.update() and None
