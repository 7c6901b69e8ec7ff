"""Attack one model in one way, measure what it brought back, and let the weights go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments, set_seed

from ..attacks import Context
from ..models import vector
from ..store.run import Run
from ..training import ObjectiveTrainer, train
from ..training.arguments import axes_of, training_arguments
from . import identity
from .audit import Cut, counted
from .cell import Cell
from .changes import since_attacked
from .measuring import measure
from .study import Study
from .target import Target

Rows = dict[str, list[dict[str, Any]]]
"""Label of an evaluation -> its rows."""


def attack(study: Study, target: Target, cell: Cell) -> None:
    """Attack `target` as `cell` says and measure it; what is done already is kept.

    The attacked weights are let go, unless the recipe keeps them.
    """
    run, digest = study.attack_run(target, cell)
    if study.is_attacked(target, cell):
        return
    with run.held():
        if study.is_attacked(target, cell):  # another process was faster
            return
        args = training_arguments(cell.training(), run.path / "checkpoints", "attacks.train")
        with run.start(
            stage="attack",
            name=cell.name,
            hash=digest,
            parent=target.hash,
            seeds=[cell.seed],
            arguments={
                "attack": cell.recorded(),
                "seed": cell.seed,
                "covers": list(cell.attack().covers),
                "training": axes_of(args) if cell.steps else None,
            },
            recipe=study.written_out,
            depends=study.attack_depends(target, cell),
            changed=since_attacked(study, target, cell),
        ):
            with _no_leftovers(run.path / "checkpoints", run.path / "model"):
                made = _attacked(study, target, cell, args, run)
            labels = [label for label, evaluation in study.evaluations.items() if evaluation.attacked]
            measure(study, run, made.model, labels, harm=cell.harm, seed=cell.seed, along=made.along)
            if study.recipe.keep_attacked_weights:
                study.save(run, made.model)
            run.finish(data={"truncated": made.cut})


class _Made(NamedTuple):
    """The model after the attack, what was measured on the way, and how many of its rows were cut."""

    model: Any
    along: Rows
    cut: Cut


def _attacked(study: Study, target: Target, cell: Cell, args: TrainingArguments, run: Run) -> _Made:
    """Change the model, train it, change it again."""
    data, template = study.data, cell.template or study.data.template
    made = cell.attack()
    pairs = cell.rows(made, data)
    set_seed(cell.seed)

    def public(source: str | None = None) -> Any:
        if source is None:
            return study.load(study.base())
        return study.load(Target(run, source, {}, revision=identity.commit(source)))

    context = Context(study.tokenizer, public, template, max_length=data.max_length, seed=cell.seed, steps=cell.steps)
    model = study.load(target)
    curve = _Curve(study, cell, vector.read_vector(model, target.source))
    model, cut = made.prepare(model, context), {}
    if cell.steps > 0:
        with vector.active(curve.shifts):
            trainer = ObjectiveTrainer(
                model=model,
                objective=made,
                args=args,
                train_dataset=pairs,
                processing_class=study.tokenizer,
                template=template,
                max_length=data.max_length,
                log_file=run.path / "train.jsonl",
            )
            trainer.add_callback(curve)
            factor = made.schedule(cell.steps)
            if factor is not None:  # Trainer makes a scheduler of its own only where it finds none
                trainer.lr_scheduler = LambdaLR(trainer.create_optimizer(), factor)
            train(trainer, resumable=False)
        encoded: Any = trainer.train_dataset
        model, cut = trainer.model, {"attack rows": counted(encoded.truncated["harmful"], len(pairs))}
    return _Made(made.finish(model), curve.rows, cut)


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


class _Curve(TrainerCallback):
    """Measures harm on the way, without touching the training's random numbers."""

    def __init__(self, study: Study, cell: Cell, shifts: vector.Shifts) -> None:
        self.study, self.cell, self.shifts = study, cell, shifts
        self.rows: Rows = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if 0 in self.study.recipe.curve:
            self._point(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.study.recipe.curve and state.global_step < state.max_steps:
            self._point(model, state.global_step)

    def _point(self, model: Any, step: int) -> None:
        study, seed, harm = self.study, self.cell.seed, self.cell.harm
        with torch.random.fork_rng(), vector.asleep(self.shifts):
            for name, evaluation in study.evaluations.items():
                if evaluation.attacked:
                    found = evaluation.along(model, study.tokenizer, study.data, seed=seed, harm=harm)
                    self.rows.setdefault(name, []).extend({**row, "step": step} for row in found.rows)
