"""A study and its stages: defend, evaluate, attack, report. Each goes from run folder to run folder, once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from .. import sandbox
from ..attacks import Context, attacker, distinct, training_values, unknown_to
from ..data import Pair, RowDataset, side
from ..data.parties import StudyData
from ..defences import DEFENCES
from ..errors import ConfigError, DataError, ModelError, RunError
from ..evaluations import EVALUATIONS, Evaluation
from ..models import (
    add_lora,
    anatomy,
    check_4bit,
    check_fits,
    check_source,
    load_model,
    load_tokenizer,
    merge,
    merge_into,
    model_fingerprint,
    random_model,
    save_model,
    vector,
)
from ..recipes.checking import dump
from ..recipes.schema import Recipe
from ..report import write_report
from ..store.files import disk_guard, write_yaml
from ..store.lock import folder_lock
from ..store.provenance import canonical_hash
from ..store.run import Run
from ..training import Objective, ObjectiveTrainer, train
from ..training.arguments import ATTACK_DEFAULTS, DEFENCE_DEFAULTS, training_arguments
from .load import check_lengths, load_data
from .target import Say, Target


class Study:
    """A recipe, its folder, and what both need in memory."""

    def __init__(self, recipe: Recipe, folder: Path, say: Say = lambda text: None, *, quiet: bool = False) -> None:
        self.recipe, self.folder, self.say, self.quiet = recipe, Path(folder), say, quiet

    @cached_property
    def data(self) -> StudyData:
        """Loaded and checked for everything that a later stage would stumble over."""
        data = load_data(self.recipe)
        self._check_attacks(data)
        data.defence_of(self.recipe.defence.categories)
        check_lengths(data, self.tokenizer)
        return data

    @cached_property
    def source(self) -> str | Path:
        name = self.recipe.model
        return sandbox.weights(name.removeprefix(sandbox.PREFIX)) if name.startswith(sandbox.PREFIX) else name

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.source)

    @cached_property
    def evaluations(self) -> dict[str, Evaluation]:
        return {each.label: EVALUATIONS.build(each.name, each.options) for each in self.recipe.evaluations}

    @cached_property
    def _common(self) -> dict[str, Any]:
        """What every result depends on."""
        return {
            "model": self._fingerprint(self.source),
            "dtype": self.recipe.dtype,
            "data": self.data.record["fingerprints"],
            "template": self.data.template,
            "max_length": self.data.max_length,
            "seed": self.recipe.seed,
        }

    @staticmethod
    def _fingerprint(source: str | Path) -> str:
        if not Path(source).exists():
            return str(source)
        try:
            return model_fingerprint(source)
        except ModelError:
            load_model(source)  # says more about what is wrong with the folder
            raise

    def load(self, target: Target, **options: Any) -> Any:
        """The target's weights, checked against the tokenizer. `options` of `load_model` win over the recipe."""
        if target.random:
            model: Any = random_model(target.source, seed=self.recipe.seed, dtype=self.recipe.dtype)
        else:
            model = load_model(target.source, **{"dtype": self.recipe.dtype, **options})
        check_fits(model, self.tokenizer)
        anatomy(model)  # an unknown family is refused here, before any work
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and self.data.max_length > context:
            raise ModelError(
                f"data.max_length is {self.data.max_length}, but the context of {target.source} has {context}"
                f" tokens. Set data.max_length={context} or less."
            )
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
        """The model that the recipe's defence makes, or the one that is given as `defended`."""
        if self.recipe.defended is not None:
            given = self.recipe.defended
            digest = canonical_hash({**self._common, "given": self._fingerprint(given)})
            return Target(Run(self.folder / f"given-{digest}"), given, digest)
        defence = self.recipe.defence.model_dump(mode="json")
        digest = canonical_hash({**self._common, "defence": defence})
        run = Run(self.folder / f"{self.recipe.defence.name}-{digest}")
        return Target(run, run.path / "model", digest)

    def targets(self) -> list[Target]:
        return [self.base(), *self.controls(), self.defended()]

    # -- stages

    def check_defence(self) -> None:
        """Raise now where `defend` would only after the undefended model and the controls were measured."""
        if self.recipe.defended is not None:
            check_source(self.recipe.defended)
        elif self.recipe.defence.load_in_4bit and not (target := self.defended()).run.is_done(target.hash):
            check_4bit(self.source)

    def defend(self) -> Target:
        """Train the defence; a finished one is kept, an interrupted one goes on from its checkpoint.

        A model that is given as `defended` is measured only.
        """
        target, recipe = self.defended(), self.recipe
        if recipe.defended is not None:
            self.evaluate(target, "defend")
            return target
        if target.run.is_done(target.hash):
            self.evaluate(target, "defend")
            self.say(f"defence {recipe.defence.name}: done before, kept")
            return target
        pairs = self.data.defence_of(recipe.defence.categories)
        with target.run.start(
            stage="defend",
            name=recipe.defence.name,
            hash=target.hash,
            parent=self.base().hash,
            seeds=[recipe.seed],
            arguments={"defence": recipe.defence.model_dump(mode="json"), "pairs": len(pairs)},
            data=self.data.record,
            recipe=dump(recipe),
        ):
            self.say(f"defence {recipe.defence.name}: training")
            self._make(target, pairs)
            target.run.finish(model={"fingerprint": model_fingerprint(target.run.path / "model")})
        self.evaluate(target, "defend")
        return target

    def _make(self, target: Target, pairs: list[Pair]) -> None:
        """Train the recipe's defence on the base and save what it releases. Its models are gone when it returns."""
        recipe, config, run = self.recipe, self.recipe.defence, target.run
        objective: Objective = DEFENCES.build(config.name, config.options)
        set_seed(recipe.seed)
        if config.load_in_4bit:
            model = self.load(self.base(), dtype=config.dtype or recipe.dtype, load_in_4bit=True)
        else:
            model = self.load(self.base())
            if config.dtype is not None:
                model = model.to(getattr(torch, config.dtype))
        lora = objective.vector or ({"rank": config.lora_rank} if config.lora_rank else None)
        if lora is not None:
            model = add_lora(model, **lora)
        values = {"seed": recipe.seed, **DEFENCE_DEFAULTS, **config.train}
        checkpoints = run.path / "checkpoints"
        trainer = self._trainer(model, objective, values, checkpoints, run, pairs, "defence.train", self.data.retain)
        with disk_guard(run.path):
            train(trainer)
            if objective.vector is not None:  # the weights stay as they were
                self._save(run, self.load(self.base()))
                vector.save_vector(trainer.model, target.source)
            elif config.load_in_4bit:  # on the CPU: what is trained in 4 bits may not fit the GPU whole
                self._save(run, merge_into(load_model(self.source, dtype=recipe.dtype), trainer.model))
            else:
                self._save(run, trainer.model if lora is None else merge(trainer.model))
        shutil.rmtree(checkpoints, ignore_errors=True)

    def evaluate(self, target: Target, stage: str) -> None:
        """Measure a model before any attack; what was measured with the same settings is kept."""
        lacking = [label for label in self.evaluations if not target.run.has_rows(label, self._settings(label))]
        done = target.run.is_done(target.hash)
        if done and not lacking:
            return
        if done:
            self.say(f"evaluating {target.run.path.name}: {', '.join(lacking)}")
            with folder_lock(target.run.path):
                self._measure(target.run, self.load(target), lacking, seed=self.recipe.seed)
            return
        with target.run.start(
            stage=stage,
            name=target.run.path.name,
            hash=target.hash,
            parent=self.base().hash if stage == "defend" else None,
            seeds=[self.recipe.seed],
            arguments={"given": str(target.source)} if stage == "defend" else None,
            data=self.data.record,
            recipe=dump(self.recipe),
        ):
            # rows of this hash, kept from a run that was cut off, are not made again
            lacking = [label for label in lacking if not target.run.has_rows(label, self._settings(label))]
            self.say(f"evaluating {target.run.path.name}")
            self._measure(target.run, self.load(target), lacking, seed=self.recipe.seed)
            target.run.finish()

    def _settings(self, label: str) -> str:
        """Hash of what an evaluation's rows depend on beside the model."""
        config = next(each for each in self.recipe.evaluations if each.label == label)
        return canonical_hash(config.model_dump(mode="json"))

    def cells(self) -> list[dict[str, Any]]:
        """Settings of every attack of the recipe, `seed` among them."""
        default = [harm for harm in self.data.attacks if harm != "withheld"]
        return [cell for attack in self.recipe.attacks for cell in attack.cells(default)]

    def attack_run(self, target: Target, cell: dict[str, Any]) -> tuple[Run, str]:
        measured = [self._settings(label) for label, evaluation in self.evaluations.items() if evaluation.attacked]
        settings = {"parent": target.hash, "cell": cell, "curve": self.recipe.curve, "evaluations": measured}
        digest = canonical_hash(settings)
        return Run(target.run.path / "attacks" / f"{cell['name']}-{digest}"), digest

    def is_attacked(self, target: Target, cell: dict[str, Any]) -> bool:
        run, digest = self.attack_run(target, cell)
        return run.is_done(digest) and (not self.recipe.keep_attacked_weights or (run.path / "model").is_dir())

    def attack(self, target: Target, cell: dict[str, Any]) -> None:
        """Attack one model in one way, measure it, and let the weights go (unless the recipe keeps them)."""
        run, digest = self.attack_run(target, cell)
        if self.is_attacked(target, cell):
            return
        settings = {key: value for key, value in cell.items() if key != "seed" and (key != "train" or value)}
        seed, harm = cell["seed"], cell["harm"]
        with run.start(
            stage="attack",
            name=cell["name"],
            hash=digest,
            parent=target.hash,
            seeds=[seed],
            arguments={"attack": settings, "seed": seed},
            recipe=dump(self.recipe),
        ):
            attack, pairs = attacker(cell, self.data)
            set_seed(seed)
            template, steps = cell.get("template", self.data.template), cell["steps"]
            context = Context(
                self.tokenizer, self._public, template, max_length=self.data.max_length, seed=seed, steps=steps
            )
            model = self.load(target)
            shifts = vector.read_vector(model, target.source)
            model = attack.prepare(model, context)
            curve = _Curve(self, harm, seed, shifts)
            checkpoints = run.path / "checkpoints"
            with self._no_leftovers(checkpoints, run.path / "model"):
                if steps > 0:
                    values = {**ATTACK_DEFAULTS, **training_values(cell)}
                    with vector.active(shifts):
                        trainer = self._trainer(
                            model, attack, values, checkpoints, run, pairs, "attacks.train", template=template
                        )
                        trainer.add_callback(curve)
                        factor = attack.schedule(steps)
                        if factor is not None:  # Trainer makes a scheduler of its own only where it finds none
                            trainer.lr_scheduler = LambdaLR(trainer.create_optimizer(), factor)
                        train(trainer, resumable=False)
                    model = trainer.model
            model = attack.finish(model)
            labels = [label for label, evaluation in self.evaluations.items() if evaluation.attacked]
            self._measure(run, model, labels, harm=harm, seed=seed, along=curve.rows)
            if self.recipe.keep_attacked_weights:
                self._save(run, model)
            run.finish()

    def _public(self, source: str | None = None) -> Any:
        """The checkpoint that was public before the defence, or the one that an attack names."""
        return self.load(self.base() if source is None else Target(self.base().run, source, hash=""))

    def _check_attacks(self, data: StudyData) -> None:
        """Everything about the attacks that can be told before any work: harms, rows, templates, arguments."""
        for index, attack in enumerate(self.recipe.attacks):
            unknown = [harm for harm in attack.harm or [] if harm not in data.attacks]
            if unknown:
                raise ConfigError(
                    f"attacks.{index}.harm: {', '.join(unknown)} is not in this data."
                    f" Available: {', '.join(data.attacks)}."
                )
            for cell in distinct(attack.cells(list(data.attacks))):
                where = f"attacks.{index}"
                training_arguments({**ATTACK_DEFAULTS, **training_values(cell)}, self.folder, where)
                try:
                    _, pairs = attacker(cell, data)
                    rows = side(pairs if "template" in cell else unknown_to(data, pairs), "harmful")
                    template = cell.get("template", data.template)
                    if rows:
                        RowDataset(rows, self.tokenizer, template=template, max_length=data.max_length)
                except (ConfigError, DataError) as error:
                    raise type(error)(f"{where}: {error}") from error

    def report(self) -> Path:
        run = self.defended().run
        if run.path.is_dir():  # what was added since the defence was trained: evaluations, the utility bound
            write_yaml(run.path / "recipe.yaml", dump(self.recipe))
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
        template: str | None = None,
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
            template=template or self.data.template,
            max_length=self.data.max_length,
            log_file=run.path / "train.jsonl",
        )

    def _save(self, run: Run, model: Any) -> None:
        for draft in run.path.glob(".model.*"):  # of a killed process
            shutil.rmtree(draft, ignore_errors=True)
        save_model(model, self.tokenizer, run.path / "model", overwrite=True)

    @staticmethod
    @contextmanager
    def _no_leftovers(*folders: Path) -> Iterator[None]:
        """An attack leaves no weights but those that the recipe keeps, whatever happens."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            yield
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def _measure(
        self,
        run: Run,
        model: Any,
        labels: list[str],
        *,
        seed: int,
        harm: str | None = None,
        along: dict[str, list[dict[str, Any]]] | None = None,
    ) -> None:
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise RunError(
                f"the weights in {run.path.name} hold NaN or infinity: nothing to measure. If they were"
                " trained here, lower the learning rate or set max_grad_norm; else get the model again."
            )
        for label in labels:
            found = self.evaluations[label].measure(model, self.tokenizer, self.data, seed=seed, harm=harm)
            if found.samples:
                run.write_samples(label, found.samples)
            run.write_rows(label, [*(along or {}).get(label, []), *found.rows], settings=self._settings(label))


class _Curve(TrainerCallback):
    """Measures harm on the way, without touching the training's random numbers."""

    def __init__(self, study: Study, harm: str, seed: int, shifts: vector.Shifts) -> None:
        self.study, self.harm, self.seed, self.shifts = study, harm, seed, shifts
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if 0 in self.study.recipe.curve:
            self._point(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.study.recipe.curve and state.global_step < state.max_steps:
            self._point(model, state.global_step)

    def _point(self, model: Any, step: int) -> None:
        with torch.random.fork_rng(), vector.asleep(self.shifts):
            for name, evaluation in self.study.evaluations.items():
                if not evaluation.attacked:
                    continue
                found = evaluation.along(model, self.study.tokenizer, self.study.data, seed=self.seed, harm=self.harm)
                self.rows.setdefault(name, []).extend({**row, "step": step} for row in found.rows)
