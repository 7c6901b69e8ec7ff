"""Make the defended model: train the recipe's defence on the undefended one, save what it releases, measure it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch
from transformers import TrainingArguments, set_seed

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
from ..store.files import disk_guard
from ..store.run import Run
from ..training import Objective, ObjectiveTrainer, train
from ..training.arguments import DEFENCE_DEFAULTS, axes_of, training_arguments
from .changes import since_alike, summed_up
from .measuring import evaluate
from .study import Study
from .target import Target


def check_defence(study: Study) -> None:
    """Raise now where `defend` would only after the undefended model and the controls were measured."""
    if study.recipe.defended is not None:
        check_source(study.recipe.defended)
    elif study.recipe.defence.load_in_4bit and not (target := study.defended()).run.is_done(target.hash):
        check_4bit(study.source, revision=study.inputs.revision)


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
                args = _arguments(study, run)
                changed, other = since_alike(target, name)
                if changed:
                    study.say(f"defence {name}: {summed_up(changed)}; {other} is not reused")
                with run.start(
                    stage="defend",
                    name=name,
                    hash=target.hash,
                    parent=study.base().hash,
                    seeds=[recipe.seed],
                    arguments={
                        "defence": study.written_out["defence"],
                        "pairs": len(pairs),
                        "training": axes_of(args),
                    },
                    data=study.data.record,
                    recipe=study.written_out,
                    depends=target.depends,
                    changed=changed,
                ):
                    study.say(f"defence {name}: training")
                    _train(study, target, pairs, args)
                    run.finish(model={"fingerprint": model_fingerprint(run.path / "model")})
    elif recipe.defended is None:
        study.say(f"defence {name}: done before, kept")
    evaluate(study, target, "defend")
    return target


def _arguments(study: Study, run: Run) -> TrainingArguments:
    values = {"seed": study.recipe.seed, **DEFENCE_DEFAULTS, **study.recipe.defence.train}
    if study.quiet:
        values["disable_tqdm"] = True
    return training_arguments(values, run.path / "checkpoints", "defence.train")


def _train(study: Study, target: Target, pairs: Sequence[Pair], args: TrainingArguments) -> None:
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
    trainer = ObjectiveTrainer(
        model=model,
        objective=objective,
        args=args,
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
            plain = load_model(study.source, dtype=recipe.dtype, revision=study.inputs.revision)
            study.save(run, merge_into(plain, trainer.model))
        else:
            study.save(run, trainer.model if lora is None else merge(trainer.model))
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
