"""A study: a recipe, its folder, and who is in it. What is done with it stands in the files beside this one."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .. import sandbox
from ..data.parties import StudyData
from ..defences import DEFENCES
from ..errors import ModelError
from ..evaluations import Evaluation
from ..models import anatomy, check_fits, context_size, load_model, random_model, save_model
from ..recipes.schema import Recipe
from ..store.provenance import canonical_hash
from ..store.run import Run
from ..training.arguments import DEFENCE_DEFAULTS, in_force
from . import identity
from .cell import Cell
from .inputs import Inputs
from .resolve import written_out
from .target import Say, Target


class Study:
    """The identity of every model and every result: its folder and its hash.

    Args:
        say: gets one line for each thing that is begun or kept.
        quiet: no progress bars.
        shared: inputs of a study that differs in the defence alone; by default they are read anew.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        say: Say = lambda text: None,
        *,
        quiet: bool = False,
        shared: Inputs | None = None,
    ) -> None:
        self.recipe, self.folder, self.say, self.quiet = recipe, Path(folder), say, quiet
        self.inputs = shared or Inputs(recipe, say)

    @property
    def source(self) -> str | Path:
        """The undefended model."""
        return self.inputs.source

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.inputs.tokenizer

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        return self.inputs.evaluations

    @cached_property
    def data(self) -> StudyData:
        data = self.inputs.data
        data.defence_of(self.recipe.defence.categories)
        return data

    @cached_property
    def written_out(self) -> dict[str, Any]:
        """The recipe with every default in it, for recipe.yaml."""
        return written_out(self.recipe)

    # -- who is measured and attacked

    def base(self) -> Target:
        return Target(
            Run(self.folder / "base"), self.source, self._depends(target="base"), revision=self.inputs.revision
        )

    def controls(self) -> list[Target]:
        return [self._ignorant() if kind == "ignorant" else self._random() for kind in self.recipe.controls]

    def _ignorant(self) -> Target:
        weights = sandbox.weights("ignorant")
        depends = self._depends(target="ignorant", weights=identity.model(weights))
        return Target(Run(self.folder / "control-ignorant"), weights, depends)

    def _random(self) -> Target:
        run, depends = Run(self.folder / "control-random"), self._depends(target="random")
        return Target(run, self.source, depends, random=True, revision=self.inputs.revision)

    def defended(self) -> Target:
        """The model that the recipe's defence makes, or the one that is given as `defended`."""
        given = self.recipe.defended
        if given is not None:
            found = identity.model(given)
            depends = self._depends(given=found)
            return Target(
                Run(self.folder / f"given-{canonical_hash(depends)}"), given, depends, revision=found.get("commit")
            )
        depends = self._depends(defence=self._defence)
        run = Run(self.folder / f"{self.recipe.defence.name}-{canonical_hash(depends)}")
        return Target(run, run.path / "model", depends)

    def targets(self) -> list[Target]:
        return [self.base(), *self.controls(), self.defended()]

    def _depends(self, **further: Any) -> identity.Depends:
        _ = self.data  # checked for this study's defence too
        return {**self.inputs.common, **further}

    @cached_property
    def _defence(self) -> identity.Depends:
        config = self.recipe.defence
        settings = config.model_dump(mode="json", include={"dtype", "lora_rank", "load_in_4bit", "categories"})
        built = DEFENCES.build(config.name, config.options)
        training = in_force({"seed": self.recipe.seed, **DEFENCE_DEFAULTS, **config.train})
        return {**identity.depends_on(config.name, built), **settings, "train": training}

    # -- results

    def measured(self, label: str) -> identity.Depends:
        """What an evaluation's rows depend on beside the model."""
        return self.inputs.measured[label]

    def lacking(self, run: Run) -> list[str]:
        """Labels of the evaluations that have no rows in `run`, or rows that something else made."""
        return [label for label in self.evaluations if not run.has_rows(label, self.measured(label))]

    def cells(self) -> list[Cell]:
        """Every attack of the recipe, once for each seed."""
        default = [harm for harm in self.data.attacks if self.data.roles.get(harm) != "withheld"]
        return [Cell.of(settings) for attack in self.recipe.attacks for settings in attack.cells(default)]

    def attack_depends(self, target: Target, cell: Cell) -> identity.Depends:
        attack = cell.attack()
        return {
            "parent": target.hash,
            "attack": identity.depends_on(cell.name, attack),
            "public": identity.commit(getattr(attack, "public", None)),
            "rows": {"harm": cell.harm, "examples": cell.examples, "template": cell.template or self.data.template},
            "train": in_force(cell.training()),
            "curve": self.recipe.curve,
            "evaluations": {label: self.measured(label) for label, e in self.evaluations.items() if e.attacked},
        }

    def attack_run(self, target: Target, cell: Cell) -> tuple[Run, str]:
        """Where an attack's result is, and its hash."""
        digest = canonical_hash(self.attack_depends(target, cell))
        return Run(target.run.path / "attacks" / f"{cell.name}-{digest}"), digest

    def is_attacked(self, target: Target, cell: Cell) -> bool:
        run, digest = self.attack_run(target, cell)
        return run.is_done(digest) and (not self.recipe.keep_attacked_weights or (run.path / "model").is_dir())

    # -- weights

    def load(self, target: Target, **options: Any) -> Any:
        """The target's weights, checked against the tokenizer. `options` of `load_model` win over the recipe."""
        if target.random:
            model: Any = random_model(
                target.source, seed=self.recipe.seed, dtype=self.recipe.dtype, revision=target.revision
            )
        else:
            model = load_model(target.source, **{"dtype": self.recipe.dtype, "revision": target.revision, **options})
        check_fits(model, self.tokenizer)
        anatomy(model)  # an unknown family is refused here, before any work
        context = context_size(model)
        if self.data.max_length > context:
            raise ModelError(
                f"data.max_length is {self.data.max_length}, but the context of {target.source} has {context}"
                f" tokens. Set data.max_length={context} or less."
            )
        return model.to("cuda") if torch.cuda.is_available() else model

    def save(self, run: Run, model: Any) -> None:
        for draft in run.path.glob(".model.*"):  # of a killed process
            shutil.rmtree(draft, ignore_errors=True)
        save_model(model, self.tokenizer, run.path / "model", overwrite=True)
