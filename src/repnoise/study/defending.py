"""Make the defended model: train the recipe's defence on the undefended one, save what it releases, measure it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch
from transformers import set_seed

from ..data import Pair
from ..defences import DEFENCES
from ..models import (
    add_lora,
    check_4bit,
    check_source,
    load_model,
    merge,
    merge_into,
    model_fingerprint,
    vector,
)
from ..recipes.checking import dump
from ..store.files import disk_guard
from ..training import Objective, ObjectiveTrainer, train
from ..training.arguments import DEFENCE_DEFAULTS, training_arguments
from .measuring import evaluate
from .study import Study
from .target import Target


def check_defence(study: Study) -> None:
    """Raise now where `defend` would only after the undefended model and the controls were measured."""
    if study.recipe.defended is not None:
        check_source(study.recipe.defended)
    elif study.recipe.defence.load_in_4bit and not (target := study.defended()).run.is_done(target.hash):
        check_4bit(study.source)


def defend(study: Study) -> Target:
    """Train the defence; a finished one is kept, an interrupted one goes on from its checkpoint.

    A model that is given as `defended` is measured only.
    """
    target, recipe = study.defended(), study.recipe
    run, name = target.run, recipe.defence.name
    if recipe.defended is None and not run.is_done(target.hash):
        with run.held():
            if not run.is_done(target.hash):  # else another process was faster
                pairs = study.data.defence_of(recipe.defence.categories)
                with run.start(
                    stage="defend",
                    name=name,
                    hash=target.hash,
                    parent=study.base().hash,
                    seeds=[recipe.seed],
                    arguments={"defence": recipe.defence.model_dump(mode="json"), "pairs": len(pairs)},
                    data=study.data.record,
                    recipe=dump(recipe),
                ):
                    study.say(f"defence {name}: training")
                    _train(study, target, pairs)
                    run.finish(model={"fingerprint": model_fingerprint(run.path / "model")})
    elif recipe.defended is None:
        study.say(f"defence {name}: done before, kept")
    evaluate(study, target, "defend")
    return target


def _train(study: Study, target: Target, pairs: Sequence[Pair]) -> None:
    """Train the recipe's defence on the base and save what it releases. Its models are gone when it returns."""
    recipe, config, run = study.recipe, study.recipe.defence, target.run
    objective: Objective = DEFENCES.build(config.name, config.options)
    set_seed(recipe.seed)
    if config.load_in_4bit:
        model = study.load(study.base(), dtype=config.dtype or recipe.dtype, load_in_4bit=True)
    else:
        model = study.load(study.base())
        if config.dtype is not None:
            model = model.to(getattr(torch, config.dtype))
    lora = objective.vector or ({"rank": config.lora_rank} if config.lora_rank else None)
    if lora is not None:
        model = add_lora(model, **lora)
    values = {"seed": recipe.seed, **DEFENCE_DEFAULTS, **config.train}
    if study.quiet:
        values["disable_tqdm"] = True
    checkpoints = run.path / "checkpoints"
    trainer = ObjectiveTrainer(
        model=model,
        objective=objective,
        args=training_arguments(values, checkpoints, "defence.train"),
        train_dataset=pairs,
        retain_dataset=study.data.retain,
        processing_class=study.tokenizer,
        template=study.data.template,
        max_length=study.data.max_length,
        log_file=run.path / "train.jsonl",
    )
    with disk_guard(run.path):
        train(trainer)
        if objective.vector is not None:  # the weights stay as they were
            study.save(run, study.load(study.base()))
            vector.save_vector(trainer.model, target.source)
        elif config.load_in_4bit:  # on the CPU: what is trained in 4 bits may not fit the GPU whole
            study.save(run, merge_into(load_model(study.source, dtype=recipe.dtype), trainer.model))
        else:
            study.save(run, trainer.model if lora is None else merge(trainer.model))
    shutil.rmtree(checkpoints, ignore_errors=True)
