"""The data of a study: sources read and split between the parties."""

from __future__ import annotations

from ..data import Pair, Row, load_pairs, load_rows, split, withhold
from ..data.parties import StudyData
from ..errors import DataError
from ..recipes.schema import DataConfig, Recipe, SourceConfig


def load_data(recipe: Recipe) -> StudyData:
    """All data of the study; refuses overlapping prompts."""
    config = recipe.data
    if config.name == "sandbox":
        from ..sandbox.data import study_data

        return study_data()
    assert config.pairs is not None  # the recipe model has checked both
    assert config.retain is not None
    pairs = _pairs(config.pairs, config)
    further = {name: _pairs(source, config) for name, source in config.domains.items()}
    if config.withhold:
        try:
            pairs, further["withheld"] = withhold(pairs, config.withhold)
        except DataError as error:
            raise DataError(f"data.withhold: {error}") from error
    halves = {name: split(each, {"attack": 0.5, "test": 0.5}, seed=config.seed) for name, each in further.items()}
    parts = split(
        pairs,
        {str(name): size for name, size in config.sizes.items()},
        seed=config.seed,
    )
    for name, source in (("attack", config.attack), ("test", config.test)):
        if source is not None:
            parts[name] = _pairs(source, config)
    harmless = split(
        _rows(config.retain, config),
        {str(name): size for name, size in config.harmless_sizes.items()},
        seed=config.seed,
    )
    if config.harmless_test is not None:
        harmless["test"] = _rows(config.harmless_test, config)
    return StudyData(
        defence=parts["defence"],
        retain=harmless["retain"],
        attacks={"harmful": parts["attack"], **{name: half["attack"] for name, half in halves.items()}},
        test=parts["test"],
        tests={name: half["test"] for name, half in halves.items()},
        roles={**dict.fromkeys(config.domains, "domain"), "withheld": "withheld"},
        harmless_test=harmless["test"],
        template=config.template,
        max_length=config.max_length,
        allow_overlap=config.allow_overlap,
    )


def _pairs(source: SourceConfig, config: DataConfig) -> list[Pair]:
    fields = config.fields if source.fields is None else source.fields
    options = config.options if source.options is None else source.options
    return load_pairs(source.source, split=source.split, limit=source.limit, fields=fields, options=options)


def _rows(source: SourceConfig, config: DataConfig) -> list[Row]:
    options = config.options if source.options is None else source.options
    return load_rows(source.source, split=source.split, limit=source.limit, fields=source.fields, options=options)
