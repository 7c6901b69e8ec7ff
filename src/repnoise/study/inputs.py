"""What a study keeps in memory and several studies of one recipe share: data, tokenizer, evaluations, identities."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .. import sandbox
from ..data import RowDataset, side
from ..data.parties import StudyData
from ..errors import ConfigError, DataError
from ..evaluations import EVALUATIONS, Evaluation
from ..models import load_tokenizer
from ..recipes.schema import Recipe
from ..training.arguments import training_arguments
from . import identity
from .audit import audit_judges, cut_line, cut_much, cut_rows
from .cell import Cell, distinct, unknown_to
from .load import load_data
from .target import Say

logger = logging.getLogger(__name__)


class Inputs:
    """Everything of a recipe but its defence, read when it is first asked for."""

    def __init__(self, recipe: Recipe, say: Say = lambda text: None) -> None:
        self.recipe, self.say = recipe, say

    @cached_property
    def source(self) -> str | Path:
        name = self.recipe.model
        return sandbox.weights(name.removeprefix(sandbox.PREFIX)) if name.startswith(sandbox.PREFIX) else name

    @cached_property
    def revision(self) -> str | None:
        """The commit of a hub id where it is known: everything is read from this one, whatever moves meanwhile."""
        return self.model.get("commit") or self.recipe.revision

    @cached_property
    def model(self) -> identity.Depends:
        """Of the undefended model and its tokenizer."""
        return identity.model(self.source, self.recipe.revision)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.source, revision=self.revision)

    @cached_property
    def evaluations(self) -> dict[str, Evaluation]:
        return {each.label: EVALUATIONS.build(each.name, each.options) for each in self.recipe.evaluations}

    @cached_property
    def measured(self) -> dict[str, identity.Depends]:
        """Label of an evaluation -> what its rows depend on beside the model."""
        names = {each.label: each.name for each in self.recipe.evaluations}
        return {label: identity.depends_on(names[label], each) for label, each in self.evaluations.items()}

    @cached_property
    def data(self) -> StudyData:
        """Checked for everything that a later stage would stumble over."""
        data = load_data(self.recipe)
        self._check_attacks(data)
        audit_judges(data, self.evaluations)
        cut = cut_rows(data, self.tokenizer)
        data.record["truncated"] = cut
        if line := cut_line(cut, data.max_length):
            self.say(line)
        for warning in cut_much(cut, data.max_length, self.recipe.bars.truncated):
            logger.warning(warning)
        return data

    @cached_property
    def common(self) -> dict[str, Any]:
        """What every result depends on."""
        data = self.data
        return {
            "model": self.model,
            "dtype": self.recipe.dtype,
            "data": {**data.record["fingerprints"], "template": data.template, "max_length": data.max_length},
            "seed": self.recipe.seed,
        }

    def _check_attacks(self, data: StudyData) -> None:
        """Everything about the attacks that can be told before any work: harms, rows, templates, arguments."""
        for index, attack in enumerate(self.recipe.attacks):
            where = f"attacks.{index}"
            unknown = [harm for harm in attack.harm or [] if harm not in data.attacks]
            if unknown:
                raise ConfigError(
                    f"{where}.harm: {', '.join(unknown)} is not in this data. Available: {', '.join(data.attacks)}."
                )
            for cell in distinct(map(Cell.of, attack.cells(list(data.attacks)))):
                training_arguments(cell.training(), Path("unused"), where)
                try:
                    pairs = cell.rows(cell.attack(), data)
                    rows = side(pairs if cell.template is not None else unknown_to(data, pairs), "harmful")
                    if rows:
                        template = cell.template or data.template
                        RowDataset(rows, self.tokenizer, template=template, max_length=data.max_length)
                except (ConfigError, DataError) as error:
                    raise type(error)(f"{where}: {error}") from error
