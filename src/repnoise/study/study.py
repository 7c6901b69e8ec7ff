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
from ..errors import ModelError
from ..evaluations import Evaluation
from ..models import anatomy, check_fits, context_size, load_model, random_model, save_model
from ..recipes.schema import Recipe
from ..store.provenance import canonical_hash
from ..store.run import Run
from .cell import Cell
from .inputs import Inputs, fingerprint
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
        self.inputs = shared or Inputs(recipe)

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

    # -- who is measured and attacked

    def base(self) -> Target:
        return Target(Run(self.folder / "base"), self.source, self._hash(target="base"))

    def controls(self) -> list[Target]:
        return [
            Target(
                Run(self.folder / f"control-{kind}"),
                sandbox.weights("ignorant") if kind == "ignorant" else self.source,
                self._hash(target=kind),
                random=kind == "random",
            )
            for kind in self.recipe.controls
        ]

    def defended(self) -> Target:
        """The model that the recipe's defence makes, or the one that is given as `defended`."""
        if self.recipe.defended is not None:
            given = self.recipe.defended
            digest = self._hash(given=fingerprint(given))
            return Target(Run(self.folder / f"given-{digest}"), given, digest)
        digest = self._hash(defence=self.recipe.defence.model_dump(mode="json"))
        run = Run(self.folder / f"{self.recipe.defence.name}-{digest}")
        return Target(run, run.path / "model", digest)

    def targets(self) -> list[Target]:
        return [self.base(), *self.controls(), self.defended()]

    def _hash(self, **further: Any) -> str:
        _ = self.data  # checked for this study's defence too
        return canonical_hash({**self.inputs.common, **further})

    # -- results

    def settings(self, label: str) -> str:
        """Hash of what an evaluation's rows depend on beside the model."""
        config = next(each for each in self.recipe.evaluations if each.label == label)
        return canonical_hash(config.model_dump(mode="json"))

    def lacking(self, run: Run) -> list[str]:
        """Labels of the evaluations that have no rows in `run`, or rows of other settings."""
        return [label for label in self.evaluations if not run.has_rows(label, self.settings(label))]

    def cells(self) -> list[Cell]:
        """Every attack of the recipe, once for each seed."""
        default = [harm for harm in self.data.attacks if self.data.roles.get(harm) != "withheld"]
        return [Cell.of(settings) for attack in self.recipe.attacks for settings in attack.cells(default)]

    def attack_run(self, target: Target, cell: Cell) -> tuple[Run, str]:
        measured = [self.settings(label) for label, evaluation in self.evaluations.items() if evaluation.attacked]
        digest = cell.digest(target.hash, curve=self.recipe.curve, evaluations=measured)
        return Run(target.run.path / "attacks" / f"{cell.name}-{digest}"), digest

    def is_attacked(self, target: Target, cell: Cell) -> bool:
        run, digest = self.attack_run(target, cell)
        return run.is_done(digest) and (not self.recipe.keep_attacked_weights or (run.path / "model").is_dir())

    # -- weights

    def load(self, target: Target, **options: Any) -> Any:
        """The target's weights, checked against the tokenizer. `options` of `load_model` win over the recipe."""
        if target.random:
            model: Any = random_model(target.source, seed=self.recipe.seed, dtype=self.recipe.dtype)
        else:
            model = load_model(target.source, **{"dtype": self.recipe.dtype, **options})
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
