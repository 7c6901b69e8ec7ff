"""What a study keeps in memory and several studies of one recipe share: data, tokenizer, evaluations, fingerprints."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .. import sandbox
from ..data import RowDataset, side
from ..data.parties import StudyData
from ..errors import ConfigError, DataError, ModelError
from ..evaluations import EVALUATIONS, Evaluation
from ..models import load_model, load_tokenizer, model_fingerprint
from ..recipes.schema import Recipe
from ..training.arguments import ATTACK_DEFAULTS, training_arguments
from .cell import Cell, distinct, unknown_to
from .load import check_lengths, load_data


class Inputs:
    """Everything of a recipe but its defence, read when it is first asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

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
    def data(self) -> StudyData:
        """Checked for everything that a later stage would stumble over."""
        data = load_data(self.recipe)
        self._check_attacks(data)
        check_lengths(data, self.tokenizer)
        return data

    @cached_property
    def common(self) -> dict[str, Any]:
        """What every result depends on."""
        return {
            "model": fingerprint(self.source),
            "dtype": self.recipe.dtype,
            "data": self.data.record["fingerprints"],
            "template": self.data.template,
            "max_length": self.data.max_length,
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
                training_arguments({**ATTACK_DEFAULTS, **cell.training()}, Path("unused"), where)
                try:
                    pairs = cell.rows(cell.attack(), data)
                    rows = side(pairs if cell.template is not None else unknown_to(data, pairs), "harmful")
                    if rows:
                        template = cell.template or data.template
                        RowDataset(rows, self.tokenizer, template=template, max_length=data.max_length)
                except (ConfigError, DataError) as error:
                    raise type(error)(f"{where}: {error}") from error


def fingerprint(source: str | Path) -> str:
    """Of the model's files; of a hub id its name."""
    if not Path(source).exists():
        return str(source)
    try:
        return model_fingerprint(source)
    except ModelError:
        load_model(source)  # says more about what is wrong with the folder
        raise
